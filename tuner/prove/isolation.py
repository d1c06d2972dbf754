"""Documents of a pack: none sees another, none sees its own later tokens, each is as if it were alone."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import Batch, collate
from tuner.dataset.tokenize import Document
from tuner.method.sft import SFT
from tuner.prove.small_model import NUM_TOKEN_IDS, Float64

Edges = list[int]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""of logits, relative to the largest, between packed and separate; other matrix shapes round otherwise"""


class Place(NamedTuple):
    """Where and in what a forward pass is computed."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products

    def context(self) -> AbstractContextManager:
        """Around every forward and backward."""
        if self.dtype == torch.float64:
            return Float64()
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class Claim(NamedTuple):
    """What should hold, how far it is from holding, and how far it may be."""

    text: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it does; NaN does not."""
        return self.found <= self.allowed


def check_isolation(method: SFT, documents: Sequence[Document], place: Place) -> list[Claim]:
    """Change tokens, and look where logits and gradients change; nothing is trained."""
    batch = on_device(collate(documents, 1), place.device)
    edges = batch["cu_seqlens"].tolist()
    logits = logits_of(method, batch, place)
    rest = [others_changed(method, batch, place, edges, number) for number in range(len(documents))]
    leaks = [gradient_leak(method, batch, place, edges, number) for number in range(len(documents))]
    other_gradients = gradients_changed(method, batch, place, edges)
    return [
        Claim("another document's tokens change logits by", max(rest), 0.0),
        Claim("a document's loss has a gradient for another's tokens of", max(leaks), 0.0),
        Claim("another document's tokens change the gradient by", other_gradients, 0.0 if _exact(place) else 1e-2),
        Claim("later tokens of a document change earlier logits by", later_changed(method, batch, place, edges), 0.0),
        Claim("packed and alone, logits differ by", alone_apart(method, batch, place, logits), TOLERANCES[place.dtype]),
    ]


def _exact(place: Place) -> bool:
    """Whether a backward pass always adds in the same order; kernels of GPUs need not."""
    return place.device.type == "cpu"


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch where the model is."""
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return {name: value for name, value in moved.items() if value is not None}


@torch.no_grad()
def logits_of(method: SFT, batch: dict[str, Any], place: Place) -> torch.Tensor:
    """(T, V) of a pack."""
    names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
    with place.context():
        return method.llm(**{name: batch[name] for name in names}, use_cache=False).logits[0]


def altered(batch: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The batch with other tokens from `start` to `end`."""
    ids = batch["input_ids"].clone()
    ids[:, start:end] = (ids[:, start:end] + 1 + torch.arange(end - start, device=ids.device) % 7) % NUM_TOKEN_IDS
    return {**batch, "input_ids": ids}


def largest(difference: torch.Tensor) -> float:
    """The largest entry; 0 of none."""
    return difference.abs().max().item() if difference.numel() else 0.0


def others_changed(method: SFT, batch: dict[str, Any], place: Place, edges: Edges, number: int) -> float:
    """The largest change of other documents' logits when one has other tokens; its own must change."""
    start, end = edges[number], edges[number + 1]
    change = logits_of(method, altered(batch, start, end), place) - logits_of(method, batch, place)
    assert change[start:end].any(), "other tokens must give other logits"
    change[start:end] = 0
    return largest(change)


def later_changed(method: SFT, batch: dict[str, Any], place: Place, edges: Edges) -> float:
    """The largest change of logits before the place in each document from which tokens are changed."""
    logits = logits_of(method, batch, place)
    found = [0.0]
    for start, end in pairwise(edges):
        for begin in {start + 1, (start + end) // 2, end - 1} - {start}:
            found.append(largest((logits_of(method, altered(batch, begin, end), place) - logits)[start:begin]))
    return max(found)


def train_only(batch: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """All next tokens of a document are trained, and nothing else."""
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[:, start : end - 1] = batch["input_ids"][:, start + 1 : end]
    kept = {name: value for name, value in batch.items() if name != "loss_weights"}
    return {**kept, "labels": labels, "num_loss_tokens": max(1, end - start - 1)}


def backward(method: SFT, batch: dict[str, Any], place: Place) -> torch.Tensor:
    """(T, H) gradient of a batch's loss for the embedded tokens; those of parameters are left where they belong."""
    embedded: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = method.llm.get_input_embeddings().register_forward_hook(keep)
    try:
        method.zero_grad()
        with place.context():
            method(**batch)["loss"].backward()
    finally:
        hook.remove()
    assert embedded[0].grad is not None
    return embedded[0].grad[0]


def gradient_leak(method: SFT, batch: dict[str, Any], place: Place, edges: Edges, number: int) -> float:
    """The largest gradient that the loss of one document has for the tokens of others; for its own it must have one."""
    start, end = edges[number], edges[number + 1]
    gradient = backward(method, train_only(batch, start, end), place)
    assert end - start < 2 or gradient[start:end].any(), "a document's loss must depend on its tokens"
    return max(largest(gradient[:start]), largest(gradient[end:]))


def gradients_changed(method: SFT, batch: dict[str, Any], place: Place, edges: Edges) -> float:
    """The largest change of a parameter's gradient, of the first document's loss, when the others have other tokens.

    Relative to the parameter's largest gradient.
    """
    own = train_only(batch, edges[0], edges[1])
    backward(method, own, place)
    before = {
        name: parameter.grad.clone() for name, parameter in method.named_parameters() if parameter.grad is not None
    }
    backward(method, altered(own, edges[1], edges[-1]), place)
    after = dict(method.named_parameters())
    return max(largest(gradient - after[name].grad) / (largest(gradient) or 1.0) for name, gradient in before.items())


@torch.no_grad()
def alone_apart(method: SFT, batch: dict[str, Any], place: Place, packed: torch.Tensor) -> float:
    """The largest difference between a document's logits in the pack and by itself, relative to the largest logit.

    By itself it is what transformers takes for one sequence: no edges, no positions.
    """
    edges = batch["cu_seqlens"].tolist()
    found = [0.0]
    for start, end in pairwise(edges):
        with place.context():
            alone = method.llm(batch["input_ids"][:, start:end], use_cache=False).logits[0]
        found.append(largest(alone.double() - packed[start:end].double()))
    return max(found) / largest(packed)
