"""Tokens as text that can be read: whole characters, with nothing invisible left in them."""

import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
LONGEST_CHARACTER = 4  # bytes of UTF-8
SIGNS = {"\n": "⏎\n", "\t": "⇥", "\x7f": "␡"}
CONTROL_PICTURES = 0x2400  # the sign of control character c stands at this place + c
# Zero-width and formatting characters beside the categories below: Unicode's Default_Ignorable_Code_Point, and the
# empty Braille pattern
IGNORABLE = (
    *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0F)),
    *((0x2065, 0x2065), (0x2800, 0x2800), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF)),
)
INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs")


class Token(NamedTuple):
    """One entry of a vocabulary: the bytes that it stands for, and whether only a template can write it."""

    content: bytes
    special: bool


class Group(NamedTuple):
    """Tokens [start, end) that make up whole characters, most often a single one."""

    start: int
    end: int
    text: str
    special: bool


class Vocabulary:
    """The bytes behind each id of a tokenizer, byte-level or with byte fallback."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._added = self._backend.get_added_tokens_decoder()
        decoder = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder is not None else {}
        steps = [decoder, *decoder.get("decoders", [])]
        self._is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        self._has_bytes = any(step.get("type") == "ByteFallback" for step in steps)
        self._replaced = dict(filter(None, map(_replacement, steps)))
        self._known: dict[int, Token] = {}

    def __getitem__(self, index: int) -> Token:
        """The token of an id; an id that the tokenizer does not have is special, and says so."""
        if index not in self._known:
            self._known[index] = self._look_up(index)
        return self._known[index]

    def _look_up(self, index: int) -> Token:
        if index in self._added:
            content = self._added[index].content
            return Token(content.encode(), special=not content.isspace())
        piece = self._backend.id_to_token(index)
        if piece is None:
            return Token(f"<no token {index}>".encode(), special=True)
        if self._is_byte_level:
            return Token(bytes(map(BYTE_OF.__getitem__, piece)), special=False)
        if self._has_bytes and (match := BYTE.fullmatch(piece)):
            return Token(bytes.fromhex(match[1]), special=False)
        for pattern, text in self._replaced.items():
            piece = piece.replace(pattern, text)
        return Token(piece.encode(), special=False)


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    """What a step of a decoder puts in the place of which text."""
    if step.get("type") == "Metaspace":
        return step["replacement"], " "
    if step.get("type") == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 is itself, the others stand from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()


def groups(ids: Sequence[int], vocabulary: Vocabulary, breaks: Collection[int] = ()) -> Iterator[Group]:
    """The tokens, those that share a character together; none reaches over a place in `breaks`.

    Bytes that are no character, or that a break tears from theirs, are shown in hexadecimal.
    """
    start = 0
    while start < len(ids):
        content, special = vocabulary[ids[start]]
        end = start + 1
        while not special and end < len(ids) and end not in breaks and _is_begun(content):
            following = vocabulary[ids[end]]
            if following.special or not _continues(following.content):
                break
            content, end = content + following.content, end + 1
        yield Group(start, end, visible(content.decode("utf-8", "surrogateescape")), special)
        start = end


def _is_begun(content: bytes) -> bool:
    """Whether the bytes end inside a character."""
    for length in range(1, min(LONGEST_CHARACTER, len(content) + 1)):
        first = content[-length]
        if first >= 0xC0:
            return length < (2 if first < 0xE0 else 3 if first < 0xF0 else 4)
        if first < 0x80:
            return False
    return False


def _continues(content: bytes) -> bool:
    return 0x80 <= content[0] < 0xC0 if content else True


def visible(text: str) -> str:
    """The text with a sign for every character that would not be seen, or that would turn its surroundings about."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in SIGNS:
        return SIGNS[character]
    if code < 0x20:
        return chr(CONTROL_PICTURES + code)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"⟨{code - 0xDC00:02X}⟩"
    hidden = unicodedata.category(character) in INVISIBLE or any(low <= code <= high for low, high in IGNORABLE)
    return f"⟨U+{code:04X}⟩" if hidden and character != " " else character
