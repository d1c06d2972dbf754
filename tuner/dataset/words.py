"""Plain text to ids, cut where no merge of a BPE tokenizer reaches across: each word is encoded once and remembered."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tuner.dataset.plain_tokenizer import PlainTokenizer

ID = np.dtype(np.uint32)
NUM_CODE_POINTS = 0x110000
BLOCK = 1 << 16  # characters that are cut at once: the arrays of more would not stay in the processor's cache
BORDER = "\0"
MAX_WORDS = 1 << 15  # to remember; with their ids they take about 6 MB
LONGEST_WORD = 32  # characters; longer ones hardly come twice
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

TextEncoder = Callable[[Sequence[str]], list[bytes]]  # texts -> the ids of each, as the bytes of uint32


def text_encoder(tables: PlainTokenizer) -> TextEncoder:
    """The fastest way to the ids that this tokenizer gives."""
    tokenizer = tables.build()
    return CutEncoder(tokenizer, tables) if can_cut(tables) else WholeEncoder(tokenizer)


class WholeEncoder:
    """Each text as a whole through the library, which knows the words of those tokenizers that have some."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, ID).tobytes() for encoding in encodings]


class CutEncoder:
    """The same ids, several times as fast where a tokenizer reads its texts whole, as sentencepiece's do.

    BPE makes two characters neighbours inside a piece only where it joins the last character of one part to the first
    of the next. Between two characters that none of its merges joins in this way a text can be cut: neither side ever
    sees the other. What is left are short words, most of which have come before.
    """

    def __init__(self, tokenizer: Tokenizer, tables: PlainTokenizer) -> None:
        """`tokenizer` must be the one that `tables` describes, and `can_cut(tables)` hold."""
        self._whole = WholeEncoder(tokenizer)
        (border,) = self._whole([BORDER])
        self._border = np.frombuffer(border, ID)[0]
        self._known: dict[str, bytes] = {}
        joined = _neighbours(tables)
        characters = sorted({character for pair in joined for character in pair})
        numbers = dict(zip(characters, range(1, len(characters) + 1)))
        self._num_classes = len(numbers) + 1
        self._classes = np.zeros(NUM_CODE_POINTS, np.uint32)  # of each character; 0 for those that no merge joins
        self._classes[list(map(ord, characters))] = range(1, self._num_classes)
        if replaced := _replaced(tables):
            before, after = replaced
            self._classes[ord(before)] = numbers.get(after, 0)
        joins = np.zeros(self._num_classes**2, np.bool_)
        joins[[numbers[left] * self._num_classes + numbers[right] for left, right in joined]] = True
        self._joins = np.packbits(joins, bitorder="little")

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        found: list[bytes] = []
        for first, last in _blocks(texts):
            block = texts[first:last]
            found += self._whole(block) if any(BORDER in text for text in block) else self._encode(block)
        return found

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        words, edges = self._cut(texts)
        missing = list(set(words).difference(self._known))
        self._known.update(zip(missing, self._read(missing)))
        ids = list(map(self._known.__getitem__, words))
        for word in missing:
            if len(word) > LONGEST_WORD:
                del self._known[word]
        if len(self._known) > MAX_WORDS:
            self._known.clear()
        return [b"".join(ids[start:end]) for start, end in pairwise(edges)]

    def _cut(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """The words of all texts, and (texts + 1,) where among them each text begins."""
        points = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
        classes = self._classes[points]
        pairs = classes[:-1] * np.uint32(self._num_classes) + classes[1:]
        is_start = np.ones(len(points) + 1, np.bool_)
        is_start[1:-1] = (self._joins[pairs >> 3] >> (pairs & 7).astype(np.uint8)) & 1 == 0
        borders = np.cumsum([0, *map(len, texts)])
        is_start[borders] = True
        starts = np.flatnonzero(is_start[:-1])
        words = np.insert(points, starts[1:], ord(BORDER)).tobytes().decode("utf-32-le").split(BORDER)
        return words, np.searchsorted(starts, borders).tolist()

    def _read(self, words: Sequence[str]) -> list[bytes]:
        """The ids of words, as one text with borders in between: each text costs the library as much as ten words."""
        (data,) = self._whole([BORDER.join([*words, ""])])
        ends = np.flatnonzero(np.frombuffer(data, ID) == self._border) * ID.itemsize
        assert len(ends) == len(words), "a border between words became another id"
        starts = [0, *(ends + ID.itemsize).tolist()]
        return list(map(data.__getitem__, map(slice, starts, ends.tolist())))


def can_cut(tables: PlainTokenizer) -> bool:
    """Whether this tokenizer is its merges alone: nothing else in it looks at more than one character of a text."""
    model: dict[str, Any] = tables.model
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    plain = not any(model.get(name) for name in others)
    whole = tables.frame["pre_tokenizer"] is None and not tables.added
    one_for_one = tables.frame["normalizer"] is None or _replaced(tables) is not None
    # what the vocabulary cannot write becomes bytes, character by character, and no merge takes those up again
    parts = {tables.pieces[place] for place in np.unique(tables.merges).tolist()}
    every_byte = model.get("byte_fallback", False) and BYTE_PIECES.issubset(tables.pieces) and not BYTE_PIECES & parts
    return plain and whole and one_for_one and every_byte and BORDER not in {part for part in parts if len(part) == 1}


def _neighbours(tables: PlainTokenizer) -> set[tuple[str, str]]:
    """The characters that some merge puts side by side."""
    lefts, rights = tables.merges.T.tolist()
    return {(tables.pieces[left][-1], tables.pieces[right][0]) for left, right in zip(lefts, rights)}


def _replaced(tables: PlainTokenizer) -> tuple[str, str] | None:
    """The character that the normalizer puts another one for, and that other; None where it does anything else."""
    normalizer = tables.frame["normalizer"] or {}
    before, after = normalizer.get("pattern", {}).get("String", ""), normalizer.get("content", "")
    is_one_for_one = normalizer.get("type") == "Replace" and len(before) == len(after) == 1
    return (before, after) if is_one_for_one else None


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of texts that have about BLOCK characters together."""
    first = size = 0
    for last, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BLOCK or last == len(texts):
            yield first, last
            first, size = last, 0
