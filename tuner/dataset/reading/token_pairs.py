"""Rows of a `.bin` file of tokens, which a `.bin.meta` file beside it names: a JSON line for each document.

The meta file is a numpy array (documents, 2) of integers: the byte at which each line begins, and its tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.reading.lines import read_lines
from tuner.dataset.reading.rows import Row
from tuner.errors import UserError

ENDING = ".bin"


def meta_path(path: Path) -> Path:
    """Where the meta file of a `.bin` file is."""
    return path.with_name(path.name + ".meta")


def read_token_pairs(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """The documents of a pair, in order. Raises UserError where the two files do not belong together."""
    meta = read_meta(path)
    number = position = 0
    for row in read_lines(stream, path):
        if number == len(meta):
            raise _foreign(path, f"the meta file names {len(meta):,} documents, and more lines follow")
        position, num_tokens = meta[number].tolist()
        stream_position = stream.tell() - len(row.content)
        if not row.fault and position != stream_position:
            raise _foreign(path, f"document {number + 1} begins at byte {stream_position:,}, not at {position:,}")
        number += 1
        yield row if row.fault else Row(row.line, row.content, _miscounted(row.content, num_tokens))
    if number < len(meta):
        raise _foreign(path, f"the meta file names {len(meta):,} documents, and there are {number:,} lines")


def read_meta(path: Path) -> NDArray[np.int64]:
    """(documents, 2): begin and tokens of each document of a `.bin` file. Raises UserError if it is no such array."""
    file = meta_path(path)
    if not file.is_file():
        raise UserError(
            f"{path} has no {file.name} beside it. A .bin file of tokens is read together with its .bin.meta; "
            "tuner.dataset.token_files.write makes both."
        )
    try:
        meta: Any = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{file} is no whole numpy array ({error}). Write it again with np.save.") from error
    if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
        raise UserError(
            f"{file} holds {meta.dtype} of shape {meta.shape}. Expected: integers of shape (documents, 2), "
            "the byte at which a document begins and its number of tokens."
        )
    return meta.astype(np.int64)


def _miscounted(content: bytes, num_tokens: int) -> str:
    """What is wrong if a line does not hold as many tokens as its meta says; counted by its commas where they do."""
    if content.count(b",") + 1 == num_tokens:
        return ""
    try:
        tokens = json.loads(content)["tokens"]
    except (ValueError, KeyError, TypeError):
        return ""  # what is wrong with the row itself is said when it is parsed
    if isinstance(tokens, list) and len(tokens) != num_tokens:
        return f"{len(tokens):,} tokens, but the .bin.meta file says {num_tokens:,}. Write the pair again."
    return ""


def _foreign(path: Path, found: str) -> UserError:
    return UserError(f"{path} and {meta_path(path).name} do not belong together: {found}. Write the pair again.")
