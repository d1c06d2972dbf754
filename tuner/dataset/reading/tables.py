"""Rows of CSV and TSV files, each as a JSON object of its columns."""

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.cells import row_of_cells
from tuner.dataset.reading.rows import QUARANTINED_BYTES, UTF8_BOM, Row, decode, too_large, whole_characters
from tuner.errors import UserError

CARRIAGE_RETURN = "a bare carriage return. Quote the cell that holds it, or end the lines with \\n."
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


class _Lines:
    """The lines of a stream as text; bytes that are no UTF-8 stay recognisable, so that they cost their row only."""

    def __init__(self, stream: BinaryIO, separator: str) -> None:
        self._stream, self._separator = stream, separator.encode()
        self.number = 0  # lines given so far
        self.too_large = 0  # bytes of the last line that was too large to hold
        self.ended = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(rows.MAX_ROW_BYTES + 1)
        if len(line) > rows.MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = self._beginning(line)
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        return line.removeprefix(UTF8_BOM).decode(errors="surrogateescape")

    def _beginning(self, line: bytes) -> bytes:
        """A stand-in for a line that is too large: its beginning, and a quote where that leaves a cell as open."""
        kept = whole_characters(line[:QUARANTINED_BYTES])
        num_quotes, self.too_large = line.count(b'"'), len(line)
        while piece := self._stream.readline(1 << 20):
            num_quotes += piece.count(b'"')
            self.too_large += len(piece)
            if piece.endswith(b"\n"):
                break
        is_open = (num_quotes - kept.count(b'"')) % 2
        return kept + (self._separator + b'"\n' if is_open else b"\n")


def read_table(stream: BinaryIO, path: Path, *, separator: str) -> Iterator[Row]:
    """A row for each line below the header, as {column: text}; a quoted cell may hold line ends."""
    csv.field_size_limit(rows.MAX_ROW_BYTES)
    lines = _Lines(stream, separator)
    table = csv.reader(lines, delimiter=separator, strict=True)
    header = _header(lines, table, separator, path)
    while True:
        line = lines.number + 1
        lines.too_large = 0
        try:
            cells = next(table, None)
        except csv.Error as error:
            fault = too_large(lines.too_large) if lines.too_large else _broken(error, lines, line, path)
            yield Row(line, b"{}", fault)
            continue
        if cells is None:
            return
        if lines.too_large:
            yield Row(line, row_of_cells(line, _readable(dict(zip(header, cells)))).content, too_large(lines.too_large))
        elif cells:
            yield _row(line, header, cells)


def _header(lines: _Lines, table: "Iterator[list[str]]", separator: str, path: Path) -> list[str]:
    """The names of the columns. Raises UserError if they cannot be names."""
    try:
        header = next((cells for cells in table if cells), [])
    except csv.Error as error:
        bare = "new-line character" in str(error)
        what = f"ends with {CARRIAGE_RETURN}" if bare else f"is no row of a table ({error})."
        raise UserError(f"{path}:{lines.number}: the header {what}") from error
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
    if "field larger" in text:
        raise UserError(
            f"{path}:{line}: a cell of over {rows.MAX_ROW_BYTES >> 20} MiB begins here. A quote that opens in it may "
            "never be closed; a quote inside is doubled."
        )
    if lines.ended:
        raise UserError(f"{path}:{line}: a quote that opens here is never closed. Close it; a quote inside is doubled.")
    if "new-line character" in text:
        return CARRIAGE_RETURN
    return f"no row of a table ({text}). A cell with quotes is quoted as a whole, and each quote inside doubled."


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".csv": partial(read_table, separator=","),
    ".tsv": partial(read_table, separator="\t"),
}
