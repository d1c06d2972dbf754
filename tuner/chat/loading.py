"""What is talked to: a model directory, a checkpoint or a work dir, perhaps with an adapter; never code or pickles."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tuner.dataset.chat_template import CHAT_TEMPLATES, ChatTemplate
from tuner.dataset.jinja_template import recognise, resolve_template
from tuner.dataset.templates import trained_with
from tuner.engine.checkpoint import MANIFEST, checkpoints_directory, find_checkpoint, verify_checkpoint
from tuner.engine.tensor_files import WEIGHTS, TensorFiles
from tuner.errors import UserError
from tuner.model.adapter_directory import check_adapter_weights, is_adapter, read_adapter_config
from tuner.model.adapter_weights import dequantised, quantised
from tuner.model.base_note import check_base, read_base_note
from tuner.model.build import build_llm
from tuner.model.hollow import Hold
from tuner.model.peft_package import load_peft
from tuner.model.tokenizer import build_tokenizer

TEMPLATE_NOTE = "template.json"
WRAPPED = "base_model.model."
"""before the names of a model's tensors, once peft has wrapped the model"""
COVERED = (".base_layer.", ".original_module.")
"""in the names of a base's tensors to which an adapter adds something, or that it replaces"""


class Source(NamedTuple):
    """Where a model comes from. A checkpoint is one of ours, whose hf/ has everything but weights."""

    base: str  # a place that `build_llm` takes
    adapter: Path | None = None  # directory of an adapter's config
    checkpoint: Path | None = None  # that holds the weights: of the adapter where there is one, else of the model
    is_named_by_adapter: bool = False

    @property
    def places(self) -> list[str]:
        """Where files beside the weights are looked for, in this order: an adapter may bring its own."""
        return [str(self.adapter), self.base] if self.adapter is not None else [self.base]


def find_source(model_dir: str, adapter: Path | None) -> Source:
    """What `tuner chat MODEL [--adapter DIR]` means.

    Raises:
        UserError: an adapter in the place of a model beside another, or one whose base is not named.
    """
    if adapter is not None:
        if is_adapter(Path(model_dir)):
            raise UserError(f"{model_dir} is an adapter itself. Give its base model: tuner chat BASE --adapter DIR")
        return with_adapter(model_dir, trained_directory(adapter) if is_trained_here(adapter) else adapter)
    path = Path(model_dir)
    place = trained_directory(path) if is_trained_here(path) else path
    if not is_adapter(place):
        return Source(str(place), checkpoint=place.parent) if place is not path else Source(model_dir)
    base = read_adapter_config(place).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{place} does not name its base model. Give both: tuner chat BASE --adapter {model_dir}")
    return with_adapter(base, place)._replace(is_named_by_adapter=True)


def with_adapter(base: str, directory: Path) -> Source:
    """A base and an adapter, whose weights lie beside its config or, in a checkpoint of ours, above it."""
    return Source(base, directory, directory.parent if (directory.parent / MANIFEST).is_file() else None)


def is_trained_here(path: Path) -> bool:
    """Whether a path is a checkpoint of ours, a work dir, or the checkpoints of one."""
    return (path / MANIFEST).is_file() or checkpoints_directory(path).is_dir() or path.name == "checkpoints"


def trained_directory(path: Path) -> Path:
    """hf/ of the newest checkpoint in a path, of which every byte is as it was saved; no config in it is run."""
    checkpoint = find_checkpoint(path)
    verify_checkpoint(checkpoint)
    return checkpoint / "hf"


def load_llm(source: Source) -> PreTrainedModel:
    """The model of a source, in evaluation mode, on a GPU in bf16 where there is one, else on the CPU in fp32."""
    if source.checkpoint is not None and source.adapter is None:
        llm = build_llm(source.base, weights="random", hold=fill(source.checkpoint))  # none is drawn: all are read
    elif source.adapter is None:
        llm = build_llm(source.base)
    else:
        llm = load_with_adapter(source, source.adapter)
    if torch.cuda.is_available():
        for parameter in llm.parameters():  # buffers keep their dtype: rotary frequencies are fp32 in every model
            parameter.data = parameter.data.to("cuda", torch.bfloat16)
        llm = llm.to("cuda")
    return llm.eval()


def load_with_adapter(source: Source, adapter: Path) -> PreTrainedModel:
    """Base and adapter; the base must be that of training, and has the values of 4 bits where it had them then."""
    trained = trained_base(source, adapter)
    if trained and trained["weights"] == "random":
        llm = build_llm(source.base, weights="random", seed=trained["seed"])
    else:
        llm = build_llm(source.base)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    check_base(adapter, llm.name_or_path, trained, named)
    llm = add_adapter(llm, adapter, source.checkpoint)
    if trained.get("quantise"):
        num = requantise(llm)
        print(
            f"{num} weights of the base have the values of {trained['quantise']}, as in training; they are held whole"
        )
    return llm


