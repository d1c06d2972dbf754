"""Gradient checkpointing: which layers are computed again in backward, and what of them is kept or kept elsewhere."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.model.kept_attention import KeptAttention
from tuner.model.offload import HostMemory
from tuner.model.tiles import decoder_layers

ATTENTION = "attention"
Choice = bool | int | str
"""True: every layer, n: every n-th, "attention": every layer but its attention, whose output is kept; False: none"""
Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def is_choice(value: object) -> bool:
    """Whether a value is a `Choice`."""
    return isinstance(value, bool) or (type(value) is int and value >= 1) or value == ATTENTION


class Checkpointing:
    """What transformers calls in place of a layer's forward, to compute it now and again in backward."""

    def __init__(self, choice: Choice, host: HostMemory | None = None) -> None:
        """`host`: where what is kept of the layers stays until backward; None leaves it on their device."""
        self.choice, self.host = choice, host
        self.contexts: Contexts = noop_context_fn
        """makes what a layer's two computations run in, such as a mode of torch"""

    def __call__(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """`function(*inputs, **options)`."""
        if self.host is None:
            kept, elsewhere = KeptAttention(), nullcontext()
        else:
            layer = self.host.layer()
            kept = KeptAttention(layer.pack, layer.unpack)
            elsewhere = saved_tensors_hooks(layer.pack, layer.unpack)
        around = partial(self._around, kept)
        with elsewhere:
            return checkpoint(function, *inputs, use_reentrant=False, context_fn=around, **options)

    def _around(self, kept: KeptAttention) -> tuple[AbstractContextManager, AbstractContextManager]:
        once, again = self.contexts()
        if self.choice != ATTENTION:
            return once, again
        return _both(once, kept.entered(again=False)), _both(again, kept.entered(again=True))


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def enable_gradient_checkpointing(
    llm: PreTrainedModel, choice: Choice = True, *, offload: bool = False
) -> Checkpointing:
    """Compute activations of `llm` again in backward, as `choice` says.

    Args:
        llm: a causal LM of transformers.
        choice: which layers.
        offload: keep what those layers keep in the host's memory.

    Raises:
        UserError: the model cannot, or its attention is not ours and its output cannot be kept.
    """
    if not is_choice(choice):
        raise UserError(f"gradient_checkpointing={choice!r}: choose True, False, every n-th layer, or {ATTENTION!r}.")
    if not llm.supports_gradient_checkpointing:
        raise UserError(f"{type(llm).__name__} does not support gradient checkpointing. Set it to False.")
    if not llm.config._attn_implementation.startswith("tuner_"):
        refuse_foreign(choice, llm.config._attn_implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its newer name is missing in transformers that we allow
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    function = Checkpointing(choice, HostMemory() if offload else None)
    for module in llm.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function
    layers = decoder_layers(llm)
    for layer, is_again in zip(layers, recomputed_layers(choice, len(layers)), strict=True):
        layer.gradient_checkpointing = is_again
    return function


def refuse_foreign(choice: object, attention: str) -> None:
    """UserError where the output of an attention that is not ours should be kept."""
    if choice == ATTENTION:
        raise UserError(
            f"gradient_checkpointing={ATTENTION!r} keeps the output of tuner's attention, and this model has "
            f"{attention!r}. Set attention = 'auto', or gradient_checkpointing = True."
        )


def recomputed_layers(choice: Choice, num_layers: int) -> list[bool]:
    """Of each layer, whether it is computed again: with every n-th the first is."""
    every = 1 if choice == ATTENTION else int(choice)
    return [every > 0 and place % every == 0 for place in range(num_layers)]


def choice_of(llm: PreTrainedModel) -> Choice:
    """How a model was told to compute again, by us or by transformers."""
    for layer in decoder_layers(llm):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(function, Checkpointing):
            return function.choice
    return llm.is_activation_checkpointing
