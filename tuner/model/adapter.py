"""LoRA and its kin, put into a language model in place by peft: what trains, what is kept of it, and by which names."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.model.adapter_weights import AttachedWeights, fill, quantise_linear
from tuner.model.fingerprint import Base
from tuner.model.hollow import Hold
from tuner.model.peft_package import load_peft
from tuner.nearest import did_you_mean

VARIANTS = ("lora", "rslora", "dora")
QUANTISED = ("nf4",)
BASE_NOTE = "base.json"
NAME = "default"
"""peft's name of the one adapter that there is"""


@dataclass(frozen=True)
class LoRA:
    """W x + scale * B A x, with A (rank, inputs) and B (outputs, rank) trained and W frozen: arXiv 2106.09685.

    Args:
        rank: of the change.
        alpha: scale is alpha / rank, or alpha / sqrt(rank) of "rslora" (arXiv 2312.03732).
        dropout: probability with which a value of x does not reach A in training.
        targets: ends of the names of linear layers; "auto" is all of them but the head. InternLM2's are `wqkv` (query,
            key and value in one), `wo`, `w1` (gate), `w3` (up), `w2` (down) and the head `output`.
        modules_to_save: ends of the names of modules that train whole and are saved: "tok_embeddings", "output".
        variant: "dora" also trains the length of each row of W + scale * B A (arXiv 2402.09353).
        quantise: "nf4" keeps W of the targets in 4 bits (QLoRA, arXiv 2305.14314); the rest stays as it is.

    Raises:
        UserError: a value that has no meaning.
    """

    rank: int = 64
    alpha: float = 128
    dropout: float = 0.0
    targets: Literal["auto"] | Iterable[str] = "auto"
    modules_to_save: Iterable[str] = ()
    variant: Literal["lora", "rslora", "dora"] = "lora"
    quantise: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}: allowed are a rank from 1, an alpha "
                "above 0, a dropout from 0 to below 1."
            )
        for name, value, known in (
            ("variant", self.variant, VARIANTS),
            ("quantise", self.quantise, (None, *QUANTISED)),
        ):
            if value not in known:
                raise UserError(f"{name}={value!r}: choose one of {', '.join(map(str, known))}.")


@dataclass(frozen=True)
class Attached:
    """What was put into a model, and which it was before."""

    lora: LoRA
    base: Base
    targets: tuple[str, ...]
    modules_to_save: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """What must be the same where training goes on, for JSON; equal adapters of equal bases have equal facts."""
        kept = {key: value for key, value in asdict(self.lora).items() if key not in ("dropout", "targets")}
        return {
            "tuning": "qlora" if self.lora.quantise else "lora",
            **kept,
            "targets": list(self.targets),
            "modules_to_save": list(self.modules_to_save),
            "base": self.base.fingerprint(),
        }


def attach(
    llm: PreTrainedModel, lora: LoRA, base: Base, *, weights: Mapping[str, Tensor], hold: Hold | None = None
) -> None:
    """Put an adapter into `llm` in place: its targets are peft's layers, and only adapter and saved modules train.

    A's begin drawn as peft draws them, from the base's seed and the name of each, the same on all ranks; B's are zero,
    so the model begins as the base.

    Args:
        llm: may lie on the meta device.
        lora: what to put in.
        base: the model as it was.
        weights: its parameters and persistent buffers by name.
        hold: takes the model and all its tensors, the adapter's among them; None puts them on the CPU in fp32.

    Raises:
        UserError: no layer has such a name, or one that cannot have an adapter.
    """
    targets = find_targets(llm, lora.targets)
    saved = find_modules(llm, lora.modules_to_save, targets)
    inject(llm, lora, targets, base)
    for name in saved:
        llm.get_submodule(name).requires_grad_(True)
    llm.tuner_adapter = Attached(lora, base, ends_of(targets), tuple(saved))
    if lora.quantise is not None:
        for name in targets:
            quantise_linear(llm.get_submodule(name))
    (hold or fill)(llm, AttachedWeights(llm, weights, seed=base.seed))


def inject(llm: PreTrainedModel, lora: LoRA, targets: list[str], base: Base) -> None:
    """Replace the targets by peft's layers, whose own weights lie on the meta device."""
    peft = load_peft()

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=shortest_ends(llm, targets),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.place,
    )
    peft.inject_adapter_in_model(config, llm, adapter_name=NAME, low_cpu_mem_usage=True)


def find_targets(llm: PreTrainedModel, wanted: Literal["auto"] | Iterable[str]) -> list[str]:
    """Full names of the linear layers that end in one of `wanted`; "auto" is all but the head.

    Raises:
        UserError: an end that no linear layer has.
    """
    linear = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    head = next((name for name in linear if llm.get_submodule(name) is llm.get_output_embeddings()), None)
    if wanted == "auto":
        return [name for name in linear if name != head]
    found = []
    for end in [wanted] if isinstance(wanted, str) else wanted:
        names = [name for name in linear if is_end(end, name)]
        if not names:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"targets: {type(llm).__name__} has no linear layer {end!r}.{did_you_mean(end, known)} It has "
                f"{', '.join(known)}. Embeddings train whole, as modules_to_save."
            )
        found += names
    return list(dict.fromkeys(found))


