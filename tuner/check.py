"""Report all mistakes of a config at once, before anything is loaded."""

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tuner.configs.adapter_rules import wrong_adapters
from tuner.configs.needle_rules import wrong_needles
from tuner.configs.optimizer_rules import wrong_in_backward
from tuner.configs.options import NAMED, parameters
from tuner.configs.rope_rules import warn_of_length, wrong_rope
from tuner.configs.strategy_rules import complaints, wrong_cut, wrong_deepspeed, wrong_fsdp, wrong_sharing
from tuner.dataset.build import StageShards, StreamedDataset, build_dataloader, build_shards, build_stream
from tuner.dataset.documents import ON_BAD_ROW, TOO_LONG
from tuner.dataset.format_choice import mistake_in
from tuner.dataset.hub import PREFIX as HUB_PREFIX
from tuner.dataset.hub import parse as parse_hub_name
from tuner.dataset.messages import PARALLEL_TOOL_CALLS
from tuner.dataset.rendering import LOSS_ON
from tuner.dataset.sampler import ENDLESS
from tuner.dataset.sources import as_entries, find_sources, parse_entry
from tuner.dataset.staged import NEED_MAX_STEPS
from tuner.dataset.stages import check_run, read_stages
from tuner.dataset.streaming import refuse_weights
from tuner.dataset.templates import TEMPLATE_NAMES
from tuner.demo.files import PREFIX
from tuner.engine.bad_steps import ON_NONFINITE
from tuner.engine.optimizer import KINDS
from tuner.engine.precision import PRECISIONS
from tuner.errors import UserError
from tuner.model.adapter import QUANTISED, VARIANTS, LoRA
from tuner.model.attention import BACKENDS
from tuner.model.build import WEIGHTS, build_llm
from tuner.model.checkpointing import is_choice
from tuner.model.directory import check_model_directory, check_weights, looks_local
from tuner.model.memory import check_together
from tuner.model.tokenizer import build_tokenizer
from tuner.nearest import did_you_mean, did_you_mean_or_all

logger = logging.getLogger("tuner")
NEEDED = (
    *("seed", "tokenizer", "train_dataloader", "model", "optim_wrapper"),
    *("param_scheduler", "strategy", "train_cfg", "custom_hooks"),
)
DATA_PARTS = ("tokenizer", "train_dataloader")
"""parts of a config that say all about its data; `check(config, DATA_PARTS)` needs no model, nor its weights"""
Names = Collection[str] | None
LARGEST = sys.float_info.max


class Rule(NamedTuple):
    """What a value must be, and in words."""

    holds: Callable[[Any], bool]
    words: str


class Node(NamedTuple):
    """A part of the assembly: the dotted path to it, its `type` and its other entries."""

    path: str
    type: Any
    values: dict[str, Any]


def is_number(value: object) -> bool:
    """An int or a float; True and False are no numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(low: float, high: float = LARGEST, *, words: str, include_low: bool = True) -> Rule:
    """A number in [low, high], or in (low, high]; an infinite one is none."""
    return Rule(
        lambda value: is_number(value) and (value >= low if include_low else value > low) and value <= high, words
    )


def count(low: int, *, or_none: bool = False) -> Rule:
    """A whole number from `low`."""

    def holds(value: object) -> bool:
        return value is None if or_none and value is None else type(value) is int and value >= low

    return Rule(holds, f"a whole number from {low}" + (" or None" if or_none else ""))


def is_betas(value: object) -> bool:
    """Adam's pair of decays."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)


