"""Rows of a JSON file: the items of one array, or values one after another, without holding the whole file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.rows import Row, not_utf8
from tuner.dataset.reading.strict_json import end_of_value
from tuner.errors import UserError

BLOCK_CHARACTERS = 1 << 18
SPACE = " \t\r\n"


def read_values(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A row for each value, with the line it begins on."""
    window = _Window(stream, path)
    closing = "" if window.skip(SPACE) != "[" else "]"
    if closing:
        window.take(1)
    while (first := window.skip(SPACE + ",")) not in ("", closing):
        if first == "]":
            raise UserError(f"{path}:{window.line}: ']' closes nothing here. Expected: an array of JSON objects.")
        yield window.value()
    if closing:
        window.close()


class _Window:
    """A piece of the text of a stream, which grows until the next JSON value is whole."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        # only where a value ends is asked here, so numbers stay as they are written
        self._decode = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).raw_decode
        self._tail = b""  # bytes of a character that the last block cut through
        self._text, self._at, self._ended = "", 0, False
        self.line = 1
        self._grow(BLOCK_CHARACTERS)
        self._text = self._text.removeprefix("\ufeff")

    def skip(self, characters: str) -> str:
        """The next character that is none of `characters`, or "" at the end."""
        while True:
            rest = self._text[self._at : self._at + 256]
            if (stripped := rest.lstrip(characters)) or not rest:
                self.take(len(rest) - len(stripped))
                if stripped or not self._grow(BLOCK_CHARACTERS):
                    return stripped[:1]
            else:
                self.take(len(rest))

    def take(self, number: int) -> str:
        """The next characters, counting lines."""
        taken = self._text[self._at : self._at + number]
        self.line += taken.count("\n")
        self._at += number
        return taken

    def value(self) -> Row:
        """The next JSON value; the window doubles until it holds all of it."""
        while True:
            end = self._end()
            if end is not None and (end < len(self._text) or not self._grow(BLOCK_CHARACTERS)):
                line = self.line
                return Row(line, self.take(end - self._at).encode())

    def close(self) -> None:
        """Past the end of the array there must be nothing."""
        if self.take(1) != "]":
            raise UserError(f"{self._path}:{self.line}: the array is not closed by ']'. The file may be cut off.")
        if self.skip(SPACE):
            raise UserError(f"{self._path}:{self.line}: text after the end of the array. Expected: one array.")

    def _end(self) -> int | None:
        """Where the next value ends; None if the window has grown, so that it is worth asking again."""
        try:
            return self._decode(self._text, self._at)[1]
        except json.JSONDecodeError as error:
            if not self._may_be_cut(error) or not self._double():
                raise self._mistake(error) from error
        except RecursionError as error:
            if end := end_of_value(self._text, self._at):
                return end
            if not self._double():
                raise self._mistake(error) from error
        return None

    def _double(self) -> bool:
        held = len(self._text) - self._at
        if held > rows.MAX_ROW_BYTES:
            raise UserError(
                f"{self._path}:{self.line}: a value of over {rows.MAX_ROW_BYTES >> 20} MiB begins here. "
                "Expected: an array of rows, each of them smaller. A quote or bracket may be missing."
            )
        return self._grow(max(BLOCK_CHARACTERS, held))

    def _grow(self, size: int) -> bool:
        if self._ended:
            return False
        block = self._stream.read(size)
        self._ended = not block
        data = self._tail + block
        text, used = _decode_block(data, self._path, final=self._ended)
        self._tail = data[used:]
        self._text, self._at = self._text[self._at :] + text, 0
        return True

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend it: a mistake far from the end of the window must not read the whole file."""
        return error.msg.startswith("Unterminated string") or error.pos + 16 >= len(self._text)

    def _mistake(self, error: Exception) -> UserError:
        if isinstance(error, json.JSONDecodeError):
            line = self.line + self._text.count("\n", self._at, error.pos)
            return UserError(f"{self._path}:{line}: not JSON: {error.msg}. Expected: an array of JSON objects.")
        return UserError(f"{self._path}:{self.line}: nested too deeply. Expected: an array of JSON objects.")


def _decode_block(data: bytes, path: Path, *, final: bool) -> tuple[str, int]:
    """Text of the whole characters in `data`, and how many bytes they take."""
    try:
        return data.decode(), len(data)
    except UnicodeDecodeError as error:
        if not final and error.start >= len(data) - 3:
            return data[: error.start].decode(), error.start
        raise not_utf8(path, error) from error