def find_modules(llm: PreTrainedModel, wanted: Iterable[str], targets: list[str]) -> list[str]:
    """Full names of the modules that train whole.

    Raises:
        UserError: an end that no module has, or one that holds a target, or a weight that stands in two places.
    """
    places: dict[nn.Parameter, int] = {}
    for _, parameter in llm.named_parameters(remove_duplicate=False):
        places[parameter] = places.get(parameter, 0) + 1
    found = []
    for end in [wanted] if isinstance(wanted, str) else wanted:
        names = [name for name, _ in llm.named_modules() if is_end(end, name)]
        if not names:
            known = sorted({name.rpartition(".")[2] for name, _ in llm.named_modules() if name})
            raise UserError(f"modules_to_save: {type(llm).__name__} has no module {end!r}.{did_you_mean(end, known)}")
        if both := [target for target in targets if any(f"{target}.".startswith(f"{name}.") for name in names)]:
            raise UserError(f"modules_to_save: {end!r} trains whole, but {both[0]} has an adapter. Choose one of them.")
        if any(places[parameter] > 1 for name in names for parameter in llm.get_submodule(name).parameters()):
            raise UserError(
                f"modules_to_save: {end!r} shares its weight with another module (tie_word_embeddings), and who loads "
                "the adapter would change only one of them. Leave it out, or train all weights."
            )
        found += names
    return list(dict.fromkeys(found))


def is_end(end: str, name: str) -> bool:
    """Whether a name is `end`, or ends in it behind a dot, as peft compares them."""
    return name == end or name.endswith(f".{end}")


def shortest_ends(llm: nn.Module, targets: list[str]) -> list[str]:
    """Last parts of the targets' names where they name nothing else, as people write them; else the whole names."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    meant = [name for name, _ in llm.named_modules() if name.rpartition(".")[2] in ends]
    return ends if meant == targets else list(targets)


def ends_of(names: Iterable[str]) -> tuple[str, ...]:
    """Full names without the numbers of layers: `model.layers.0.attention.wo` -> `model.layers.*.attention.wo`."""
    parts = (["*" if part.isdecimal() else part for part in name.split(".")] for name in names)
    return tuple(sorted({".".join(part) for part in parts}))


def adapter_of(llm: nn.Module) -> Attached | None:
    """What `attach` put into a model."""
    return llm.__dict__.get("tuner_adapter")


def kept_parameters(llm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint holds: all parameters, or of a model with an adapter those that train."""
    everything = adapter_of(llm) is None
    return ((name, weight) for name, weight in llm.named_parameters() if everything or weight.requires_grad)


def adapter_facts(llm: nn.Module) -> dict[str, Any]:
    """Of the adapter in a model, or that there is none."""
    attached = adapter_of(llm)
    return {"tuning": "full"} if attached is None else attached.facts()


def export_name(name: str) -> str:
    """A trained parameter's name in a checkpoint -> its key in peft's adapter_model.safetensors."""
    for kind in ("lora_A", "lora_B"):
        name = name.replace(f".{kind}.{NAME}.", f".{kind}.")
    return "base_model.model." + name.replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector")


def export_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint by peft's keys, as `PeftModel.from_pretrained` reads them."""
    return {export_name(name): tensor for name, tensor in tensors.items()}


def write_adapter_notes(directory: Path, llm: nn.Module) -> None:
    """adapter_config.json as peft writes it, and base.json: where the base lay, and its fingerprint; or nothing."""
    attached = adapter_of(llm)
    if attached is None:
        return
    settings = llm.peft_config[NAME].to_dict()
    settings |= {"inference_mode": True, "modules_to_save": list(attached.modules_to_save) or None}
    settings["target_modules"] = sorted(settings["target_modules"])
    write = {"adapter_config.json": settings, BASE_NOTE: attached.base.note()}
    for name, content in write.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def set_compute_dtype(llm: nn.Module, dtype: torch.dtype) -> None:
    """Let the frozen linear layers of a model with an adapter be kept, or dequantised, in what they compute in.

    Under autocast they would be cast at every use, to the same numbers. A weight that is the embedding's too stays.
    """
    if adapter_of(llm) is None:
        return
    embedding = llm.get_input_embeddings().weight
    for module in llm.modules():
        if not isinstance(module, nn.Linear) or module.weight is embedding or module.weight.requires_grad:
            continue
        weight = module.weight
        if (state := getattr(weight, "quant_state", None)) is not None:
            module.compute_dtype = state.dtype = dtype
        else:
            weight.data = weight.data.to(dtype)
