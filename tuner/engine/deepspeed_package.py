"""DeepSpeed, imported only where a config asks for it, and kept from compiling kernels where no GPU would run them."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tuner.engine.world import BACKENDS, World
from tuner.engine.zero_config import Settings, zero_config
from tuner.errors import UserError

SHARED_MEMORY = "deepspeed_shm_comm"
"""collectives of DeepSpeed's own on CPUs: building them takes minutes, and a killed build leaves a lock that hangs"""


@cache
def load_deepspeed() -> ModuleType:
    """The package, with its accelerator chosen and its chatter turned down to warnings.

    Raises:
        UserError: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"The config asks for DeepSpeed, which cannot be imported ({error}). "
            "Install it: pip install 'tuner[deepspeed]'."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # the import has set its own
    # said at each of its thousands of calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        importlib.import_module("deepspeed.ops").__compatible_ops__[SHARED_MEMORY] = False
    return deepspeed


def build_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> Any:
    """DeepSpeed's engine, with its ZeRO optimizer at every stage and in every precision.

    For stage 1 in bf16 with gradients in fp32 `initialize` takes its `BF16_Optimizer`, another class, which sums into a
    second whole set of fp32 gradients and has none of the other's fields. The ZeRO optimizer sums in fp32 as well, and
    does so for fp16 at that stage.
    """
    engine = importlib.import_module("deepspeed.runtime.engine")
    choose = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(self: Any, basic_optimizer: torch.optim.Optimizer) -> str:
        chosen = choose(self, basic_optimizer)
        return engine.ZERO_OPTIMIZATION if chosen == engine.BFLOAT16 else chosen

    engine.DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        return load_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]
    finally:
        engine.DeepSpeedEngine._do_optimizer_sanity_check = choose


def join_alone(world: World, device: torch.device) -> None:
    """DeepSpeed asks for a process group and LOCAL_RANK also where there is one process."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.size == 1 and not dist.is_initialized():
        dist.init_process_group(BACKENDS[device.type], store=dist.HashStore(), rank=0, world_size=1)


def check_choice(choice: str, settings: Settings) -> None:
    """UserError for a preset or JSON file that DeepSpeed, or the config's settings, would not take."""
    config = zero_config(choice, settings, known_keys())
    reader = importlib.import_module("deepspeed.runtime.config")
    try:
        reader.DeepSpeedConfig(config)
    except (ValueError, TypeError, AssertionError, reader.DeepSpeedConfigError) as error:
        raise UserError(f"{choice}: DeepSpeed does not take it: {error}") from error


class Asked(dict):
    """A dict that remembers which keys it was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, and a note that it was asked for."""
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Itself: `name in d.keys()` is a question too."""
        return self

    def __copy__(self) -> "Asked":
        copied = Asked(self)
        copied.names = self.names
        return copied


@cache
def known_keys() -> dict[str, frozenset[str]]:
    """The keys that the installed DeepSpeed reads: "" for the top of its JSON file, and dotted paths to sections.

    DeepSpeed keeps no list of the former and passes over what it does not know, so it is watched while it reads.
    """
    load_deepspeed()
    config = importlib.import_module("deepspeed.runtime.config")
    zero = importlib.import_module("deepspeed.runtime.zero.config")
    offload = importlib.import_module("deepspeed.runtime.zero.offload_config")
    precision = importlib.import_module("deepspeed.runtime.precision_config")
    asked = Asked({"train_micro_batch_size_per_gpu": 1})
    config.DeepSpeedConfig(asked)
    sections = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": precision.DeepSpeedBF16Config,
        "fp16": precision.DeepSpeedFP16Config,
    }
    removed = {"": config._REMOVED_TOP_LEVEL_CONFIG_KEYS, "zero_optimization": config._REMOVED_ZERO_CONFIG_KEYS}
    known = {"": asked.names, **{path: set(_fields(model)) for path, model in sections.items()}}
    return {path: frozenset(names - set(removed.get(path, ()))) for path, names in known.items()}


def _fields(model: Any) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from {name, field.alias or name}
