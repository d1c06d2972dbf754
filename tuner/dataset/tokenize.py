"""Segments to token ids, in bulk, such that user text can never become a special token."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from tuner.dataset.chat_template import Segment
from tuner.dataset.plain_tokenizer import PlainTokenizer, is_vocabulary
from tuner.dataset.prefix import Prefix, find_prefix
from tuner.dataset.templates import ChatTemplate, mark_pattern
from tuner.dataset.words import ID, TextEncoder, text_encoder
from tuner.errors import UserError

CODE_VERSION = 2  # raise it when the same rows, tokenizer and template give other tokens than before


class Document(NamedTuple):
    """Token ids (tokens,) uint32 and whether each is trained (tokens,) bool.

    `weights` (tokens,) float32 is what each trained token weighs in the loss, None where all of them weigh 1; `borders`
    are places in it, in tokens, where it is best cut.
    """

    ids: np.ndarray
    trained: np.ndarray
    weights: np.ndarray | None = None
    borders: tuple[int, ...] = ()


class Fingerprint(NamedTuple):
    """sha256 of a tokenizer, and of a chat template."""

    tokenizer: str
    template: str


class FastTokenizer(Protocol):
    """What the encoder needs of a Hugging Face tokenizer."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def name_or_path(self) -> str: ...


