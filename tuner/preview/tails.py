"""What truncation took from the end of documents: their rows, tokenised once more and left whole."""

import io
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tuner.dataset.build import build_shards, build_stream
from tuner.dataset.documents import UNCUT
from tuner.dataset.format_choice import files_by_format
from tuner.dataset.read import Row, read_chunks
from tuner.dataset.shards import Shards
from tuner.dataset.sources import find_sources
from tuner.engine.assemble import Assembly, plain
from tuner.errors import UserError
from tuner.preview.samples import DocumentView, Excerpt, Tail

MOST_ROWS_OF_A_LINE = 1_000  # a JSON array may stand in a single line; then a line does not tell its rows apart


def with_tails(excerpts: Sequence[Excerpt], node: Any, assembly: Assembly) -> list[Excerpt]:
    """The excerpts, each document shown that truncation may have cut with what it lost.

    `node` is the config of their shards: the rows of the documents go through the same call again, with room for all.
    """
    known = isinstance(node, Mapping) and node.get("type") in (build_shards, build_stream)
    if not known or node.get("too_long") != "truncate":
        return list(excerpts)
    shown = [document for pack, number in excerpts for document in pack.documents[:number]]
    full = {document.number: document for document in shown if len(document.ids) >= int(node["max_length"])}
    tails = _tails(list(full.values()), plain(node), assembly) if full else {}
    completed = []
    for pack, number in excerpts:
        documents = [document._replace(tail=tails.get(document.number)) for document in pack.documents]
        completed.append(Excerpt(pack._replace(documents=documents), number))
    return completed


def _tails(documents: Sequence[DocumentView], node: dict[str, Any], assembly: Assembly) -> dict[int, Tail]:
    """By the number of the document: what it lost, or why that is not known; nothing for one that lost nothing."""
    found: dict[int, set[tuple[int, ...]]] = {document.number: set() for document in documents}
    try:
        for owner, ids in _whole(documents, node, assembly):
            if ids[: len(owner.ids)] == owner.ids:
                found[owner.number].add(tuple(ids[len(owner.ids) :]))
    except UserError as error:
        problem = Tail(problem=str(error).splitlines()[0])
        return {document.number: problem for document in documents}
    return {number: _only(tails) for number, tails in found.items() if tails != {()}}


def _whole(
    documents: Sequence[DocumentView], node: dict[str, Any], assembly: Assembly
) -> Iterator[tuple[DocumentView, list[int]]]:
    """Each document with the ids that a row on its line gives, of any length; each file in its own format."""
    with redirect_stdout(io.StringIO()):  # what is found out of formats has been said before
        by_format = files_by_format(node["data_format"], find_sources(node["path"], node["data_format"]))
    for data_format, files in by_format.items():
        names = set(map(str, files))
        found = list(_rows_of(document for document in documents if document.source.rpartition(":")[0] in names))
        owners = [document for document, its_rows in found for _ in its_rows]
        rows = [row for _, its_rows in found for row in its_rows]
        if rows:
            tokenised = _tokenised(rows, {**node, "data_format": data_format}, assembly)
            yield from ((owners[place], ids) for place, ids in tokenised)


def _only(tails: Collection[tuple[int, ...]]) -> Tail:
    """The tail, if it is the only one that rows of the document's line could have left."""
    if len(tails) != 1:
        return Tail(problem=f"{len(tails)} different rows of this line begin like the document")
    [ids] = tails
    return Tail(ids)


def _rows_of(documents: Iterable[DocumentView]) -> Iterable[tuple[DocumentView, list[Row]]]:
    """Each document with the rows that begin on its line; every file is read once, up to the last line needed.

    Raises:
        UserError: a file that cannot be read any more, or a line of more rows than are told apart.
    """
    by_file: dict[str, dict[int, list[DocumentView]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        file, _, line = document.source.rpartition(":")
        by_file[file][int(line)].append(document)
    for file, by_line in by_file.items():
        rows = _rows(Path(file), by_line)
        yield from ((document, rows[line]) for line, its_documents in by_line.items() for document in its_documents)


def _rows(file: Path, lines: Collection[int]) -> dict[int, list[Row]]:
    """The rows that begin on some lines."""
    found: dict[int, list[Row]] = {line: [] for line in lines}
    last = max(lines)
    for row in (row for chunk in read_chunks(file) for row in chunk.rows):
        if row.line > last:
            break
        if row.line in found:
            found[row.line].append(row)
        if len(found.get(row.line, ())) > MOST_ROWS_OF_A_LINE:
            raise UserError(
                f"{file}:{row.line} holds over {MOST_ROWS_OF_A_LINE:,} rows; put each on a line of its own."
            )
    return found


def _tokenised(rows: Sequence[Row], node: dict[str, Any], assembly: Assembly) -> list[tuple[int, list[int]]]:
    """Place in `rows` and ids of each document that they give, of any length.

    What preparing prints would look as if it were about all of the data, so it is not shown.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(b"\n".join(b" ".join(row.content.splitlines()) for row in rows))
        settings = {"type": build_shards, "path": str(file), "cache_dir": folder}
        settings |= {"max_length": UNCUT, "on_bad_row": "skip"}
        shards: Shards = assembly.build({**node, **settings})
        lines = [int(shards.source(index).rpartition(":")[2]) for index in range(len(shards))]
        return [(line - 1, shards.document(index).ids.tolist()) for index, line in enumerate(lines)]
