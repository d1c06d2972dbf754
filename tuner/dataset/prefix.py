"""The space that tokenizers like Llama 2's put before a text: told apart from it, and put where it would be."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tuner.dataset.chat_template import Segment
from tuner.dataset.plain_tokenizer import is_vocabulary

SPACE = "▁"  # how sentencepiece writes one
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


class Prefix(NamedTuple):
    """Where a tokenizer puts a space before a text, and the parts of it that are the same without."""

    at_start_only: bool
    """not behind special tokens, but where a document begins"""
    always: bool
    """also before a text that begins with a space"""
    parts: dict[str, Any]
    """`normalizer` and `pre_tokenizer` of the tokenizer that puts none"""

    def put(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments of a document, as `Encoder` joins them, with the spaces that the tokenizer puts there."""
        found = []
        for place, segment in enumerate(segments):
            begins = place == 0 or (segments[place - 1].special and not self.at_start_only)
            wanted = self.always or not segment.text.startswith((" ", SPACE))
            put = begins and wanted and not segment.special and bool(segment.text)
            found.append(segment._replace(text=" " + segment.text) if put else segment)
        return found


def find_prefix(settings: Mapping[str, Any]) -> Prefix | None:
    """The space that a tokenizer of this JSON puts before texts, if it is known exactly where.

    Known are two forms of sentencepiece's `add_dummy_prefix`: the normalizer that puts it before each part between two
    special tokens ("legacy"), and the pre-tokenizer that does so unless there is a space, or only at the very start.
    Special tokens that take white space beside them, or are looked for after the space has come, are left alone.
    """
    if any(is_vocabulary(token) or _is_odd(token) for token in settings["added_tokens"]):
        return None
    normalizer, pre_tokenizer = settings["normalizer"], settings["pre_tokenizer"]
    if pre_tokenizer is None and normalizer == {"type": "Sequence", "normalizers": [PREPEND, TO_SPACE]}:
        return Prefix(at_start_only=False, always=True, parts={"normalizer": TO_SPACE})
    kind = pre_tokenizer or {}
    if normalizer is not None or kind.get("type") != "Metaspace" or kind["replacement"] != SPACE:
        return None
    whole = {"normalizer": TO_SPACE, "pre_tokenizer": None}
    words = {"pre_tokenizer": {**kind, "prepend_scheme": "never"}}
    scheme = kind["prepend_scheme"]
    return Prefix(scheme == "first", False, words if kind["split"] else whole) if scheme != "never" else None


def _is_odd(token: Mapping[str, Any]) -> bool:
    return any(token[flag] for flag in ("lstrip", "rstrip", "single_word", "normalized"))
