"""Samples to documents of any length, as a Rendering says: their calls arranged, their words marked and encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tuner.dataset.chat_template import ChatTemplate, Segment, render
from tuner.dataset.given_ids import given_document
from tuner.dataset.jinja_template import resolve_template
from tuner.dataset.messages import PARALLEL_TOOL_CALLS, Sample
from tuner.dataset.rendering import Rendering
from tuner.dataset.tokenize import Document, Encoder


@dataclass(frozen=True)
class SampleEncoder:
    """One tokenizer, one template and what is trained; light to pickle, for worker processes."""

    encoder: Encoder
    template: ChatTemplate
    rendering: Rendering

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, rendering: Rendering) -> "SampleEncoder":
        """Raises UserError for a template that is unknown or that the tokenizer lacks a mark of."""
        template = resolve_template(rendering.chat_template, tokenizer)
        return cls(Encoder.from_tokenizer(tokenizer, template), template, rendering)

    def segments(self, sample: Sample) -> list[Segment] | Document:
        """What `encode` takes; a sample that brings its ids is a document already. Raises UserError for a bad one."""
        if "ids" in sample:
            return given_document(sample, self._num_ids)
        arrange = PARALLEL_TOOL_CALLS[self.rendering.parallel_tool_calls]
        if "messages" in sample:
            sample = {**sample, "messages": arrange(sample["messages"])}
        loss_on, train_newline = self.rendering.loss_on, self.rendering.train_newline
        return render(sample, self.template, loss_on=loss_on, train_newline=train_newline)

    def encode(self, samples: Sequence[list[Segment] | Document]) -> list[Document]:
        """The document of each sample's segments; all their texts go through the tokenizer together."""
        encoded = iter(self.encoder.encode([sample for sample in samples if not isinstance(sample, Document)]))
        return [sample if isinstance(sample, Document) else next(encoded) for sample in samples]

    @cached_property
    def _num_ids(self) -> int:
        return self.encoder.vocab_size
