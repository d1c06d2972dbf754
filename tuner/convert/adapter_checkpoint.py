"""A checkpoint of an adapter's run: to the directory that peft loads, and to the model that it was, to compare with."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tuner.convert.adapter_files import read_adapter
from tuner.convert.checkpoint_files import checkpoint_tensors, companions
from tuner.convert.reload import Origin
from tuner.convert.requantised import requantise_module
from tuner.convert.settings import linked, write_json, write_tokenizer
from tuner.convert.tensors import Piece, cast
from tuner.engine.tensor_files import WEIGHTS, TensorFiles
from tuner.model.adapter import BASE_NOTE, LoRA, export_name
from tuner.model.build import build_llm
from tuner.model.directory import ADAPTER
from tuner.model.peft_package import load_peft

COMPUTE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TOLERANCE = 1e-4  # of logits in float32: peft adds W x and B A x in another order


def is_adapter_checkpoint(checkpoint: Path) -> bool:
    """Whether a run trained an adapter, and not all weights."""
    return any(path.name == ADAPTER for path in companions(checkpoint))


def adapter_pieces(checkpoint: Path, dtype: torch.dtype | None) -> list[Piece]:
    """The trained tensors by peft's names."""
    return [cast(tensor, dtype, export_name(name)) for name, tensor in checkpoint_tensors(checkpoint).items()]


def write_adapter_settings(checkpoint: Path, out: Path) -> None:
    """adapter_config.json, tokenizer, chat template, stop tokens, and what base there was, quantised how."""
    state = read_state(checkpoint)
    with linked(companions(checkpoint)) as source:
        (out / ADAPTER).write_bytes((source / ADAPTER).read_bytes())
        note = json.loads((source / BASE_NOTE).read_text(encoding="utf-8"))
        note |= {"quantise": state["adapter"]["quantise"], "compute_dtype": COMPUTE[state["settings"]["precision"]]}
        write_json(out / BASE_NOTE, note)
        write_tokenizer(source, out)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def load_base(checkpoint: Path, adapter: LoRA | None = None) -> PreTrainedModel:
    """The base that a checkpoint names, in float32, with an untrained adapter or without."""
    note = json.loads((checkpoint / "hf" / BASE_NOTE).read_text(encoding="utf-8"))
    return build_llm(note["path"], weights=note["weights"], seed=note["seed"], attention="eager", adapter=adapter)


def adapter_origin(checkpoint: Path) -> Origin:
    """What the fresh process compares with: the checkpoint's tensors, and the model that training would go on with."""
    return Origin(
        settings=checkpoint / "hf",
        tensors=partial(exported_tensors, checkpoint),
        model=partial(load_trained_adapter, checkpoint),
        written=partial(load_with_peft, checkpoint),
        max_length=read_state(checkpoint)["settings"].get("max_length"),
        tolerance=TOLERANCE,
    )


def exported_tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values, as training itself would read them, by peft's names."""
    for name, tensor in TensorFiles(checkpoint, WEIGHTS).items():
        yield export_name(name), tensor


def load_trained_adapter(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Base and adapter put together as training does it, in float32 whatever `dtype` says."""
    facts = read_state(checkpoint)["adapter"]
    lora = LoRA(
        rank=facts["rank"],
        alpha=facts["alpha"],
        variant=facts["variant"],
        quantise=facts["quantise"],
        targets=[name.rpartition("*.")[2] for name in facts["targets"]],
        modules_to_save=facts["modules_to_save"],
    )
    llm = load_base(checkpoint, lora)
    weights = dict(llm.named_parameters())
    with torch.no_grad():
        for name, tensor in TensorFiles(checkpoint, WEIGHTS).items():
            weights[name].copy_(tensor)
    return llm


def load_with_peft(checkpoint: Path, draft: Path) -> PreTrainedModel:
    """The base as transformers has it, and what was written as peft loads it; float32."""
    peft = load_peft()

    llm = load_base(checkpoint)
    if read_state(checkpoint)["adapter"]["quantise"]:
        for name in read_adapter(draft).changes:
            requantise_module(llm, name)
    return peft.PeftModel.from_pretrained(llm, draft)
