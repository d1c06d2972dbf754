"""Rows of Parquet and Arrow files, in batches of bounded size."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.cells import row_of_cells
from tuner.dataset.reading.rows import Row, too_large
from tuner.errors import UserError

BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 1024
LARGE_BYTES = 4 * rows.MAX_ROW_BYTES  # in memory; as Python's objects, and then as JSON, a row takes several times that
NEEDS_PYARROW = "Reading {} files needs pyarrow: pip install tuner[data]"


def read_parquet(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A row for each of the table's, numbered from 1."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(NEEDS_PYARROW.format("Parquet")) from error
    try:
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            meta = file.metadata
            num_bytes = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
            size = BATCH_BYTES * meta.num_rows // max(1, num_bytes)
            batches = file.iter_batches(batch_size=min(max(1, size), MAX_BATCH_ROWS))
            yield from _rows(batches, file.schema_arrow, meta.num_rows, stream, path)
    except (ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from error


def read_arrow(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A row for each of the table's, numbered from 1; Arrow's file form or its stream form."""
    try:
        import pyarrow
        from pyarrow import ipc
    except ImportError as error:
        raise UserError(NEEDS_PYARROW.format("Arrow")) from error
    try:
        with pyarrow.memory_map(str(path)) as source:
            if stream.read(6) == b"ARROW1":
                file = ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
                schema = file.schema
            else:
                batches = ipc.open_stream(source)
                schema = batches.schema
            yield from _rows(map(_validated, batches), schema, 0, stream, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, "Arrow", error) from error


def _validated(batch: Any) -> Any:
    """A batch as it lies in the file; of a damaged one, pyarrow would read beyond its memory."""
    batch.validate(full=True)
    return batch


def _damaged(path: Path, kind: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{path} is not a whole {kind} file ({reason}). Copy or write it again.")


def _rows(batches: Any, schema: Any, num_rows: int, stream: BinaryIO, path: Path) -> Iterator[Row]:
    names = schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: {', '.join(map(repr, twice))} names two columns. Give each column its own name.")
    size, done = path.stat().st_size, 0
    for batch in batches:
        for part in _parts(batch):
            yield from _part_rows(part, done + 1)
            done += part.num_rows
            if num_rows:
                stream.seek(size * done // num_rows)  # how far reading has come is asked of this stream
    stream.seek(size)


def _parts(batch: Any) -> Iterator[Any]:
    """A batch in pieces of about BATCH_BYTES: as Python's objects they take many times that."""
    step = max(1, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, step):
        yield batch.slice(start, step)


def _part_rows(part: Any, first: int) -> Iterator[Row]:
    if part.nbytes > LARGE_BYTES:
        yield from (_single(part.slice(place, 1), first + place) for place in range(part.num_rows))
        return
    try:
        cells_of_rows = part.to_pylist()
    except UnicodeDecodeError:
        yield from (_single(part.slice(place, 1), first + place) for place in range(part.num_rows))
        return
    for place, cells in enumerate(cells_of_rows):
        yield row_of_cells(first + place, cells)


def _single(part: Any, number: int) -> Row:
    """One row of a batch that has one with broken text, or one that is very large."""
    if part.nbytes > LARGE_BYTES:
        sizes = accumulate(column.nbytes for column in part.columns)
        kept = [name for name, size in zip(part.schema.names, sizes) if size < rows.QUARANTINED_BYTES]
        return _single(part.select(kept), number)._replace(fault=too_large(part.nbytes))
    try:
        return row_of_cells(number, part.to_pylist()[0])
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 4].hex(" ")
        return Row(number, b"{}", f"not UTF-8 (found the bytes {found}). Write the column as binary, or mend its text.")
