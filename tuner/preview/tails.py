"""What truncation took from the end of documents: their rows, tokenised once more and left whole."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from tuner.dataset.build import build_shards
from tuner.dataset.read import Row, read_chunks
from tuner.dataset.shards import Shards
from tuner.engine.assemble import Assembly, plain
from tuner.errors import UserError
from tuner.preview.samples import DocumentView, Tail

UNCUT = (1 << 31) - 1  # a max_length that no row reaches
MOST_ROWS_OF_A_LINE = 1_000  # a JSON array may stand in a single line; then a line does not tell its rows apart


def with_tails(documents: Sequence[DocumentView], node: Any, assembly: Assembly) -> list[DocumentView]:
    """The documents, each that truncation may have cut with what it lost.

    `node` is the config of their shards: the row of a document goes through the same call again, with room for all.
    """
    if not isinstance(node, Mapping) or node.get("type") is not build_shards or node.get("too_long") != "truncate":
        return list(documents)
    full = int(node["max_length"])
    return [
        document._replace(tail=_tail(document, plain(node), assembly)) if len(document.ids) >= full else document
        for document in documents
    ]


def _tail(document: DocumentView, node: dict[str, Any], assembly: Assembly) -> Tail | None:
    file, _, line = document.source.rpartition(":")
    try:
        rows = _rows(Path(file), int(line))
        whole = _tokenised(rows, node, assembly)
    except UserError as error:
        return Tail(problem=str(error).splitlines()[0])
    found = {tuple(ids[len(document.ids) :]) for ids in whole if ids[: len(document.ids)] == document.ids}
    if len(found) != 1:
        return Tail(problem=f"{len(found)} rows of this line begin like the document")
    [tail] = found
    return Tail(tail) if tail else None


def _rows(file: Path, line: int) -> list[Row]:
    """The rows that begin on a line; UserError where they are too many to tell apart."""
    rows = (row for chunk in read_chunks(file) for row in chunk.rows if row.line >= line)
    found = []
    for row in islice(rows, MOST_ROWS_OF_A_LINE + 1):
        if row.line > line:
            break
        found.append(row)
    if len(found) > MOST_ROWS_OF_A_LINE:
        raise UserError(f"{file}:{line} holds more than {MOST_ROWS_OF_A_LINE:,} rows; put each on a line of its own.")
    return found


def _tokenised(rows: Sequence[Row], node: dict[str, Any], assembly: Assembly) -> list[list[int]]:
    """The ids of rows as documents of any length; silently, for what is printed would look like the whole data's."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(b"\n".join(b" ".join(row.content.splitlines()) for row in rows))
        settings = {"path": str(file), "max_length": UNCUT, "cache_dir": folder, "on_bad_row": "skip"}
        shards: Shards = assembly.build({**node, **settings})
        return [shards.document(index).ids.tolist() for index in range(len(shards))]
