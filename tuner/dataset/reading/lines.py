"""Rows of line-based files (JSONL), and a text file as one row."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.rows import QUARANTINED_BYTES, UTF8_BOM, Row, too_large, whole_characters


def read_lines(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A row for each line that is not blank; one that is too large to hold is passed over and says so."""
    for line in count(1):
        content = stream.readline(rows.MAX_ROW_BYTES + 1)
        if not content:
            return
        if len(content) > rows.MAX_ROW_BYTES and not content.endswith(b"\n"):
            size = len(content) + pass_line(stream)
            yield Row(line, whole_characters(content[:QUARANTINED_BYTES]), too_large(size))
            continue
        content = content.removeprefix(UTF8_BOM)  # also amid a file: joined files have one at each joint
        if not content.isspace() and content:
            yield Row(line, content)


def read_text(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A whole file as one row of the text format."""
    data = stream.read(rows.MAX_ROW_BYTES + 1)
    fault = _fault(data)
    kept = whole_characters(data[:QUARANTINED_BYTES]) if len(data) > rows.MAX_ROW_BYTES else data
    text = kept.removeprefix(UTF8_BOM).decode(errors="replace")
    if text.strip():
        yield Row(1, json.dumps({"text": text}, ensure_ascii=False).encode(), fault)


def _fault(data: bytes) -> str:
    """What keeps a file from being one document of text, '' for nothing."""
    if len(data) > rows.MAX_ROW_BYTES:
        return (
            f"one document of over {rows.MAX_ROW_BYTES >> 20} MiB. "
            'Cut it into files, or into rows of a .jsonl file, {"text": ...} each.'
        )
    if (nul := data.find(0)) >= 0:
        return f"a NUL byte in line {data.count(10, 0, nul) + 1}, so this is no text. Check what wrote the file."
    try:
        data.decode()
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 4].hex(" ")
        return f"not UTF-8 (found the bytes {found}). Save the file as UTF-8."
    return ""


def pass_line(stream: BinaryIO) -> int:
    """Go past the end of the line; how many bytes that was."""
    size = 0
    while piece := stream.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size
