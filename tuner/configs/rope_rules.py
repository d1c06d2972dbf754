"""What a config gets wrong with rotary embeddings, and lengths beyond what they are meant for."""

import logging
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from tuner.configs.strategy_rules import complaints, is_here
from tuner.dataset.stages import read_stages
from tuner.engine.stages import stage_rope
from tuner.errors import UserError
from tuner.model.build import build_llm, read_config
from tuner.model.rope import Rope, beyond_reach, check_scaling, check_theta, own_rope, replace_rope

logger = logging.getLogger("tuner")


def wrong_rope(rope: Mapping[str, Any]) -> list[str]:
    """A base and a scaling that are none; `rope` has the arguments of a `Rope`."""
    return complaints(check_theta, [rope.get("theta")]) + complaints(check_scaling, [rope.get("scaling")])


def warn_of_length(config: Mapping[str, Any]) -> None:
    """Log the remedy where documents may be longer than the model's rotary embedding is meant for, or a base returns.

    Models are looked at whose config.json lies on this disk.
    """
    loader = config.get("train_dataloader") or {}
    given = config.get("rope") or {}
    for lapse in returns(loader, given):
        logger.warning(lapse)
    try:
        paths = list(model_paths(config.get("model")))
    except ImportError:
        return  # preparing data needs none of the model's parts
    for path in paths:
        try:
            own = own_rope(read_config(path))
        except UserError:
            continue  # told elsewhere, or a model without rotary embedding
        for name, rope, length in longest_turns(loader, given):
            text = beyond_reach(replace_rope(own, rope), length)
            if text:
                logger.warning(name + text)


def returns(loader: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """What to say of stages that leave out a setting of the stage before: the whole run's is in use again."""
    stages = [] if loader.get("stages") is None else read_stages(loader["stages"])
    for place, (before, stage) in enumerate(pairwise(stages)):
        for name in ("theta", "scaling"):
            earlier, own = (getattr(each, f"rope_{name}") for each in (before, stage))
            if own is None and earlier not in (None, given.get(name)):
                now = "the model's own" if given.get(name) is None else repr(given[name])
                yield (
                    f"stages[{place + 1}] sets no rope_{name}: after {earlier!r} in stages[{place}] it is {now} again. "
                    "Repeat it there, unless that is meant."
                )


def longest_turns(loader: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, Rope, int]]:
    """Rotary settings, and the length of the longest documents: of each stage, after its name, or of the whole run."""
    theta, scaling = given.get("theta"), given.get("scaling")
    length = (loader.get("dataset") or {}).get("max_length")
    if loader.get("stages") is None:
        if isinstance(length, int):
            yield "", Rope(theta, scaling, length), length
        return
    for place, stage in enumerate(read_stages(loader["stages"])):
        yield f"stages[{place}]: ", stage_rope(Rope(theta, scaling), stage), stage.max_length


def model_paths(node: object) -> Iterator[str]:
    """The directories of all language models below a node of a config."""
    if not isinstance(node, Mapping):
        return
    if node.get("type") is build_llm and is_here(node.get("path")):
        yield node["path"]
    for part in node.values():
        yield from model_paths(part)
