"""Rows of line-based files (JSONL), and a text file as one row."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.rows import QUARANTINED_BYTES, UTF8_BOM, Row, decode, too_large
from tuner.errors import UserError


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
    if len(data) > rows.MAX_ROW_BYTES:
        raise UserError(
            f"{path} is one document of over {rows.MAX_ROW_BYTES >> 20} MiB. "
            'Cut it into files, or into rows of a .jsonl file, {"text": ...} each.'
        )
    text = decode(data.removeprefix(UTF8_BOM), path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL byte, so this is no text. Check what wrote the file.")
    if text.strip():
        yield Row(1, json.dumps({"text": text}, ensure_ascii=False).encode())


def pass_line(stream: BinaryIO) -> int:
    """Go past the end of the line; how many bytes that was."""
    size = 0
    while piece := stream.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def whole_characters(data: bytes) -> bytes:
    """Bytes without the character that their end cuts through."""
    return data.decode(errors="ignore").encode()