def is_names(value: object) -> bool:
    """One or more words."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(name, str) and name for name in value)


SHARE = number(0, 1, words="a share from 0 to 1")
POSITIVE = number(0, words="a number above 0", include_low=False)
NOT_NEGATIVE = number(0, words="a number from 0")
FLAG = Rule(lambda value: isinstance(value, bool), "True or False")
RULES: dict[str, Rule] = {
    "lr": POSITIVE,
    "min_lr_ratio": SHARE,
    "warmup_ratio": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": Rule(lambda value: value is None or (is_number(value) and value > 0), "a number above 0 or None"),
    "optimizer_in_backward": FLAG,
    "betas": Rule(is_betas, "two numbers from 0 to below 1"),
    "max_length": count(2),
    "num_epochs": count(1),
    "max_steps": count(1, or_none=True),
    "num_accumulation_steps": count(1),
    "seed": count(0),
    "log_interval": count(1),
    "save_interval": count(1, or_none=True),
    "keep_checkpoints": count(1, or_none=True),
    "keep_every": count(1, or_none=True),
    "keep_best": FLAG,
    "async_save": FLAG,
    "sample_interval": count(0),
    "needle_interval": count(0),
    "pack": FLAG,
    "streaming": FLAG,
    "packs_per_window": count(1),
    "train_newline": FLAG,
    "gradient_checkpointing": Rule(is_choice, "True, False, every n-th layer, or 'attention'"),
    "offload_activations": FLAG,
    "tile_tokens": count(1, or_none=True),
    "hpz_partition_size": count(1, or_none=True),
    "max_nonfinite_steps": count(1),
    "rollback_steps": count(1),
    "spike_factor": Rule(lambda value: value is None or (is_number(value) and value > 1), "a number above 1 or None"),
    "rank_timeout": number(1, words="a number of seconds from 1"),
    "lora_rank": count(1),
    "lora_alpha": POSITIVE,
    "lora_dropout": Rule(lambda value: is_number(value) and 0 <= value < 1, "a share from 0 to below 1"),
    "lora_targets": Rule(lambda value: value == "auto" or is_names(value), "'auto' or a list of names of layers"),
    "modules_to_save": Rule(lambda value: value == [] or is_names(value), "a list of names of modules"),
    "lora_plus_ratio": Rule(lambda value: value is None or (is_number(value) and value > 0), "above 0, or None"),
    "quantise": Rule(lambda value: value in (None, *QUANTISED), f"one of {', '.join(QUANTISED)}, or None"),
}
CHOICES: dict[str, Collection[str]] = {
    "precision": PRECISIONS,
    "attention": ("auto", "eager", *BACKENDS),
    "weights": WEIGHTS,
    "on_nonfinite": ON_NONFINITE,
    "lora_variant": VARIANTS,
    "optimizer": KINDS,
    "too_long": TOO_LONG,
    "on_bad_row": ON_BAD_ROW,
    "chat_template": TEMPLATE_NAMES,
    "loss_on": LOSS_ON,
    "parallel_tool_calls": PARALLEL_TOOL_CALLS,
}
# names of settings where they arrive in the assembly
OTHER_NAMES = {"max_norm": "max_grad_norm", "rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout",
               "targets": "lora_targets", "variant": "lora_variant", "kind": "optimizer",
               "in_backward": "optimizer_in_backward"}  # fmt: skip


def check(config: Mapping[str, Any], only: Names = None, *, here: bool = True) -> None:
    """Raise one UserError that names every mistake in the config; log what works but is odd.

    Looks at values, data files and model directories, and imports the types; opens no weights and builds nothing.
    With `only`, the parts of the config that have no such name are not even imported. Without `here` the run is for
    another machine: data, weights and GPUs are not looked for.
    """
    problems: list[str] = []
    parts = dict(readable(config, problems, only))
    nodes = list(find_nodes(parts, "", problems))
    problems += [text for name, text in missing_parts(parts).items() if only is None or name in only]
    for node in nodes:
        problems += unknown_arguments(node)
    values = [(name, parts[name]) for name in parts if not isinstance(parts[name], Mapping)]
    for node in filter(is_known, nodes):
        values += [(f"{node.path}.{name}", value) for name, value in node.values.items()]
    problems += wrong_values(values)
    problems += wrong_streams(nodes) + wrong_stages(parts, here=here)
    if here:
        problems += wrong_data_files(nodes) + wrong_models(nodes)
    problems += complaints(check_together, [node.values for node in nodes if node.type is build_llm])
    known = {node.path: node.values for node in nodes if is_known(node)}
    problems += wrong_deepspeed(known)
    strategy = known.get("strategy", {})
    problems += wrong_fsdp(strategy)
    problems += wrong_rope(known.get("rope", {}))
    adapters = [node.values for node in nodes if node.type is LoRA]
    problems += wrong_cut(strategy, [adapter.get("quantise") for adapter in adapters])
    problems += wrong_adapters(adapters, known) + wrong_in_backward(known)
    problems += wrong_sharing(strategy, [node.values.get("path") for node in nodes if node.type is build_llm])
    problems += wrong_needles(parts, [(node.type, node.values) for node in nodes])
    if problems:
        raise UserError(listed(list(dict.fromkeys(problems))))
    warn_of_length(config)
    for node in nodes if here else ():
        warn_of_precision(node.values.get("precision"), torch.cuda.is_available())


def listed(problems: list[str]) -> str:
    """One message for one or several mistakes."""
    if len(problems) == 1:
        return problems[0]
    return f"The config has {len(problems)} mistakes:\n" + "\n".join(f"  - {problem}" for problem in problems)


def find_nodes(value: Any, path: str, problems: list[str]) -> Iterator[Node]:
    """Every dict of the assembly below `value`; a type that cannot be imported is noted and passed over."""
    if isinstance(value, Mapping):
        entries = dict(readable(value, problems))
        if path:
            yield Node(path, entries.pop("type", None), entries)
    elif isinstance(value, (list, tuple)):
        entries = {str(position): part for position, part in enumerate(value)}
    else:
        return
    for key, part in entries.items():
        yield from find_nodes(part, f"{path}.{key}".lstrip("."), problems)


def readable(node: Mapping[str, Any], problems: list[str], only: Names = None) -> Iterator[tuple[str, Any]]:
    """The entries of a dict; looking at one may import a type, and what goes wrong then names file and line."""
    for key in [name for name in node if only is None or name in only]:
        try:
            yield key, node[key]
        except ImportError as error:
            problems.append(str(error))


def is_known(node: Node) -> bool:
    """Whether the rules know the names in this node: those of tuner and torch; a user's type may mean others."""
    module = inspect.getmodule(node.type)
    return node.type is None or (module is not None and module.__name__.partition(".")[0] in ("tuner", "torch"))


