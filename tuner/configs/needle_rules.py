"""What a config gets wrong with needles, and lengths of them that no stage's rotary embedding is meant for."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tuner.configs.rope_rules import model_paths
from tuner.configs.strategy_rules import complaints
from tuner.dataset.needle_grid import NeedleGrid, parse_depths, parse_languages, parse_lengths
from tuner.errors import UserError
from tuner.model.build import read_config
from tuner.model.rope import OwnRope, Rope, over, own_rope, reach, remedy, replace_rope

PARSERS = {"lengths": parse_lengths, "depths": parse_depths, "languages": parse_languages}
logger = logging.getLogger("tuner")


def wrong_needles(config: Mapping[str, Any], nodes: Sequence[tuple[Any, Mapping[str, Any]]]) -> list[str]:
    """What is wrong with lengths, depths, languages and files; logs a warning for lengths beyond the model.

    Args:
        nodes: type and arguments of every part of the config.
    """
    grids = [given for kind, given in nodes if kind is NeedleGrid]
    problems = [text for given in grids for text in wrong_grid(given)]
    used = [hook.get("needles") for hook in config.get("custom_hooks") or () if hook.get("interval")]
    asked = [grid for grid in used if grid is not None and grid.get("type") is NeedleGrid]
    if asked and not problems:
        warn_of_needles(config, max(length_of(grid) for grid in asked))
    return problems


def wrong_grid(given: Mapping[str, Any]) -> list[str]:
    """What shows without a tokenizer, each mistake by itself."""
    tries: list[Callable[[], object]] = [NeedleGrid(**given).texts]
    tries += [partial(parse, given[name], f"needle_{name}") for name, parse in PARSERS.items() if name in given]
    problems = complaints(lambda attempt: attempt(), tries)
    return problems or complaints(lambda grid: grid.cells(), [NeedleGrid(**given)])


def length_of(node: Mapping[str, Any]) -> int:
    """Tokens of the longest document."""
    return NeedleGrid(**{name: value for name, value in node.items() if name != "type"}).cells()[-1].length


def warn_of_needles(config: Mapping[str, Any], length: int) -> None:
    """Log the remedy where needles are hidden in longer text than the model is meant for in any stage of the run."""
    given, loader = config.get("rope") or {}, config.get("train_dataloader") or {}
    longest = (loader.get("dataset") or {}).get("max_length")
    stages = loader.get("stages") or [{}]
    for path in model_paths(config.get("model")):
        try:
            own = own_rope(read_config(path))
            ropes = [
                Rope(
                    stage.get("rope_theta") or given.get("theta"),
                    stage.get("rope_scaling") or given.get("scaling"),
                    stage.get("max_length") or longest,
                )
                for stage in stages
            ]
            furthest = max((replace_rope(own, rope) for rope in ropes), key=far)
        except UserError:
            continue  # told elsewhere, or a model without rotary embedding
        if length > reach(furthest):
            logger.warning(
                f"needle_lengths: {length:,} tokens are {over(furthest)} Expect little beyond them; to train at that "
                f"length, set {remedy(furthest, length)}."
            )


def far(own: OwnRope) -> tuple[int, float]:
    """By what stages are compared: the reach, then the base."""
    return reach(own), own.parameters["rope_theta"]
