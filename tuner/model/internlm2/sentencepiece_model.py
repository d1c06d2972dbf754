"""Reads a sentencepiece `tokenizer.model` without protobuf and without the sentencepiece package."""

import struct
from typing import Literal, NamedTuple

from tuner.errors import UserError

Kind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]

# Enumerations and field numbers of sentencepiece_model.proto (github.com/google/sentencepiece).
KINDS: dict[int, Kind] = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """One vocabulary entry; its id is its position."""

    text: str
    score: float
    kind: Kind


class SentencePieceModel(NamedTuple):
    """What of a model file decides its ids."""

    pieces: list[Piece]
    model_type: str
    byte_fallback: bool
    normalizer: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool


def parse(data: bytes) -> SentencePieceModel:
    """The model in `data`, the bytes of a `tokenizer.model`; UserError when they are something else."""
    if data.startswith(b"version https://git-lfs"):
        raise UserError("tokenizer.model is a Git LFS pointer, not the file itself. Run: git lfs pull")
    try:
        return _model(data)
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise UserError(
            f"tokenizer.model ({len(data):,} bytes) is not a sentencepiece model or is cut short ({error}). "
            "Download it again."
        ) from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    # The defaults are those of the .proto: protobuf leaves out fields that hold them.
    return SentencePieceModel(
        pieces=pieces,
        model_type=MODEL_TYPES[_as_int(trainer.get(3, 1))],
        byte_fallback=bool(trainer.get(35, 0)),
        normalizer=_as_bytes(normalizer.get(1, b"")).decode(),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, b"\0\0\0\0")))
    return Piece(_as_bytes(fields[1]).decode(), score, KINDS[_as_int(fields.get(3, 1))])


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: an int for a varint, the raw bytes for every other wire type."""
    found: list[tuple[int, int | bytes]] = []
    position, end = 0, len(data)
    while position < end:
        # Most numbers fit in one byte, and there are half a million: calling a function for each doubles the time.
        tag, position = (data[position], position + 1) if data[position] < 128 else _varint(data, position)
        wire = tag & 7
        if wire == VARINT:
            number, position = _varint(data, position)
            found.append((tag >> 3, number))
            continue
        if wire == BYTES:
            size, position = (data[position], position + 1) if data[position] < 128 else _varint(data, position)
        else:
            size = {FIXED64: 8, FIXED32: 4}[wire]
        if position + size > end:
            raise ValueError(f"field at byte {position} runs past the end")
        found.append((tag >> 3, data[position : position + size]))
        position += size
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The base-128 number at `position` and the position after it."""
    byte = data[position]
    number, shift = byte & 127, 7
    while byte >= 128:
        position += 1
        byte = data[position]
        number |= (byte & 127) << shift
        shift += 7
    return number, position + 1


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value