def trained_base(source: Source, adapter: Path) -> dict[str, Any]:
    """What is known of the base that an adapter was trained on; nothing beside one that peft has written."""
    if source.checkpoint is None:
        return read_base_note(adapter, "quantise")
    note = read_base_note(adapter)
    state = source.checkpoint / "state.json"
    if not note or not state.is_file():
        return note
    return {**note, "quantise": json.loads(state.read_text(encoding="utf-8"))["adapter"]["quantise"]}


def requantise(llm: PreTrainedModel) -> int:
    """Let the weights under LoRA layers have the values of their NF4 form; how many there are."""
    layers = [module for module in llm.modules() if isinstance(module, load_peft().tuners.lora.LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        weight.data = dequantised(quantised(weight.data.float())).to(weight.dtype)
    return len(layers)


def fill(checkpoint: Path) -> Hold:
    """Puts the tensors of a checkpoint into a model that has none yet."""

    def hold(llm: PreTrainedModel, _: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor.float() for name, tensor in TensorFiles(checkpoint, WEIGHTS).items()}
        missing, unexpected = llm.load_state_dict(tensors, strict=False, assign=True)
        llm.tie_weights()
        if unexpected or any(parameter.is_meta for parameter in llm.parameters()):
            raise UserError(f"The weights of {checkpoint} do not fit its config.json: {[*missing, *unexpected][:5]}.")

    return hold


def add_adapter(llm: PreTrainedModel, directory: Path, checkpoint: Path | None) -> PreTrainedModel:
    """The model with an adapter, unmerged: every weight of the adapter must have its place, and every place its weight.

    Raises:
        UserError: it is no LoRA in safetensors, or belongs to another model.
    """
    read_adapter_config(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights, which are refused below
            add = add_saved(llm, directory) if checkpoint is None else add_trained(llm, directory, checkpoint)
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"The adapter {directory} does not fit this model: {str(error).splitlines()[0]}") from error
    if wrong := sorted(add.given ^ add.meant):
        raise UserError(
            f"The adapter {directory} does not fit this model: {len(add.given - add.meant)} of its {len(add.given)} "
            f"weights have no place, {len(add.meant - add.given)} places have no weight, such as {wrong[0]}. Name its "
            "own base."
        )
    return add.model


class Added(NamedTuple):
    """A model with an adapter: the names of the weights that were given, and of those that it has."""

    model: Any
    given: set[str]
    meant: set[str]


def add_saved(llm: PreTrainedModel, directory: Path) -> Added:
    """From a directory that peft or `tuner convert` wrote."""
    peft = load_peft()
    with safe_open(check_adapter_weights(directory), framework="pt") as opened:
        given = set(opened.keys())
    model = peft.PeftModel.from_pretrained(llm, str(directory), is_trainable=False)
    return Added(model, given, set(peft.get_peft_model_state_dict(model, save_embedding_layers=False)))


def add_trained(llm: PreTrainedModel, directory: Path, checkpoint: Path) -> Added:
    """From a checkpoint, whose tensors have the names of the model that was trained, adapter in place."""
    peft = load_peft()
    base = {WRAPPED + name for name, _ in llm.named_parameters()}
    model = peft.PeftModel(llm, peft.PeftConfig.from_pretrained(str(directory)))
    tensors = {WRAPPED + name: tensor for name, tensor in TensorFiles(checkpoint, WEIGHTS).items()}
    model.load_state_dict(tensors, strict=False)
    names = [name for name, _ in model.named_parameters()]
    meant = {name for name in names if name not in base and not any(part in name for part in COVERED)}
    return Added(model, set(tensors), meant)


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The adapter's own tokenizer where it brings one, else the base's."""
    own = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    return build_tokenizer(str(source.adapter) if own else source.base)


def load_template(source: Source, tokenizer: PreTrainedTokenizerFast, name: str | None) -> ChatTemplate:
    """The template of that name; without one, what training noted beside the adapter or the model decides."""
    if name:
        return resolve_template(name, tokenizer)
    noted = [place for place in source.places if (Path(place) / TEMPLATE_NOTE).is_file()]
    return detect_template(noted[0] if noted else source.base, tokenizer)


def detect_template(model_dir: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The template that a conversion noted, or the one that suits the tokenizer and what it writes itself."""
    note = Path(model_dir) / TEMPLATE_NOTE
    if note.is_file() and (found := read_note(note))["chat_template"]:
        template = resolve_template(found["chat_template"], tokenizer)
        return trained_with(template, found.get("parallel_tool_calls", "template"))
    if tokenizer.chat_template is not None:
        return resolve_template("auto", tokenizer)
    fitting = recognise(tokenizer)
    if fitting is None:
        raise UserError(f"no chat template fits the tokenizer of {model_dir}; name one of {', '.join(CHAT_TEMPLATES)}.")
    return fitting


def read_note(path: Path) -> dict[str, Any]:
    """What a conversion or a checkpoint noted of the template that was trained."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return {**note, "chat_template": note["chat_template"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}). Name the template: --template NAME") from error
