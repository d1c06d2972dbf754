"""Rows of CSV and TSV files, each as a JSON object of its columns."""

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.cells import row_of_cells
from tuner.dataset.reading.rows import UTF8_BOM, Row, decode
from tuner.errors import UserError

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class _Lines:
    """The lines of a stream as text; bytes that are no UTF-8 stay recognisable, so that they cost their row only."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self.number = 0  # lines given so far
        self.ended = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(rows.MAX_ROW_BYTES + 1)
        if len(line) > rows.MAX_ROW_BYTES:
            raise UserError(f"{self._path}:{self.number + 1}: {rows.too_large(len(line))}")
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        return line.removeprefix(UTF8_BOM).decode(errors="surrogateescape")


def read_table(stream: BinaryIO, path: Path, *, separator: str) -> Iterator[Row]:
    """A row for each line below the header, as {column: text}; a quoted cell may hold line ends."""
    csv.field_size_limit(rows.MAX_ROW_BYTES)
    lines = _Lines(stream, path)
    table = csv.reader(lines, delimiter=separator, strict=True)
    header = _header(lines, table, separator, path)
    while True:
        line = lines.number + 1
        try:
            cells = next(table, None)
        except csv.Error as error:
            yield Row(line, b"{}", _broken(error, lines, line, path))
            continue
        if cells is None:
            return
        if cells:
            yield _row(line, header, cells)


def _header(lines: _Lines, table: "Iterator[list[str]]", separator: str, path: Path) -> list[str]:
    """The names of the columns. Raises UserError if they cannot be names."""
    try:
        header = next((cells for cells in table if cells), [])
    except csv.Error as error:
        raise UserError(f"{path}:{lines.number}: the header is no row of a table ({error}).") from error
    names = [decode(name.encode(errors="surrogateescape"), path) for name in header]
    others = [other for other in SEPARATORS if other != separator and len(names) == 1 and other in names[0]]
    if others:
        raise UserError(
            f"{path}: the header {names[0][:80]!r} is one column; it looks separated by {SEPARATORS[others[0]]}. "
            f"Expected: {SEPARATORS[separator]}. CSV has commas, a .tsv file tabs."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the header names {', '.join(map(repr, twice))} twice. Give each column its own name.")
    if "" in names[1:] or any("\0" in name for name in names):  # pandas leaves the first, its index, without a name
        raise UserError(f"{path}: the header {names} has a column without a name. Name it, or leave it out.")
    return names


def _row(line: int, header: list[str], cells: list[str]) -> Row:
    named = dict(zip(header, cells))
    if len(cells) != len(header):
        named |= {f"cell {place + 1}": cell for place, cell in enumerate(cells) if place >= len(header)}
        fault = f"{len(cells)} cells, but the header has {len(header)}. Quote cells that hold the separator."
        return Row(line, row_of_cells(line, _readable(named)).content, fault)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start : error.end].encode(errors="surrogateescape")[:4].hex(" ")
        fault = f"not UTF-8 (found the bytes {found}). Save the file as UTF-8."
        return Row(line, row_of_cells(line, _readable(named)).content, fault)
    if any("\0" in cell for cell in cells):
        return Row(line, row_of_cells(line, named).content, "a NUL byte. Check what wrote the file.")
    return row_of_cells(line, named)


def _readable(cells: dict[str, str]) -> dict[str, str]:
    """Cells that can be written aside: bytes that are no text become U+FFFD."""
    return {name: cell.encode(errors="surrogateescape").decode(errors="replace") for name, cell in cells.items()}


def _broken(error: csv.Error, lines: _Lines, line: int, path: Path) -> str:
    """What is wrong with a row. Raises UserError where it took the rest of the file with it."""
    text = str(error)
    if lines.ended or "field larger" in text:
        raise UserError(f"{path}:{line}: a quote that opens here is never closed. Close it; a quote inside is doubled.")
    if "new-line character" in text:
        return "a bare carriage return. Quote the cell that holds it, or end the lines with \\n."
    return f"no row of a table ({text}). A cell with quotes is quoted as a whole, and each quote inside doubled."


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".csv": partial(read_table, separator=","),
    ".tsv": partial(read_table, separator="\t"),
}
