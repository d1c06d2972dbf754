"""Gradient checkpointing: which layers are computed again in backward, and what of them is kept or kept elsewhere."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.model.kept_attention import KeptAttention
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

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.contexts: Contexts = noop_context_fn
        """makes what a layer's two computations run in, such as a mode of torch"""

    def __call__(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """`function(*inputs, **options)`."""
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=self._around, **options)

    def _around(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        once, again = self.contexts()
        if self.choice != ATTENTION:
            return once, again
        kept = KeptAttention()
        return _both(once, kept.entered(again=False)), _both(again, kept.entered(again=True))


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def enable_gradient_checkpointing(llm: PreTrainedModel, choice: Choice = True) -> Checkpointing:
    """Compute activations of `llm` again in backward, as `choice` says; False changes nothing.

    Raises:
        UserError: the model cannot, or its attention is not ours and its output cannot be kept.
    """
    if not is_choice(choice):
        raise UserError(f"gradient_checkpointing={choice!r}: choose True, False, every n-th layer, or {ATTENTION!r}.")
    if not llm.supports_gradient_checkpointing:
        raise UserError(f"{type(llm).__name__} does not support gradient checkpointing. Set it to False.")
    if choice == ATTENTION and not llm.config._attn_implementation.startswith("tuner_"):
        raise UserError(
            f"gradient_checkpointing={ATTENTION!r} keeps the output of tuner's attention, and this model has "
            f"{llm.config._attn_implementation!r}. Set attention = 'auto', or gradient_checkpointing = True."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its newer name is missing in transformers that we allow
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    function = Checkpointing(choice)
    for module in llm.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function
    layers = decoder_layers(llm)
    for layer, is_again in zip(layers, recomputed_layers(choice, len(layers)), strict=True):
        layer.gradient_checkpointing = is_again
    return function


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
