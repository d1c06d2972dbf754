"""A model to be measured: loaded as `tuner chat` loads it, in a method that scores packed documents."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from tuner.chat.loading import Source, load_llm
from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.model.rope import check_learned, over, own_rope, reach, remedy
from tuner.model.tokenizer import check_vocabulary
from tuner.new_files import check_new

T = TypeVar("T")

logger = logging.getLogger("tuner")


def refuse_overwriting(out: Path, names: Sequence[str]) -> None:
    """UserError where one of the files is there already, or the directory cannot be one."""
    for name in names:
        check_new(out / name)
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
    check_learned(llm.config, longest, option)
    try:
        own = own_rope(llm.config)
    except UserError:
        return  # none, or one for each kind of layer
    if longest > reach(own):
        logger.warning(
            f"{option}: {longest:,} tokens are {over(own)} Expect little beyond them; to train at that length, set "
            f"{remedy(own, longest)}."
        )


def told(found: Iterable[T], sizes: Sequence[int], unit: str) -> Iterator[T]:
    """What is found, and every two seconds how far that is.

    Args:
        sizes: tokens of each.
        unit: what they are, in the plural.
    """
    began = last = time.monotonic()
    total, done = sum(sizes), 0
    for number, (one, size) in enumerate(zip(found, sizes), 1):
        done += size
        now = time.monotonic()
        if now - last > 2 or number == len(sizes):
            rate = done / max(now - began, 1e-9)
            left = (total - done) / rate
            print(f"  {number} of {len(sizes)} {unit}, {rate:,.0f} tokens/s, {left:.0f} s left", flush=True)
            last = now
        yield one
