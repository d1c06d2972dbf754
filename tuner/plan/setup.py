"""What is asked of each rank, read from a config and the machines it is meant for; no weights and no GPU are needed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from tuner.engine.in_backward import is_wanted
from tuner.engine.precision import PRECISIONS
from tuner.engine.zero_config import read_choice
from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.model.adapter import LoRA
from tuner.model.build import build_llm, read_config
from tuner.model.checkpointing import Choice
from tuner.parallel.mesh import Degrees, arrange, check_heads, head_counts, read_degrees
from tuner.plan.known_models import known_model
from tuner.plan.needles import Passes, passes_of
from tuner.plan.trace import Computation, Loss


class Setup(NamedTuple):
    """A model, how it is held over ranks, and what a rank computes at a time."""

    model: PreTrainedConfig
    num_tokens: int  # of a pack
    num_ranks: int = 1
    ranks_per_node: int = 8
    holding: str = "none"  # "none", "fsdp", or a name or file of DeepSpeed
    precision: str = "bf16"
    degrees: Degrees = Degrees()
    checkpointing: Choice = False
    tile_tokens: int | None = None
    offload_activations: bool = False
    num_accumulation_steps: int = 1
    lora: LoRA | None = None
    optimizer: str = "adamw"
    loss: Loss = "chunked"
    on_cpu: bool = False
    hpz_size: int | None = None
    hybrid: bool = False
    in_backward: bool = False  # the optimizer steps there, a gradient at a time
    offload_directory: str | None = None
    needles: Passes | None = None

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without."""
        return int(self.zero.get("stage", 0))

    @property
    def zero(self) -> Mapping[str, Any]:
        """What DeepSpeed is told of ZeRO."""
        return {} if self.holding in ("none", "fsdp") else read_choice(self.holding).get("zero_optimization", {})

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute precision."""
        return PRECISIONS[self.precision].itemsize

    def computation(self) -> Computation:
        """What is traced: weights in fp32 under autocast, as FSDP2 gathers them, or as ZeRO holds them."""
        compute = PRECISIONS[self.precision]
        is_lower = self.precision != "fp32"
        weights = torch.float32 if self.holding == "none" else compute
        autocast = compute if is_lower and self.holding in ("none", "fsdp") else None
        return Computation(
            model=self.model,
            num_tokens=self.num_tokens,
            weight_dtype=weights,
            autocast=autocast,
            degrees=self.degrees,
            checkpointing=self.checkpointing,
            tile_tokens=self.tile_tokens,
            offload_activations=self.offload_activations,
            lora=self.lora,
            loss=self.loss,
            kernel="sdpa" if self.on_cpu or not is_lower else "flash",
        )

    def scoring(self) -> Computation | None:
        """What is traced of needle passes: nothing is kept for a backward."""
        if self.needles is None:
            return None
        size = self.degrees.size
        return self.computation()._replace(
            num_tokens=-(-self.needles.num_tokens // size) * size,
            checkpointing=False,
            offload_activations=False,
            num_scored=-(-self.needles.num_scored // size),
        )


def read_setup(config: Any, num_ranks: int, ranks_per_node: int) -> tuple[Setup, str]:
    """Of a loaded config of tuner, and where its model's shapes come from.

    Raises:
        UserError: another model than an SFT on `build_llm`, or ranks that do not fit.
    """
    node = config.model.get("llm", {})
    if config.model.get("type") is not SFT or node.get("type") is not build_llm:
        raise UserError("plan knows model = dict(type=SFT, llm=dict(type=build_llm, ...)) and no other model.")
    model, source = model_of(node["path"])
    if not hasattr(model.get_text_config(), "num_attention_heads"):
        raise UserError(f"plan knows models whose layers have attention; {node['path']} is a {model.model_type}.")
    strategy = config.strategy
    degrees = read_degrees(strategy.get("sequence_parallel_size", 1))
    arrange(num_ranks, degrees)
    check_heads(*head_counts(model.get_text_config()), degrees.ulysses)
    length = longest_pack(config.train_dataloader)
    memory = node.get("memory") or {}
    setup = Setup(
        model=model,
        num_tokens=-(-length // degrees.size) * degrees.size,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        holding="fsdp" if strategy.get("fsdp") else strategy.get("deepspeed") or "none",
        precision=strategy.get("precision", "bf16"),
        degrees=degrees,
        checkpointing=memory.get("gradient_checkpointing", False),
        tile_tokens=memory.get("tile_tokens"),
        offload_activations=memory.get("offload_activations", False),
        num_accumulation_steps=config.train_dataloader.get("num_accumulation_steps", 1),
        lora=lora_of(node.get("adapter")),
        optimizer=config.optim_wrapper["optimizer"].get("kind", "adamw"),
        on_cpu=strategy.get("device") == "cpu",
        hpz_size=strategy.get("hpz_partition_size"),
        hybrid=strategy.get("fsdp") == "hybrid",
        in_backward=is_wanted(config.optim_wrapper),
        offload_directory=strategy.get("offload_directory"),
        needles=passes_of(config),
    )
    return setup, source


def longest_pack(dataloader: Any) -> int:
    """Tokens of the longest packs of a config's dataloader, perhaps those of a stage."""
    own = dataloader["dataset"]["max_length"]
    return int(max([stage.get("max_length", own) for stage in dataloader.get("stages") or []], default=own))


def model_of(path: str) -> tuple[PreTrainedConfig, str]:
    """The model's config.json, or, of a known model that cannot be fetched, the shapes that it is known to have."""
    try:
        return read_config(path), "its config.json"
    except UserError:
        known = known_model(path)
        if known is None:
            raise
        return known, "the table in tuner/plan/known_models.py, since its config.json is not here"


def lora_of(node: Any) -> LoRA | None:
    """The adapter that a config asks for."""
    if node is None:
        return None
    return LoRA(**{name: value for name, value in node.items() if name != "type"})