def missing_parts(parts: Mapping[str, Any]) -> dict[str, str]:
    """Top-level parts that training reads and the config lacks, and what to say of each."""
    lacks = [name for name in NEEDED if name not in parts]
    return {name: f"The config has no {name}. A recipe shows it: tuner copy-cfg." for name in lacks}


def unknown_arguments(node: Node) -> list[str]:
    """Entries that the node's type does not accept."""
    if node.type is None:
        return []
    if not callable(node.type):
        return [f"{node.path}.type is {node.type!r}; import a class or function in the config and name it there."]
    taken = parameters(node.type)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken):
        return []
    allowed = [parameter.name for parameter in taken if parameter.kind in NAMED]
    unknown = [name for name in node.values if name not in allowed]
    who = f"{node.path}: {node.type.__name__}"
    return [f"{who} has no argument {name}.{did_you_mean_or_all(name, allowed)}" for name in unknown]


def wrong_values(values: list[tuple[str, Any]]) -> list[str]:
    """Values out of range or none of the allowed ones, each said once: a setting and where it arrives are one."""
    problems: dict[tuple[str, str], str] = {}
    for path, value in values:
        name = path.rpartition(".")[2]
        name = OTHER_NAMES.get(name, name)
        own_rule = name in RULES and "stages." not in path  # `read_stages` tells of what a stage says itself
        if own_rule and not RULES[name].holds(value):
            problems.setdefault((name, repr(value)), f"{path} = {value!r}: allowed is {RULES[name].words}.")
        if name == "data_format" and (mistake := mistake_in(value)) is not None:
            problems.setdefault((name, repr(value)), f"{path} = {value!r}: {mistake}")
        is_node = isinstance(value, Mapping)  # whose own entries are looked at
        if name in CHOICES and not is_node and (not isinstance(value, str) or value not in CHOICES[name]):
            allowed = f"allowed is one of {', '.join(CHOICES[name])}."
            text = f"{path} = {value!r}: {allowed}{did_you_mean(value, CHOICES[name])}"
            problems.setdefault((name, repr(value)), text)
    return list(problems.values())


def wrong_data_files(nodes: list[Node]) -> list[str]:
    """Data files that are missing, empty or unreadable; those of the demo and the hub are made when they are opened."""
    readers = (build_shards, build_stream, StageShards)
    given = [node.values for node in nodes if node.type in readers and "path" in node.values]
    return [text for values in given for text in wrong_entries([values["path"]], values.get("data_format"))]


def wrong_entries(paths: list[Any], data_format: Any) -> list[str]:
    """What is wrong with the files that data_path, in a recipe or a stage, names for entries of this format."""
    found = complaints(as_entries, paths)
    entries = [] if found else [entry for path in paths for entry in as_entries(path)]
    found += complaints(parse_entry, entries)
    read = [] if found else [parse_entry(entry) for entry in entries]
    names = {name: entry.data_format or data_format for entry in read for name in entry.paths}
    found += complaints(parse_hub_name, [name for name in names if name.startswith(HUB_PREFIX)])
    local = [(name, given) for name, given in names.items() if not name.startswith((PREFIX, HUB_PREFIX))]
    found += complaints(lambda named: find_sources(*named), local)
    if not found and len(local) == len(names):  # what is wrong between them
        found = complaints(lambda path: find_sources(path, data_format), paths)
    return [f"{problem} data_path names the files to train on." for problem in found]


