"""What DeepSpeed is told: a preset or a JSON file, with sizes from the model and everything else from the config."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from tuner.errors import UserError
from tuner.model.hollow import whole_shape
from tuner.nearest import did_you_mean, did_you_mean_or_all

ZERO = "zero_optimization"
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload_optimizer": {}},
    "zero3_offload": {"stage": 3, "offload_optimizer": {}, "offload_param": {}},
    "zero3_hpz": {"stage": 3, "zero_hpz_partition_size": "auto"},
}
OFFLOADED = ("offload_optimizer", "offload_param")
SMALLEST_BUCKET = 100_000  # elements; below, a step is many small messages
LARGEST_BUCKET = 200_000_000
MASTERS = "the weights that the optimizer changes, and its state, are fp32 here"
SUMS = "gradients are summed over all ranks, since each loss is its part of the step's"
# keys of a JSON file that the config's own settings decide; what to set instead
OWN_SETTINGS = {
    "train_batch_size": "num_accumulation_steps decides how many packs make a step",
    "train_micro_batch_size_per_gpu": "a micro-batch is one pack, of max_length tokens",
    "gradient_accumulation_steps": "num_accumulation_steps decides how many packs make a step",
    "managed_gradient_accumulation": "num_accumulation_steps decides how many packs make a step",
    "optimizer": "optim_wrapper has the optimizer: lr, betas and weight_decay are settings",
    "scheduler": "param_scheduler has the schedule: warmup_ratio and min_lr_ratio are settings",
    "gradient_allreduce_op": SUMS,
    "gradient_predivide_factor": SUMS,
    "prescale_gradients": SUMS,
    "torch_autocast": "precision decides what the model computes in",
    "data_types": "precision decides what the model computes in, and gradients are added up in fp32",
    "sequence_parallel_size": "the setting sequence_parallel_size decides it",
    "fp16.auto_cast": "precision decides what the model computes in",
    "fp16.fp16_master_weights_and_grads": MASTERS,
    "bf16.bf16_master_weights_and_grads": MASTERS,
    "bf16.bf16_optimizer_states": MASTERS,
    "zero_optimization.compute_grad_norm": "the norm is logged, and clipped by, at every step",
}
# keys of a JSON file for parts of DeepSpeed that nothing here goes through
UNUSED = (
    *("autotuning", "checkpoint", "compile", "data_efficiency", "datastates_ckpt", "expert_parallel", "hybrid_engine"),
    *("pipeline", "tensor_parallel", "weight_quantization", "dataloader_drop_last", "activation_checkpointing"),
    *("zero_optimization.zenflow", "zero_optimization.elastic_checkpoint", "zero_optimization.legacy_stage1"),
    *("zero_optimization.offload_optimizer.super_offload", "zero_optimization.offload_optimizer.ratio"),
)
REPLACED = {
    "zero_optimization.mics_shard_size": 'Set "zero_hpz_partition_size" for a sharding within nodes.',
    "zero_optimization.mics_hierarchical_params_gather": 'Set "zero_hpz_partition_size" for a sharding within nodes.',
}


class ModelSizes(NamedTuple):
    """In elements: what bucket sizes follow from."""

    hidden: int
    layer: int  # the largest decoder layer, or of a model without layers the whole of it

    @classmethod
    def of(cls, llm: nn.Module) -> "ModelSizes":
        """Those of a causal LM of transformers; its parameters may be on the meta device or partitioned."""
        config = llm.config.get_text_config()
        total = sum(whole_shape(parameter).numel() for parameter in llm.parameters())
        return cls(config.hidden_size, total // max(1, getattr(config, "num_hidden_layers", 1)))


class Settings(NamedTuple):
    """What the config and the launch say, and no JSON file may contradict."""

    precision: str = "bf16"
    max_grad_norm: float | Literal["unknown"] | None = None
    world_size: int | None = 1  # None where it is not known yet
    local_size: int = 1  # ranks of a node
    offload_directory: str | None = None  # None offloads to the CPU's memory
    hpz_partition_size: int | None = None  # None is the ranks of a node
    has_cuda: bool = True


def read_choice(choice: str) -> dict[str, Any]:
    """A preset's name, or the path of a JSON file, as a dict that says what the user said.

    Raises:
        UserError: no preset has this name and no file is there, or the file is not JSON.
    """
    if choice in PRESETS:
        return {ZERO: dict(PRESETS[choice])}
    path = Path(choice).expanduser()
    if not path.is_file():
        near = did_you_mean_or_all(choice, PRESETS)
        what = f"There is no file {choice}" if choice.endswith(".json") else f"deepspeed={choice!r} is no preset"
        raise UserError(f"{what}.{near} Or give the path of a JSON file for DeepSpeed.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{choice} cannot be read as JSON for DeepSpeed: {error}") from error
    if not isinstance(given, dict):
        raise UserError(f"{choice} holds a {type(given).__name__}; DeepSpeed's JSON is an object with keys.")
    return given


def zero_stage(choice: str) -> int:
    """Of a preset or a file."""
    section = read_choice(choice).get(ZERO)
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    if stage not in (1, 2, 3):
        raise UserError(
            f'{choice}: "zero_optimization": {{"stage": {stage}}} shards nothing. Choose stage 1, 2 or 3, '
            "or leave deepspeed out."
        )
    return stage


def zero_config(
    choice: str, settings: Settings, known: Mapping[str, Iterable[str]], sizes: ModelSizes | None = None
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets.

    Args:
        choice: a name of `PRESETS` or the path of a JSON file; "auto" in it stands for what is derived here.
        known: keys that the installed DeepSpeed reads, by section.
        sizes: of the model; None leaves sizes out, which is enough to find mistakes.

    Raises:
        UserError: one message for all unknown keys and contradictions.
    """
    given = without_auto(read_choice(choice))
    stage = zero_stage(choice)
    problems = [*unknown_keys(given, known), *contradictions(given, settings)]
    section = {**(derived_sizes(sizes, stage) if sizes else {}), **given.get(ZERO, {})}
    problems += offload(section, settings)
    problems += partition(section, settings, wanted=choice == "zero3_hpz")
    if problems:
        raise UserError("\n".join(f"{choice}: {problem}" for problem in problems))
    section.setdefault("overlap_comm", settings.has_cuda)
    precision = {name: {"enabled": name == settings.precision, **fitting(name, settings, given)} for name in HALVES}
    rest = {key: value for key, value in given.items() if key not in (ZERO, *HALVES)}
    return {
        "communication_data_type": "fp32",
        **rest,
        **precision,
        "data_types": {"grad_accum_dtype": "fp32"},
        ZERO: section,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0 if settings.max_grad_norm in (None, "unknown") else settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW has a fused step for the CPU: nothing is compiled
        **({"gradient_allreduce_op": "sum"} if stage < 3 else {}),  # stage 3 knows the mean alone
    }


