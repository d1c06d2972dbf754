"""A model to be measured: loaded as `tuner chat` loads it, in a method that scores packed documents."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tuner.chat.loading import Source, load_llm
from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.model.rope import over, own_rope, reach, remedy
from tuner.model.tokenizer import check_vocabulary


def refuse_overwriting(out: Path, names: Sequence[str]) -> None:
    """UserError where one of the files is there already, or the directory cannot be one."""
    if taken := [name for name in names if (out / name).exists()]:
        raise UserError(f"{out / taken[0]} exists already, and nothing is overwritten. Choose another --out.")
    blocked = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise UserError(f"--out {out}: {blocked} is a file. Name a directory, new or not.")


def load_method(source: Source, tokenizer: Any) -> SFT:
    """The model of a source in evaluation mode, an adapter unmerged in its layers.

    Raises:
        UserError: it cannot be loaded, has fewer tokens than the tokenizer, or lets packed documents see each other.
    """
    llm = load_llm(source)
    check_vocabulary(tokenizer, llm)
    return SFT(llm.get_base_model() if source.adapter is not None else llm)


def warn_of_length(llm: PreTrainedModel, longest: int, option: str) -> None:
    """Say where the rotary embedding has never been trained; refuse what learned positions do not have.

    Raises:
        UserError: documents are longer than a table of learned positions.
    """
    try:
        own = own_rope(llm.config)
    except UserError:  # none, or one for each kind of layer
        positions = getattr(llm.config, "max_position_embeddings", None)
        if positions and longest > positions and not getattr(llm.config, "rope_parameters", None):
            raise UserError(
                f"{option}: {longest:,} tokens, but {type(llm).__name__} has learned positions for {positions:,}. "
                f"Ask for at most {positions}."
            ) from None
        return
    if longest > reach(own):
        warnings.warn(
            f"{option}: {longest:,} tokens are {over(own)} Expect little beyond them; to train at that length, set "
            f"{remedy(own, longest)}.",
            stacklevel=2,
        )
