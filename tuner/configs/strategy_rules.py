"""What a config's strategy gets wrong by itself, and with the model: sizes, files of DeepSpeed, weights of 4 bits."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tuner.engine.zero_config import zero_stage
from tuner.errors import UserError
from tuner.model.build import read_config
from tuner.parallel.mesh import check_heads, head_counts, read_degrees


def wrong_deepspeed(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What DeepSpeed's preset or JSON file gets wrong, or says otherwise than the config's own settings."""
    strategy = parts.get("strategy", {})
    choice = strategy.get("deepspeed")
    if choice is None:
        return []
    if not isinstance(choice, str):
        return [f"strategy.deepspeed = {choice!r}: give the name of a preset, or the path of a JSON file."]
    from tuner.engine.deepspeed_package import check_choice  # imports DeepSpeed, which few ask for
    from tuner.engine.zero_config import Settings

    settings = Settings(
        precision=strategy.get("precision", "bf16"),
        max_grad_norm=parts.get("optim_wrapper.clip_grad", {}).get("max_norm"),
        world_size=None,
        offload_directory=strategy.get("offload_directory"),
        hpz_partition_size=strategy.get("hpz_partition_size"),
    )
    return complaints(lambda name: check_choice(name, settings), [choice])


def wrong_fsdp(strategy: Mapping[str, Any]) -> list[str]:
    """An unknown way to cut a model by FSDP2, or another way chosen as well."""
    choice, deepspeed = strategy.get("fsdp"), strategy.get("deepspeed")
    if choice is None:
        return []
    from tuner.engine.fsdp import SHARDINGS  # brings mmengine, which few ask for this way
    from tuner.engine.strategies import two_at_once

    known = isinstance(choice, str) and choice in SHARDINGS
    problems = [] if known else [f"strategy.fsdp = {choice!r}: allowed is one of {', '.join(SHARDINGS)}, or None."]
    return problems + ([two_at_once(deepspeed, choice)] if deepspeed is not None else [])


def wrong_cut(strategy: Mapping[str, Any], kinds: Collection[str | None]) -> list[str]:
    """Weights of 4 bits where a strategy would cut them over the ranks: 2 of them are a byte, and 64 share a scale.

    Args:
        strategy: its values in the config.
        kinds: how the adapters of the config's models quantise what they stand on; None where they do not.
    """
    choice, fsdp = strategy.get("deepspeed"), strategy.get("fsdp")
    cuts = f"fsdp={fsdp!r}" if fsdp is not None else f"deepspeed={choice!r}"
    try:
        is_cut = fsdp is not None or (isinstance(choice, str) and zero_stage(choice) == 3)
    except UserError:
        return []  # told by wrong_deepspeed
    if not is_cut or not any(kinds):
        return []
    kind = next(filter(None, kinds))
    return [
        f"quantise={kind!r} (QLoRA) and {cuts} do not work together: weights of 4 bits cannot be cut over the ranks. "
        "Set quantise=None (LoRA on weights that are cut), or keep them whole on each rank: deepspeed='zero2', or None."
    ]


def wrong_sharing(strategy: Mapping[str, Any], models: Collection[Any]) -> list[str]:
    """Ranks that are to share a sequence and cannot share the heads of a model whose config.json lies on this disk.

    Args:
        strategy: its values in the config.
        models: the paths of its models.
    """
    setting = strategy.get("sequence_parallel_size", 1)
    problems = complaints(read_degrees, [setting])
    paths = [path for path in models if is_here(path)]
    if problems or setting == 1 or not paths:
        return problems
    shared = read_degrees(setting).ulysses
    for path in paths:
        try:
            heads = head_counts(read_config(path).get_text_config())
        except UserError:
            continue  # told where models are looked at
        problems += complaints(partial(check_heads, *heads), [shared])
    return problems


def is_here(path: object) -> bool:
    """Whether a model's config.json lies on this disk; what the demo makes is made when it is needed."""
    return isinstance(path, str) and (Path(path).expanduser() / "config.json").is_file()


def complaints(inspect_path: Callable[[Any], object], paths: Collection[Any]) -> list[str]:
    """The messages of the UserErrors that looking at each path raises."""
    problems = []
    for path in paths:
        try:
            inspect_path(path)
        except UserError as error:
            problems.append(str(error))
    return problems
