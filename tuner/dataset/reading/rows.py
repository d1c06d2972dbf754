"""What every kind of file gives: rows with the line they begin on, and the mistakes that a file's bytes can hold."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tuner.errors import UserError

MAX_ROW_BYTES = 16 << 20  # tokenising takes about 80 times a row's size in memory: 1.3 GB
QUARANTINED_BYTES = 1 << 16  # what is kept of a row that is too large to hold
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
# how a file begins that is not the text its name says -> what it is, and what to do
SIGNATURES = {
    b"\x1f\x8b": ("compressed with gzip", "Add .gz to its name."),
    b"BZh": ("compressed with bzip2", "Add .bz2 to its name."),
    b"\xfd7zXZ\x00": ("compressed with xz", "Add .xz to its name."),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "Add .zst to its name."),
    b"PAR1": ("a Parquet file", "Name it .parquet."),
    b"ARROW1": ("an Arrow file", "Name it .arrow."),
    b"PK\x03\x04": ("a zip archive or an Excel sheet", "Unpack it, or save the sheet as CSV."),
    b"SQLite format 3": ("an SQLite database", "Export its table as CSV or JSONL."),
    b"\x93NUMPY": ("a numpy array", "Write its rows as JSONL or Parquet."),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "Fetch the data with: git lfs pull"),
    b"<!doctype html": ("a web page, so the download failed", "Download the file itself."),
    b"<html": ("a web page, so the download failed", "Download the file itself."),
}
SIGNATURE_BYTES = 32


class Row(NamedTuple):
    """One row of a file: the line it begins on, counted from 1 (in tables its number), its JSON text as UTF-8 bytes.

    `fault` is what the reader found wrong with it, "" for nothing; such a row costs no other row.
    """

    line: int
    content: bytes
    fault: str = ""


Reader = Callable[[BinaryIO, Path], Iterator[Row]]


def check_signature(head: bytes, path: Path) -> None:
    """Raises UserError if a text file begins like something else."""
    start = head.removeprefix(UTF8_BOM).lstrip()[:SIGNATURE_BYTES].lower()
    for signature, (kind, remedy) in SIGNATURES.items():
        if head.startswith(signature) or start.startswith(signature.lower()):
            raise UserError(f"{path} is {kind}. {remedy}")
    if head.startswith(UTF16_BOMS) or _is_every_other_byte_nul(head[: 2 * SIGNATURE_BYTES]):
        raise UserError(f"{path} is UTF-16 or UTF-32. Save it as UTF-8.")


def _is_every_other_byte_nul(head: bytes) -> bool:
    """Whether this is ASCII in UTF-16 (or UTF-32) without a mark."""
    return any(
        len(head) > 3 and not head[place::2].strip(b"\0") and b"\0" not in head[1 - place :: 4] for place in (0, 1)
    )


def decode(data: bytes, path: Path) -> str:
    """The text of a file, or of a part of it that ends with a whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """What to say of a file that is no text."""
    found = error.object[error.start : error.start + 4].hex(" ")
    return UserError(f"{path} is not UTF-8 (found the bytes {found}). Save it as UTF-8.")


def bounded(row: Row) -> Row:
    """The row itself; one that is too large to hold as the beginning of it, with this for its fault."""
    if len(row.content) <= MAX_ROW_BYTES:
        return row
    return Row(row.line, whole_characters(row.content[:QUARANTINED_BYTES]), too_large(len(row.content)))


def whole_characters(data: bytes) -> bytes:
    """Bytes without the character that their end cuts through."""
    return data.decode(errors="ignore").encode()


def too_large(num_bytes: int) -> str:
    """What to say of a row that no machine should be asked to tokenise at once."""
    return (
        f"{num_bytes:,} bytes or more, over {MAX_ROW_BYTES >> 20} MiB. Cut it into several rows; the file may lack "
        "line ends. Only its beginning is kept."
    )