def data_entries(nodes: list[Node], readers: Collection[Any]) -> list[Any]:
    """All that data_path holds where one of `readers` takes it."""
    given = [node.values["path"] for node in nodes if node.type in readers and "path" in node.values]
    return [entry for path in given if not complaints(as_entries, [path]) for entry in as_entries(path)]


def wrong_streams(nodes: list[Node]) -> list[str]:
    """What other data can have and a stream cannot: weights, and an end that is known."""
    loaders = [node.values for node in nodes if node.type is build_dataloader]
    streamed = [values for values in loaders if values.get("dataset", {}).get("type") is StreamedDataset]
    problems = [ENDLESS for values in streamed if values.get("max_steps") is None]
    entries = [entry for entry in data_entries(nodes, (build_stream,)) if not complaints(parse_entry, [entry])]
    return problems + complaints(refuse_weights, [entries] if entries else [])


def wrong_stages(parts: Mapping[str, Any], *, here: bool) -> list[str]:
    """What is wrong with the stages of a run, by themselves and beside its other settings."""
    loader = parts.get("train_dataloader") or {}
    stages = loader.get("stages")
    if stages is None:
        return []
    problems = complaints(read_stages, [stages])
    if loader.get("max_steps") is None:
        problems.append(NEED_MAX_STEPS)
    if parts.get("streaming"):
        problems.append("stages and streaming = True do not go together: a share needs data that is counted. Drop one.")
    if not problems:
        run = (read_stages(stages), loader["max_steps"], loader["dataset"].get("max_length"))
        problems += complaints(lambda arguments: check_run(*arguments), [run])
        ropes = [{"theta": stage.get("rope_theta"), "scaling": stage.get("rope_scaling")} for stage in stages]
        problems += [f"stages[{place}]: {text}" for place, rope in enumerate(ropes) for text in wrong_rope(rope)]
        own = [stage["data_path"] for stage in stages if stage.get("data_path") is not None]
        problems += [] if not here else wrong_entries(own, loader["dataset"]["shards"].get("data_format"))
    return problems


def wrong_models(nodes: list[Node]) -> list[str]:
    """Model directories that are missing, or lack their config or their weights; names on the hub pass."""
    problems = []
    for node in nodes:
        path = node.values.get("path")
        if node.type not in (build_llm, build_tokenizer) or not isinstance(path, str) or path.startswith(PREFIX):
            continue
        path = os.path.expanduser(path)
        if not Path(path).exists() and not looks_local(path):
            continue
        found = []
        if node.type is build_llm or not Path(path).is_dir():  # a tokenizer may lie in a directory alone
            found = complaints(check_model_directory, [path])
        if not found and node.type is build_llm:
            pretrained = node.values.get("weights", WEIGHTS[0]) == WEIGHTS[0]
            found = complaints(check_weights, [path]) if pretrained else []
            found += too_many_tokens(Path(path))
        problems += found
    return problems


def too_many_tokens(directory: Path) -> list[str]:
    """Whether the tokenizer's added tokens lie beyond the embedding; all of its tokens are checked once it is built."""
    try:
        vocab_size = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        added = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return []  # nothing said here, so nothing to compare
    largest = max((int(identifier) for identifier in added), default=-1)
    if largest < vocab_size:
        return []
    return [
        f"{directory}: the tokenizer has token {added[str(largest)]['content']!r} with id {largest}, but the model's "
        f"embedding ends at {vocab_size - 1}. Take the tokenizer that belongs to the model."
    ]


def warn_of_precision(precision: object, has_cuda: bool) -> None:
    """Log a precision that works on this device and is seldom wanted there."""
    if precision == "fp16" and not has_cuda:
        logger.warning("precision = 'fp16' on a CPU is slow and overflows easily; precision = 'fp32' is right here.")
    if precision == "bf16" and not has_cuda:
        logger.warning("precision = 'bf16' on a CPU is often slower than 'fp32', where the CPU has no bf16 arithmetic.")
    if precision == "bf16" and has_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning("This GPU has no bf16 arithmetic; precision = 'fp16' is faster and scales its loss.")
