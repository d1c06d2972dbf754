"""Rows of a JSON file: the items of one array, or values one after another, without holding the whole file."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tuner.dataset.reading import rows
from tuner.dataset.reading.rows import QUARANTINED_BYTES, Row, too_large, whole_characters
from tuner.dataset.reading.strict_json import end_of_value
from tuner.errors import UserError

BLOCK_CHARACTERS = 1 << 18
SPACE = " \t\r\n"
STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


class _TooLargeError(Exception):
    """The value that begins here is not to be held."""


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
        # bytes that are no UTF-8 stay recognisable, so that they cost their row only
        self._characters = codecs.getincrementaldecoder("utf-8")("surrogateescape")
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
        """The next JSON value; the window doubles until it holds all of it, or finds it too large."""
        line = self.line
        try:
            while True:
                end = self._end()
                if end is not None and (end < len(self._text) or not self._grow(BLOCK_CHARACTERS)):
                    return Row(line, _bytes(self.take(end - self._at)))
        except _TooLargeError:
            kept = whole_characters(_bytes(self._text[self._at : self._at + QUARANTINED_BYTES]))
            return Row(line, kept, too_large(self._pass(line)))

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
            raise _TooLargeError
        return self._grow(max(BLOCK_CHARACTERS, held))

    def _pass(self, line: int) -> int:
        """Go past the value that begins at `line`, block by block; how many bytes that was."""
        size = depth = 0
        quoted = False
        while True:
            whole = len(self._text)
            if self._text.endswith("\\"):  # what it escapes is in the next block
                whole = len(self._text.rstrip("\\")) + (len(self._text) - len(self._text.rstrip("\\"))) // 2 * 2
            for mark in STRUCTURE.finditer(self._text, self._at, whole):
                sign = mark.group()
                quoted ^= sign == '"'
                depth += 0 if quoted else {"[": 1, "{": 1, "]": -1, "}": -1}.get(sign, 0)
                if depth == 0 and not quoted:
                    return size + len(_bytes(self.take(mark.end() - self._at)))
            size += len(_bytes(self.take(whole - self._at)))
            if not self._grow(BLOCK_CHARACTERS):
                raise UserError(
                    f"{self._path}:{line}: a value of over {rows.MAX_ROW_BYTES >> 20} MiB begins here, and the file "
                    "ends before it does. A quote or bracket may be missing, or the end of the file."
                )

    def _grow(self, size: int) -> bool:
        if self._ended:
            return False
        block = self._stream.read(size)
        self._ended = not block
        text = self._characters.decode(block, final=self._ended)
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


def _bytes(text: str) -> bytes:
    """Text as it lay in the file, what was no UTF-8 included."""
    return text.encode(errors="surrogateescape")
