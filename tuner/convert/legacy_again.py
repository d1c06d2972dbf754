"""Old files read once more, each tensor whole: what a fresh process compares with what was written."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tuner.convert.adapter_checkpoint import TOLERANCE
from tuner.convert.layout import Source
from tuner.convert.legacy_files import fitted, read_weights
from tuner.convert.old_adapter import MAX_TEXT, adapter_pieces, is_adapter
from tuner.convert.pickled import PickledTensor
from tuner.convert.reload import Origin, model_of
from tuner.model.directory import check_weights
from tuner.model.peft_package import load_peft

MAX_LENGTH = re.compile(r"\bmax_length\s*=\s*(\d{1,9})\b")
PEFT = "base_model.model."


def origin_of(source: Path, draft: Path, base: Path | None, texts: list[str], alpha: float | None) -> Origin:
    """An old file, to compare with what was made of it.

    Args:
        source: file or directory.
        draft: what is written, which has all that is known of the model where `base` is None.
        base: the model directory that was given.
        texts: beside the weights; a config among them may state the trained length.
        alpha: of LoRA weights; None where they are a whole model's.
    """
    lengths = {int(value) for text in texts for value in MAX_LENGTH.findall(text[:MAX_TEXT])}
    return Origin(
        settings=draft if base is None else base,
        words=None if alpha is None else draft,  # an adapter brings no tokenizer
        tensors=partial(written_tensors, source, base),
        model=partial(load_whole, source, base) if alpha is None else partial(load_changed, source, base, alpha),
        max_length=lengths.pop() if len(lengths) == 1 else None,
        written=None if alpha is None else partial(load_with_peft, base),
        tolerance=0.0 if alpha is None else TOLERANCE,
    )


def written_tensors(source: Path, base: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of what must have been written."""
    weights, _ = read_weights(source)
    if is_adapter(weights):
        for piece in adapter_pieces(weights)[0]:
            yield piece.name, torch.cat([block.flatten() for block in piece.blocks()]).view(piece.shape)
        return
    for name, tensor in (weights if base is None else fitted(weights, base, source)).items():
        yield name, whole(tensor)


def whole(tensor: Source) -> torch.Tensor:
    """All of it, at once."""
    if isinstance(tensor, PickledTensor):
        return tensor.whole()
    return tensor.rows(0, tensor.shape[0]) if tensor.shape else tensor.rows(0, 1).view(())


def load_whole(source: Path, base: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model of the base's config with the old weights."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    return model_of(config, dict(written_tensors(source, base)), dtype)


def load_changed(source: Path, base: Path | None, alpha: float, dtype: torch.dtype) -> PreTrainedModel:
    """The base with alpha / rank * B A added to its weights in float64, and the modules that were trained whole."""
    llm = load_base(base, dtype)
    tensors = {name.removeprefix(PEFT): tensor for name, tensor in written_tensors(source, base)}
    with torch.no_grad():
        for name, tensor in tensors.items():
            module, _, side = name.partition(".lora_")
            if not side:
                llm.get_parameter(name).copy_(tensor)
            elif side.startswith("A"):
                other = tensors[f"{module}.lora_B.weight"].double()
                weight = llm.get_parameter(f"{module}.weight")
                weight.copy_(weight.double() + alpha / len(tensor) * other @ tensor.double())
    return llm


def load_with_peft(base: Path | None, draft: Path) -> PreTrainedModel:
    """The base with what was written, as peft loads it; float32."""
    return load_peft().PeftModel.from_pretrained(load_base(base, torch.float32), draft)


def load_base(base: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The base's own weights. Raises UserError where the directory has none, as where it was given for its config."""
    check_weights(str(base))
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, trust_remote_code=False)