class Encoder:
    """Segments to documents for one tokenizer and one chat template; light to pickle, for worker processes."""

    def __init__(
        self,
        source: bytes | PlainTokenizer,
        template: ChatTemplate,
        *,
        special_ids: dict[str, int],
        fingerprint: Fingerprint,
        prefix: Prefix | None = None,
    ) -> None:
        """`source`: the tokenizer's state, which is read when first needed, or what was read from it.

        A warm start needs only the fingerprint. `prefix`: the space that the tokenizer puts before texts.
        """
        self._prefix = prefix
        self._source = source
        self._template = template
        self._special_ids = special_ids
        self._special_bytes = {text: np.array([number], ID).tobytes() for text, number in special_ids.items()}
        self.fingerprint = fingerprint
        """everything that the tokens of a row depend on"""
        self._is_special = np.zeros(max(special_ids.values(), default=0) + 2, dtype=bool)
        self._is_special[list(special_ids.values())] = True
        marks = [mark for mark in template.special_tokens if mark in special_ids]
        self._marks = mark_pattern(tuple(marks))
        self._written: dict[
            Segment, tuple[tuple[Segment, ...], bool]
        ] = {}  # the template writes the same few texts again and again

    @classmethod
    def from_tokenizer(cls, tokenizer: FastTokenizer, template: ChatTemplate) -> "Encoder":
        """Raises UserError where the tokenizer lacks a mark of the template, or cannot encode piece by piece."""
        backend = tokenizer.backend_tokenizer
        state = backend.__getstate__()  # the JSON of `to_str` as UTF-8, a fifth of that text's size in memory
        # the model is nine tenths of the state and comes last; inside JSON strings the quotes would be escaped
        settings = json.loads(state.partition(b',"model":')[0] + b"}")
        name = tokenizer.name_or_path or "given"
        prefix = find_prefix(settings)
        _check_supported({**settings, **(prefix.parts if prefix else {})}, type(backend.model).__name__, name)
        special_ids = {token["content"]: token["id"] for token in settings["added_tokens"] if not is_vocabulary(token)}
        special_ids.pop(backend.model.unk_token, None)  # honest text may hold what the vocabulary cannot write
        missing = [mark for mark in template.special_tokens if mark not in {*special_ids, *template.optional_tokens}]
        if missing:
            raise UserError(
                f"The tokenizer {name!r} has no special token {', '.join(missing)}, which chat_template"
                f" {template.name!r} needs. Choose the template of this model's family, or add the tokens to the"
                " tokenizer and resize the model's embedding."
            )
        parts = [dataclasses.asdict(template), type(template.tools).__name__]
        fingerprint = Fingerprint(_digest(b"%d" % CODE_VERSION + state), _digest(json.dumps(parts).encode()))
        return cls(state, template, special_ids=special_ids, fingerprint=fingerprint, prefix=prefix)

    def __reduce__(self) -> tuple:
        return _rebuild, (self._tables(), self._template, self._special_ids, self.fingerprint, self._prefix)

    def _tables(self) -> PlainTokenizer:
        if isinstance(self._source, bytes):
            tables = PlainTokenizer.from_state(self._source)
            parts = self._prefix.parts if self._prefix else {}
            self._source = dataclasses.replace(tables, frame={**tables.frame, **parts})
        return self._source

    @cached_property
    def _encode_plain(self) -> TextEncoder:
        return text_encoder(self._tables())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that can come out."""
        return max(len(self._is_special) - 1, 1 + int(self._tables().ids.max()))

    def encode(self, samples: Sequence[Sequence[Segment]]) -> list[Document]:
        """Each sample's segments, one after the other, to one document; the samples' plain texts go in one batch."""
        samples = [self._joined(sample) for sample in samples]
        segments = list(chain.from_iterable(samples))
        texts = list(dict.fromkeys(segment.text for segment in segments if not segment.special))
        plain = dict(zip(texts, self._encode_plain(texts)))
        parts = [self._special_bytes[part.text] if part.special else plain[part.text] for part in segments]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)) // ID.itemsize
        ids = np.frombuffer(b"".join(parts), ID)
        trained = np.repeat(np.array([segment.trained for segment in segments], dtype=bool), lengths)
        special = np.repeat(np.array([segment.special for segment in segments], dtype=bool), lengths)
        # ids behind the end of the table are ordinary: they are clipped to its last entry, which is False
        assert not self._is_special.take(ids[~special], mode="clip").any(), "plain text became a special token"
        ends = np.concatenate([[0], lengths.cumsum()])  # of segments, in tokens
        edges = [int(ends[num_segments]) for num_segments in accumulate(map(len, samples), initial=0)]
        documents = [Document(ids[start:end], trained[start:end]) for start, end in pairwise(edges)]
        opened = [int(ends[place]) for place, segment in enumerate(segments) if segment.opens_part]
        if opened:
            owned = np.searchsorted(opened, edges)
            documents = [
                document._replace(borders=tuple(place - edge for place in opened[first:last]))
                for document, edge, (first, last) in zip(documents, edges, pairwise(owned))
            ]
        weights = np.array([segment.weight for segment in segments], np.float32)
        if (weights == 1).all():
            return documents
        spread = weights.repeat(lengths)
        slices = [spread[start:end] for start, end in pairwise(edges)]
        return [d._replace(weights=None if (w == 1).all() else w) for d, w in zip(documents, slices)]

    def _joined(self, segments: Sequence[Segment]) -> list[Segment]:
        """Marks one by one, and between them the longest texts: so a tokenizer reads the conversation as a whole, too.

        Two texts stay apart where one is trained and the other is not, and behind the header of the model's turn, where
        generation begins: there the ids are those of the prompt and what is generated, not of the text as a whole.
        """
        joined: list[Segment] = []
        is_open = False  # whether a text would go on from the one before it
        for segment in segments:
            pieces, stays_open = self._pieces(segment) if segment.special else ((segment,), True)
            if is_open and pieces and _go_together(joined[-1], pieces[0]):
                joined[-1] = pieces[0]._replace(text=joined[-1].text + pieces[0].text)
                pieces = pieces[1:]
            joined += pieces
            is_open = stays_open
        return self._prefix.put(joined) if self._prefix else joined

    def _pieces(self, segment: Segment) -> tuple[tuple[Segment, ...], bool]:
        """A text of the template, cut at its marks, and whether what follows it may go on from its last piece."""
        if segment not in self._written:
            texts = [text for text in self._marks.split(segment.text) if text]
            pieces = [segment._replace(text=text, special=text in self._special_ids) for text in texts]
            stays_open = bool(pieces) and not pieces[-1].special and not segment.text.endswith(self._template.prompt)
            self._written[segment] = tuple(pieces), stays_open
        return self._written[segment]


def _go_together(before: Segment, now: Segment) -> bool:
    alike = before.trained == now.trained and before.weight == now.weight
    return alike and not now.special and not now.opens_part


def special_tokens(tokenizer: FastTokenizer) -> dict[str, bool]:
    """The texts that are one id wherever a template writes them, and whether the tokenizer calls them special."""
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    tokens = {token.content: token.special for token in added if token.special or not token.content.isspace()}
    tokens.pop(backend.model.unk_token, None)
    return tokens


def _rebuild(
    source: PlainTokenizer,
    template: ChatTemplate,
    special_ids: dict[str, int],
    fingerprint: Fingerprint,
    prefix: Prefix | None,
) -> Encoder:
    return Encoder(source, template, special_ids=special_ids, fingerprint=fingerprint, prefix=prefix)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_supported(settings: Mapping[str, Any], kind: str, name: str) -> None:
    if kind != "BPE":
        raise UserError(
            f"The tokenizer {name!r} is of type {kind}; only BPE tokenizers (InternLM, Llama 3, Qwen, ...) can"
            " be kept from reading special tokens in user text. Choose a model with a BPE tokenizer."
        )
    steps = [settings["normalizer"] or {}, settings["pre_tokenizer"] or {}]
    steps += [inner for step in list(steps) for key in ("normalizers", "pretokenizers") for inner in step.get(key, [])]
    prefix = [
        step["type"]
        for step in steps
        if step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step["prepend_scheme"] != "never")
        or (step.get("type") == "ByteLevel" and step["add_prefix_space"])
    ]
    if prefix:
        raise UserError(
            f"The tokenizer {name!r} puts a space before every text ({', '.join(prefix)}) in a form other than Llama"
            " 2's, so a conversation encoded piece by piece would get spaces that nobody wrote. Choose a model whose"
            " tokenizer does not (InternLM2, Llama 3 or Qwen)."
        )
