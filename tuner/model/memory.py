"""What a model holds between its forward and its backward: the settings together, and which of them go together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.model.checkpointing import Choice, enable_gradient_checkpointing, is_choice, refuse_foreign
from tuner.model.tiles import tile


@dataclass(frozen=True)
class Memory:
    """How a model saves memory; no setting changes a step.

    Args:
        gradient_checkpointing: compute again in backward: True every layer, n every n-th, "attention" every layer but
            its attention, whose output is kept.
        offload_activations: what those layers keep lies in the host's memory until backward.
        tile_tokens: tokens that feed-forward blocks and norms take at a time, see `tile`; None takes all at once.

    Raises:
        UserError: a value that has no meaning, or two that do not go together.
    """

    gradient_checkpointing: Choice = False
    offload_activations: bool = False
    tile_tokens: int | None = None

    def __post_init__(self) -> None:
        tiles = self.tile_tokens
        if not is_choice(self.gradient_checkpointing) or (tiles is not None and (type(tiles) is not int or tiles < 1)):
            raise UserError(
                f"gradient_checkpointing={self.gradient_checkpointing!r}, tile_tokens={tiles!r}: allowed are True, "
                "False, every n-th layer or 'attention', and a whole number of tokens from 1 or None."
            )
        check_together({"memory": vars(self)})

    def save(self, llm: PreTrainedModel) -> None:
        """From now on `llm` holds no more than these settings say."""
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(llm, self.gradient_checkpointing, offload=self.offload_activations)
        if self.tile_tokens is not None:
            tile(llm, self.tile_tokens)


def check_together(settings: Mapping[str, Any]) -> None:
    """UserError where those of `build_llm` cannot be had together, by their values in a config.

    Args:
        settings: arguments of `build_llm` by name, with those of `Memory` as a mapping.
    """
    memory = settings.get("memory") or {}
    choice = memory.get("gradient_checkpointing", False)
    if memory.get("offload_activations", False) is True and choice is False:
        raise UserError(
            "offload_activations = True puts what gradient checkpointing keeps into the host's memory, but "
            "gradient_checkpointing is False. Set gradient_checkpointing = True, or offload_activations = False."
        )
    if settings.get("attention") == "eager":
        refuse_foreign(choice, "eager")
