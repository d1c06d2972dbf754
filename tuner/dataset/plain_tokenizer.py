"""The part of a BPE tokenizer that reads plain text: small tables to keep and to send, and built without JSON text."""

import ctypes
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models

MERGES = b',"merges":['  # no piece of the vocabulary looks like this: its value would be a number
STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
PAIRS = re.compile(rb"(?:\[%s,%s\],?){1,4096}" % (STRING, STRING))  # some merges: all at once take 30 MB to be read


@dataclass(frozen=True)
class PlainTokenizer:
    """A tokenizer without its marks: ordinary text is encoded alike, a mark as the letters it is.

    Entries and merges that would lead to a mark are gone, too. Runs of white space that a tokenizer has among its added
    tokens stay: they are mere vocabulary. For 92,000 pieces this pickles to 2 MB, and building takes 50 MB for a moment
    where the library's own JSON takes 110.
    """

    frame: dict[str, Any]  # the tokenizer's JSON without model and added tokens
    added: list[dict[str, Any]]
    model: dict[str, Any]  # what models.BPE takes beside vocabulary and merges
    pieces: list[str]
    ids: NDArray[np.int32]  # (pieces,)
    merges: NDArray[np.int32]  # (merges, 2): which two of `pieces`, first to last

    @classmethod
    def from_state(cls, state: bytes) -> "PlainTokenizer":
        """`state` is the library's JSON of a whole tokenizer, as it pickles itself; model and merges come last."""
        give_back()  # what loading the whole tokenizer has freed
        before, _, after = state.partition(MERGES)
        source = json.loads(before + b"}}")
        model = source.pop("model")
        vocab = model.pop("vocab")
        kept = [token for token in source["added_tokens"] if is_vocabulary(token)]
        marks = {token["content"] for token in source["added_tokens"] if not is_vocabulary(token)}
        lost = marks - {model["unk_token"]}  # that one stays for what the vocabulary cannot write; no merge leads to it
        for piece in lost:
            vocab.pop(piece, None)
        vocab |= {token["content"]: token["id"] for token in kept}  # otherwise they would be numbered anew
        return cls(
            frame={**source, "post_processor": None, "truncation": None, "padding": None, "added_tokens": []},
            added=kept,
            model={name: value for name, value in model.items() if name != "type" and value is not None},
            pieces=list(vocab),
            ids=np.fromiter(vocab.values(), np.int32, len(vocab)),
            merges=_read_merges(after, list(vocab), marks),
        )

    def build(self) -> Tokenizer:
        """The tokenizer; what it took to build it is given back to the system."""
        tokenizer = Tokenizer.from_str(json.dumps({**self.frame, "model": {"type": "BPE", "vocab": {}, "merges": []}}))
        merges = list(zip(*(map(self.pieces.__getitem__, places) for places in self.merges.T.tolist())))
        whole = self.frame["pre_tokenizer"] is None  # texts come to the model whole: to remember them takes 36 MB
        cache = {"cache_capacity": 0} if whole else {}
        tokenizer.model = models.BPE(dict(zip(self.pieces, self.ids.tolist())), merges, **self.model, **cache)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        tokenizer.add_tokens(
            [AddedToken(token["content"], **{flag: token[flag] for flag in flags}) for token in self.added]
        )
        del merges
        give_back()
        return tokenizer


def _read_merges(text: bytes, pieces: list[str], marks: set[str]) -> NDArray[np.int32]:
    """Pairs of places in `pieces`, without those that have a mark or lead to one."""
    places = dict(zip(pieces, range(len(pieces)))) | dict.fromkeys(marks, -1)
    found, num_read = [np.empty((0, 2), np.int32)], 0
    for match in PAIRS.finditer(text):
        words = list(chain.from_iterable(json.loads(b"[" + match[0].rstrip(b",") + b"]")))
        leads = np.fromiter(map(marks.__contains__, map(add, words[::2], words[1::2])), np.bool_)
        merges = np.fromiter(map(places.__getitem__, words), np.int32).reshape(-1, 2)
        found.append(merges[~leads & (merges >= 0).all(1)])
        num_read += len(match[0])
    assert num_read == len(text.removesuffix(b"]}}")), "merges are written in another form than pairs of strings"
    return np.concatenate(found)


def is_vocabulary(token: Mapping[str, Any]) -> bool:
    """Whether an added token is ordinary text: some tokenizers keep their runs of white space among the added ones."""
    return not token["special"] and token["content"].isspace()


def give_back() -> None:
    """Return freed memory to the system: glibc would keep what a tokenizer's making has freed, 60 MB, for ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
