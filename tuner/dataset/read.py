"""Rows out of data files, in chunks of bounded size, each row with its line number."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tuner.dataset.reading import arrow, compression, tables
from tuner.dataset.reading.compression import COMPRESSIONS, DAMAGE
from tuner.dataset.reading.json_values import read_values
from tuner.dataset.reading.lines import read_lines, read_text
from tuner.dataset.reading.rows import SIGNATURE_BYTES, Reader, Row, check_signature
from tuner.dataset.reading.stamps import check_unchanged, stamp
from tuner.dataset.reading.token_pairs import read_token_pairs
from tuner.dataset.repository.listing import KIND as TREE
from tuner.dataset.repository.trees import read_tree
from tuner.errors import UserError

__all__ = ["BEGIN", "READERS", "Chunk", "Place", "Row", "file_kind", "read_chunks"]

CHUNK_BYTES = 1 << 18  # enough rows to feed the tokenizer in batches, few enough to stay small

READERS: dict[str, Reader] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_values,
    ".txt": read_text,
    **tables.READERS,
    ".parquet": arrow.read_parquet,
    ".arrow": arrow.read_arrow,
    ".bin": read_token_pairs,
}
NOT_COMPRESSED = (".parquet", ".arrow", ".bin")  # read out of order, or together with another file
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", *(f".tar{ending}" for ending in COMPRESSIONS))
BY_LINES = (".jsonl", ".ndjson")  # where not compressed, reading goes on at a byte; in others rows are passed over


class Chunk(NamedTuple):
    """Consecutive rows, and how many bytes of the file (as it lies on disk) were read by then."""

    rows: list[Row]
    position: int


class Place(NamedTuple):
    """How far a file has been read: its bytes as it lies on disk, the line its last row begins on, and its rows."""

    position: int = 0
    line: int = 0
    num_rows: int = 0

    def behind(self, chunk: Chunk) -> "Place":
        """The place behind the chunk that begins here."""
        return Place(chunk.position, chunk.rows[-1].line, self.num_rows + len(chunk.rows))


BEGIN = Place()


def read_chunks(path: Path, after: Place = BEGIN) -> Iterator[Chunk]:
    """The rows of a file in order, from its begin or from the place behind a chunk that was read before.

    Raises UserError if it cannot be read as its ending says, holds no row, or changes meanwhile.
    """
    kind = file_kind(path)
    try:
        before = stamp(path)
        try:
            yield from _read(path, kind, after)
        except UserError:
            check_unchanged(path, before)  # what is wrong then is that, whatever it looks like
            raise
        check_unchanged(path, before)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def file_kind(path: Path) -> str:
    """The key in READERS that a file's ending asks for, that of a compression aside; TREE for a directory."""
    if path.is_dir():
        return TREE
    if path.name.lower().endswith(ARCHIVES):
        raise UserError(
            f"{path} is an archive. Unpack it and name what is in it: its data files, or its directory with "
            f'data_format = "{TREE}" if that is a tree of source code.'
        )
    compressed = compression.ending(path)
    kind = (path.with_suffix("") if compressed else path).suffix.lower()
    if kind not in READERS:
        raise UserError(
            f"{path}: the ending {kind!r} is not known. Known: {', '.join(READERS)}; "
            f"all but the last three also with {', '.join(COMPRESSIONS)}."
        )
    if compressed and kind in NOT_COMPRESSED:
        raise UserError(f"{path}: {kind} files are not read with {compressed} around them. Decompress it.")
    return kind


def _read(path: Path, kind: str, after: Place) -> Iterator[Chunk]:
    if kind == TREE:
        for row, position in islice(read_tree(path), after.num_rows, None):
            yield Chunk([row], position)
        return
    empty = after == BEGIN
    try:
        with open(path, "rb") as raw, compression.opened(raw, path) as stream:
            if kind not in NOT_COMPRESSED:
                check_signature(stream.peek(SIGNATURE_BYTES)[: 4 * SIGNATURE_BYTES], path)
            for chunk in _chunks(_rows(stream, path, kind, after), raw):
                empty = False
                yield chunk
    except DAMAGE as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # pyarrow's, for a damaged stream
            raise _damaged(path, error) from error
        raise
    if empty:
        raise UserError(f"{path} holds no rows. Expected: at least one.")


def _rows(stream: BinaryIO, path: Path, kind: str, after: Place) -> Iterable[Row]:
    """The rows behind a place; the same as those that reading from the begin would give there."""
    if after == BEGIN:
        return READERS[kind](stream, path)
    if kind in BY_LINES and not compression.ending(path):
        stream.seek(after.position)
        return (row._replace(line=row.line + after.line) for row in READERS[kind](stream, path))
    return islice(READERS[kind](stream, path), after.num_rows, None)


def _damaged(path: Path, error: Any) -> UserError:
    kind = compression.NAMES[compression.ending(path)]
    return UserError(f"{path} is not a whole {kind} file ({error}). Copy or compress it again.")


def _chunks(rows: Iterable[Row], raw: BinaryIO) -> Iterator[Chunk]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.content)
        if size >= CHUNK_BYTES:
            yield Chunk(chunk, raw.tell())
            chunk, size = [], 0
    if chunk:
        yield Chunk(chunk, raw.tell())
