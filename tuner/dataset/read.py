"""Rows out of data files, in chunks of bounded size, each row with its line number."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tuner.errors import UserError

CHUNK_BYTES = 1 << 18  # enough rows to feed the tokenizer in batches, few enough to stay small
BLOCK_CHARACTERS = 1 << 18
SPACE = " \t\r\n"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """One row of a file: the line it begins on, counted from 1, and its JSON text as UTF-8 bytes."""

    line: int
    content: bytes


class Chunk(NamedTuple):
    """Consecutive rows, and how many bytes of the file (as it lies on disk) were read by then."""

    rows: list[Row]
    position: int


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The rows of a file in order. Raises UserError if it cannot be read as its ending says."""
    reader = READERS[file_kind(path)]
    try:
        with open(path, "rb") as raw, _opened(raw, path) as stream:
            yield from _chunks(reader(stream, path), raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}). Copy or compress it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def file_kind(path: Path) -> str:
    """The key in READERS that a file's ending asks for, .gz aside."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    kind = suffixes[-1].lower() if suffixes else ""
    if kind not in READERS:
        allowed = ", ".join(READERS)
        raise UserError(f"{path}: the ending {kind!r} is not known. Known: {allowed}, also with .gz.")
    return kind


def _opened(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return raw


def _chunks(rows: Iterable[Row], raw: BinaryIO) -> Iterator[Chunk]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.content)
        if size >= CHUNK_BYTES:
            yield Chunk(chunk, raw.tell())
            chunk, size = [], 0
    if chunk:
        yield Chunk(chunk, raw.tell())


def _read_lines(stream: BinaryIO, path: Path) -> Iterator[Row]:
    for line, content in enumerate(stream, start=1):
        if line == 1:
            content = _without_bom(content, path)
        if not content.isspace() and content:
            yield Row(line, content)


def _read_text(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A whole file as one row of the text format."""
    text = _decode(_without_bom(stream.read(), path), path)
    if text.strip():
        yield Row(1, json.dumps({"text": text}, ensure_ascii=False).encode())


def _read_values(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """The items of a JSON array, or JSON values one after another, without holding the whole file."""
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
        self._decode = json.JSONDecoder().raw_decode
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
            try:
                end = self._decode(self._text, self._at)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                if not self._may_be_cut(error) or not self._grow(max(BLOCK_CHARACTERS, len(self._text) - self._at)):
                    raise self._mistake(error) from error
                continue
            if end < len(self._text) or not self._grow(BLOCK_CHARACTERS):
                line = self.line
                return Row(line, self.take(end - self._at).encode())

    def close(self) -> None:
        """Past the end of the array there must be nothing."""
        if self.take(1) != "]":
            raise UserError(f"{self._path}:{self.line}: the array is not closed by ']'. The file may be cut off.")
        if self.skip(SPACE):
            raise UserError(f"{self._path}:{self.line}: text after the end of the array. Expected: one array.")

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

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether more text could mend it: a mistake far from the end of the window must not read the whole file."""
        if not isinstance(error, json.JSONDecodeError):
            return False
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
        raise _not_utf8(path, error) from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    found = error.object[error.start : error.start + 4].hex(" ")
    return UserError(f"{path} is not UTF-8 (found the bytes {found}). Save it as UTF-8.")


def _without_bom(data: bytes, path: Path) -> bytes:
    if data.startswith(UTF16_BOMS):
        raise UserError(f"{path} is UTF-16. Save it as UTF-8.")
    return data.removeprefix(UTF8_BOM)


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_values,
    ".txt": _read_text,
}
