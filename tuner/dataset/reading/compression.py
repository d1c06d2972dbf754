"""Compressed files as streams; whatever is cut off, corrupt or appended in them raises instead of passing unseen."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tuner.errors import UserError

COMPRESSED_AT_A_TIME = 1 << 16  # bytes
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class _Inflated(io.RawIOBase):
    """The content of a bzip2 or xz file of one or several streams.

    Python's own classes take whatever follows the last whole stream for padding, and so lose it in silence.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._decompressor = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the next piece goes; 0 at the end of the file. Raises EOFError if it is cut off."""
        while True:
            if self._decompressor.eof and not self._next_stream():
                return 0
            needed = self._decompressor.needs_input
            block = self._raw.read(COMPRESSED_AT_A_TIME) if needed else b""
            if needed and not block:
                raise EOFError("it ends before its end mark")
            try:
                data = self._decompressor.decompress(block, len(buffer))
            except OSError as error:  # bz2's, which has no number
                raise EOFError(str(error)) from error
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _next_stream(self) -> bool:
        """Begin the stream that follows; whether there is one. NULs between streams are padding."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            block = self._raw.read(COMPRESSED_AT_A_TIME)
            if not block:
                return False
            rest = block.lstrip(b"\0")
        self._decompressor = self._new()
        self._raw.seek(-len(rest), io.SEEK_CUR)
        return True


def _gzip(raw: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=raw)


def _bzip2(raw: BinaryIO) -> Any:
    return io.BufferedReader(_Inflated(raw, bz2.BZ2Decompressor))


def _xz(raw: BinaryIO) -> Any:
    return io.BufferedReader(_Inflated(raw, lzma.LZMADecompressor))


def _zstd(raw: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("Reading .zst files needs pyarrow: pip install tuner[data]") from error
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {".gz": _gzip, ".bz2": _bzip2, ".xz": _xz, ".zst": _zstd}
NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", "": "readable"}


def ending(path: Path) -> str:
    """The ending that says how a file is compressed, '' if it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def opened(raw: BinaryIO, path: Path) -> Any:
    """The stream of a file's content: itself where it is not compressed."""
    how = COMPRESSIONS.get(ending(path))
    return how(raw) if how else raw
