"""DeepSpeed's old checkpoints: fp32 weights of ZeRO 1 to 3, put together from the parts that each rank wrote.

How the parts lie was read from DeepSpeed's own zero_to_fp32.py. Under ZeRO 1 and 2 each parameter group is one vector,
its parameters one after the other, cut into equal parts; under ZeRO 3 each parameter is cut by itself, into parts of
ceil(values / ranks), and a rank's vector has its part of every parameter in turn.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.convert.layout import Reshaped, Rows, Source, all_rows
from tuner.convert.pickled import PickledTensor, read_pickle
from tuner.errors import UserError
from tuner.model.directory import inside

OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
VECTORS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
"""where each stage keeps a rank's vectors"""


def read_zero(directory: Path) -> tuple[dict[str, Source], dict[str, Any]]:
    """All weights by name, fp32 where an optimizer had them, and the model states of the first rank.

    Raises:
        UserError: a rank's file is missing, the files are not of one checkpoint, or of tensor parallel ranks.
    """
    try:
        weights, states = join_parts(directory)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"The files in {directory} are not built as DeepSpeed's: {error!r}.") from error
    return {name: source for name, source in weights.items() if isinstance(source, (PickledTensor, Reshaped))}, states


def join_parts(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `read_zero`, of files that are built as DeepSpeed builds them."""
    models = [read_states(path) for path in ranked(directory, MODEL_FILE, "model_states")]
    paths = ranked(directory, OPTIMIZER_FILE, "optim_states")
    first = models[0]
    if not paths or "param_shapes" not in first:
        return whole_weights(directory, first), first
    optimizers = [read_states(path).get("optimizer_state_dict", {}) for path in paths]
    stage, count = optimizers[0].get("zero_stage"), optimizers[0].get("partition_count")
    count = max(count) if isinstance(count, list) and count else count
    if stage not in VECTORS:
        raise UserError(f"{paths[0]} is of ZeRO stage {stage!r}; 1, 2 and 3 are known.")
    if count != len(paths) or (stage == 3 and len(models) != count):
        raise UserError(f"{directory} was written by {count} ranks and has files of {len(paths)}. Copy all.")
    vectors = [vectors_of(optimizer, stage, path) for optimizer, path in zip(optimizers, paths, strict=True)]
    found: dict[str, Any] = buffers_of(first)
    if stage == 3:
        found |= frozen_parts(models) | parts_of_each(shapes_of(first), vectors, directory)
    else:
        found |= dict(first.get("module") or {})  # what is not trained has no fp32 weights; ZeRO 1 has it here alone
        found |= dict(first.get("frozen_param_fragments") or {})
        found |= parts_of_groups(groups_of(first), vectors, optimizers[0].get("param_alignment_paddings"), directory)
    shared = first.get("shared_params") or {}
    return found | {alias: found[name] for alias, name in shared.items() if name in found}, first


def ranked(directory: Path, pattern: re.Pattern, kind: str) -> list[Path]:
    """The files of a kind in the order of their ranks; UserError where one is missing between others."""
    found = {}
    for path in directory.iterdir():
        match = pattern.fullmatch(path.name)
        if match and match[2] != "00":
            raise UserError(f"{path} is of a tensor parallel rank. Merge them with the program that made them.")
        if match:
            found[int(match[1] or 0)] = inside(directory, path.name)
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise UserError(f"{directory} lacks the {kind} of rank {missing[0]}. Copy it again.")
    return [found[rank] for rank in sorted(found)]


def read_states(path: Path) -> dict[str, Any]:
    """The dict in a file of DeepSpeed."""
    states = read_pickle(path)
    if not isinstance(states, dict):
        raise UserError(f"{path} holds no states of a model or an optimizer.")
    return states


def whole_weights(directory: Path, states: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the model states alone, in the dtype that was trained in; ZeRO 3 leaves none there."""
    module = states.get("module")
    named = {name: tensor for name, tensor in (module or {}).items() if isinstance(tensor, PickledTensor)}
    if not named or any(0 in tensor.shape for tensor in named.values()):
        raise UserError(f"{directory} has no *_optim_states.pt, and its model states hold no weights. Copy all files.")
    return dict(named)


def vectors_of(optimizer: Mapping[str, Any], stage: int, path: Path) -> list[PickledTensor]:
    """A rank's vectors, one for each parameter group, (values,) each."""
    vectors = optimizer.get(VECTORS[stage])
    if not isinstance(vectors, list) or not all(isinstance(v, PickledTensor) and len(v.shape) == 1 for v in vectors):
        raise UserError(f"{path} has no {VECTORS[stage]}, which ZeRO {stage} writes.")
    return vectors


def groups_of(states: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """For each parameter group, name -> shape in the order of the vector."""
    groups = states["param_shapes"]
    groups = groups if isinstance(groups, list) else [groups]
    if not all(isinstance(shape, tuple) for group in groups for shape in group.values()):
        raise UserError("The param_shapes of the model states are none.")
    return groups


def shapes_of(states: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all groups."""
    return {name: shape for group in groups_of(states) for name, shape in group.items()}


def buffers_of(states: Mapping[str, Any]) -> dict[str, Source]:
    """Buffers, which no optimizer has."""
    module = states.get("module") or {}
    return {name: module[name] for name in states.get("buffer_names") or [] if name in module}


def parts_of_groups(
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    vectors: Sequence[Sequence[PickledTensor]],
    paddings: Sequence[Sequence[int]] | None,
    directory: Path,
) -> dict[str, Source]:
    """ZeRO 1 and 2: the ranks' vectors of a group, one after the other, hold its parameters."""
    found: dict[str, Source] = {}
    if any(len(of_rank) != len(groups) for of_rank in vectors):
        raise does_not_fit(directory)
    for place, group in enumerate(groups):
        whole, offset = all_rows([of_rank[place] for of_rank in vectors]), 0
        for number, (name, shape) in enumerate(group.items()):
            count = math.prod(shape)
            found[name] = Reshaped(Rows(((whole, offset, offset + count),)), shape)
            offset += count + (paddings[place][number] if paddings else 0)
        multiple = 2 * len(vectors)  # to which DeepSpeed fills a group up
        if -(-offset // multiple) != -(-whole.shape[0] // multiple):
            raise does_not_fit(directory)
    return found


def parts_of_each(
    shapes: Mapping[str, tuple[int, ...]], vectors: Sequence[Sequence[PickledTensor]], directory: Path
) -> dict[str, Source]:
    """ZeRO 3: each rank's vector holds its part of each parameter."""
    found: dict[str, Source] = {}
    wholes, offset = [all_rows(of_rank) for of_rank in vectors], 0
    for name, shape in shapes.items():
        part = -(-math.prod(shape) // len(wholes))
        joined = Rows(tuple((whole, offset, offset + part) for whole in wholes))
        found[name] = Reshaped(Rows(((joined, 0, math.prod(shape)),)), shape)
        offset += part
    if any(whole.shape[0] != offset for whole in wholes):
        raise does_not_fit(directory)
    return found


def frozen_parts(models: Sequence[Mapping[str, Any]]) -> dict[str, Source]:
    """ZeRO 3: parameters that were not trained, whose parts are in the ranks' model states."""
    found: dict[str, Source] = {}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        joined = all_rows([model["frozen_param_fragments"][name] for model in models])
        found[name] = Reshaped(Rows(((joined, 0, math.prod(shape)),)), shape)
    return found


def does_not_fit(directory: Path) -> UserError:
    """The error for vectors of other lengths than the shapes say."""
    return UserError(f"{directory}: the optimizer's files do not fit the shapes in the model's. Are they of one step?")
