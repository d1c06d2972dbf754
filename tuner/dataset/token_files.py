"""Tokenised documents as pairs of `.bin` and `.bin.meta` files, as other tools of the lab read and write them."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.formats.token_ids import tokens
from tuner.dataset.given_ids import given_document
from tuner.dataset.reading.rows import Row
from tuner.dataset.reading.strict_json import parse_row
from tuner.dataset.reading.token_pairs import ENDING, meta_path, read_token_pairs
from tuner.dataset.tokenize import Document
from tuner.errors import UserError

MAX_IDS = 1 << 32  # of any tokenizer: no file says which one made it


def write(path: str | Path, documents: Iterable[Document]) -> int:
    """Write documents, one after the other, to `path` (NAME.bin) and NAME.bin.meta; how many there were.

    A token without loss is written as its negative, so token 0 always has loss. Both files appear once they are whole.
    Raises UserError for another ending, for a token 0 without loss, and for tokens whose loss does not weigh 1.
    """
    path = Path(path)
    if path.suffix != ENDING:
        raise UserError(f"{path}: a file of tokens ends in {ENDING}. Give such a name.")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    meta_temporary = meta_path(temporary)
    try:
        with open(temporary, "wb") as file:
            meta = np.array([_append(file, document, number) for number, document in enumerate(documents)], np.int64)
        with open(meta_temporary, "wb") as file:
            np.save(file, meta.reshape(-1, 2))
        meta_path(path).unlink(missing_ok=True)  # an old meta file never stands beside the new tokens
        temporary.replace(path)
        meta_temporary.replace(meta_path(path))
    finally:
        temporary.unlink(missing_ok=True)
        meta_temporary.unlink(missing_ok=True)
    return len(meta)


def read(path: str | Path) -> Iterator[Document]:
    """The documents of a pair, in order. Raises UserError where it is not whole, naming the line."""
    path = Path(path)
    with open(path, "rb") as stream:
        for row in read_token_pairs(stream, path):
            yield _document(row, path)


def _document(row: Row, path: Path) -> Document:
    try:
        if row.fault:
            raise UserError(row.fault)
        sample = tokens(parse_row(row.content))
    except UserError as error:
        raise UserError(f"{path}:{row.line}: {error}") from error
    return given_document(sample, MAX_IDS)


def _append(file: BinaryIO, document: Document, number: int) -> tuple[int, int]:
    """Write a document; the byte at which it begins, and its number of tokens."""
    start = file.tell()
    signed = _signed(document, number)
    file.write(b'{"tokens": [' + b", ".join(b"%d" % token for token in signed.tolist()) + b"]}\n")
    return start, len(signed)


def _signed(document: Document, number: int) -> NDArray[np.int64]:
    """(tokens,) ids, negative where nothing is trained."""
    ids = document.ids.astype(np.int64)
    if document.weights is not None:
        raise UserError(
            f"document {number}: tokens whose loss weighs other than 1, which a .bin file cannot say: its tokens have "
            "loss or have none. Leave the weights out of the rows."
        )
    if np.any((ids == 0) & ~document.trained):
        raise UserError(
            f"document {number}: token 0 without loss, which a .bin file cannot say: it marks such tokens by a minus. "
            'Write rows {"input_ids": [...], "loss_mask": [...]} instead.'
        )
    return np.where(document.trained, ids, -ids)