HALVES: dict[str, dict[str, Any]] = {
    "bf16": {"check_grad_overflow": False},  # found before the step, on all ranks
    # as torch's GradScaler: halve at once, double after 2000 steps
    "fp16": {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1, "min_loss_scale": 1},
}


def check_ranks(choice: str, settings: Settings) -> None:
    """UserError where what is asked for does not fit the number of ranks."""
    section = without_auto(read_choice(choice)).get(ZERO, {})
    for problem in partition(section, settings, wanted=choice == "zero3_hpz"):
        raise UserError(f"{choice}: {problem}")


def fitting(name: str, settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the section "bf16" or "fp16", where it is the one in use."""
    if name != settings.precision:
        return {}
    return {**HALVES[name], **{key: value for key, value in given.get(name, {}).items() if key != "enabled"}}


def derived_sizes(sizes: ModelSizes, stage: int) -> dict[str, Any]:
    """Buckets of about a layer (stage 1 and 2) or of a matrix of it (stage 3), where layers are fetched ahead."""
    if stage < 3:
        bucket = bounded(sizes.layer)
        return {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    matrix = bounded(sizes.hidden**2)
    return {
        "reduce_bucket_size": matrix,
        "stage3_prefetch_bucket_size": matrix * 9 // 10,
        "stage3_param_persistence_threshold": 10 * sizes.hidden,  # norms and biases stay whole on every rank
    }


def bounded(size: int) -> int:
    """An even number of elements that is neither a drop nor a flood."""
    return min(max(size, SMALLEST_BUCKET), LARGEST_BUCKET) // 2 * 2


def without_auto(value: Any) -> Any:
    """The dict without keys whose value is "auto": those are derived."""
    if not isinstance(value, dict):
        return value
    return {key: without_auto(part) for key, part in value.items() if part != "auto"}


def unknown_keys(given: Mapping[str, Any], known: Mapping[str, Iterable[str]], path: str = "") -> list[str]:
    """What DeepSpeed would pass over in silence, or has removed."""
    problems = []
    for key, value in given.items():
        dotted = f"{path}.{key}".lstrip(".")
        if path in known and key not in known[path] and dotted not in OWN_SETTINGS:
            remedy = REPLACED.get(dotted, did_you_mean(key, known[path]).lstrip()) or "Remove it."
            problems.append(f"{dotted!r} is no key of the installed DeepSpeed. {remedy}")
        elif isinstance(value, dict):
            problems += unknown_keys(value, known, dotted)
    return problems


def contradictions(given: Mapping[str, Any], settings: Settings) -> list[str]:
    """Keys of the file that the config decides: it wins, and the file must not say otherwise."""
    flat = dict(flatten(given))
    problems = []
    for key, reason in OWN_SETTINGS.items():
        if any(name == key or name.startswith(f"{key}.") for name in flat):
            problems.append(f"{key!r} is decided by the config ({reason}). Remove it from the file.")
    for key in UNUSED:
        if any(name == key or name.startswith(f"{key}.") for name in flat):
            problems.append(f"{key!r} has no effect on what is trained here. Remove it from the file.")
    clipping = flat.get("gradient_clipping")
    if clipping is not None and settings.max_grad_norm not in (clipping or None, "unknown"):
        problems.append(
            f"'gradient_clipping' is {clipping}, the config's max_grad_norm {settings.max_grad_norm}. "
            f"The config decides: remove the key, or set max_grad_norm={clipping or None}."
        )
    for name in HALVES:
        enabled = flat.get(f"{name}.enabled")
        if enabled is not None and enabled != (name == settings.precision):
            problems.append(
                f"'{name}.enabled' is {enabled}, the config's precision {settings.precision!r}. The config decides: "
                f"remove the key, or set precision={name if enabled else 'fp32'!r}."
            )
    return problems


def flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted paths and values of what is no dict; an empty dict is a value."""
    if not isinstance(value, dict) or not value:
        return [(path, value)] if path else []
    return [pair for key, part in value.items() for pair in flatten(part, f"{path}.{key}".lstrip("."))]


def offload(section: dict[str, Any], settings: Settings) -> list[str]:
    """Fill in where to: to the CPU's memory, or to files in `offload_directory`; returns what is wrong."""
    names = [name for name in OFFLOADED if name in section]
    directory = settings.offload_directory
    if directory is not None and (section["stage"] < 3 or not names):
        return [
            f"offload_directory={directory!r} needs ZeRO-3 with offloading. Set deepspeed='zero3_offload', "
            "or leave the directory out."
        ]
    problems = []
    for name in names:
        target = {"device": "nvme", "nvme_path": directory} if directory else {"device": "cpu"}
        section[name] = {**target, "pin_memory": settings.has_cuda, **section[name]}
        if directory and section[name].get("nvme_path") != directory:
            problems.append(
                f"'{ZERO}.{name}.nvme_path' is {section[name].get('nvme_path')!r}, the config's offload_directory "
                f"{directory!r}. Remove one of them."
            )
        if section[name]["device"] == "nvme" and not section[name].get("nvme_path"):
            problems.append(f"'{ZERO}.{name}' goes to nvme, but where? Set offload_directory in the config.")
    return problems


def partition(section: dict[str, Any], settings: Settings, *, wanted: bool) -> list[str]:
    """Fill in the ranks that keep a second copy of the weights among them; returns what is wrong."""
    key, size = "zero_hpz_partition_size", settings.hpz_partition_size
    in_file = section.get(key)
    if size is not None and not (wanted or in_file is not None):
        return [f"hpz_partition_size={size} needs deepspeed='zero3_hpz'. Set that, or leave the size out."]
    if size is not None and in_file not in (None, size):
        return [f"{key!r} is {in_file}, the config's hpz_partition_size {size}. Remove one of them."]
    if in_file is None and not wanted:
        return []
    size = size or in_file or settings.local_size
    section[key] = size
    if settings.world_size is None:
        return []
    legal = [number for number in range(1, settings.world_size + 1) if settings.world_size % number == 0]
    if size not in legal:
        return [
            f"{key} {size} does not divide the {settings.world_size} ranks of this run. "
            f"Sizes that do: {', '.join(map(str, legal))}."
        ]
    return []
