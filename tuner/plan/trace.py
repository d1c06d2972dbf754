"""A training step on tensors without values: what is alive in its phases, for any number of layers."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tuner.method.loss import trained_cross_entropy
from tuner.method.token_scores import scores_of
from tuner.model.adapter import LoRA, find_modules, find_targets, inject, set_compute_dtype
from tuner.model.checkpointing import ATTENTION, Choice, enable_gradient_checkpointing
from tuner.model.fingerprint import Base
from tuner.model.hollow import parameter_places
from tuner.model.kept_attention import kept_bytes
from tuner.model.tiles import tile
from tuner.parallel.mesh import Degrees
from tuner.plan.kernels import Edges, register
from tuner.plan.live import LiveBytes

MIN_LAYERS = 1  # each further layer adds the same, from the second on
LAYERS_IN_FLIGHT = 2  # whose inputs are on their way to the host, or back
LONGEST = 32768  # tokens of a rank that are traced as they are
Loss = Literal["chunked", "naive"]


class Computation(NamedTuple):
    """What a rank computes for one micro-batch; equal ones are traced once."""

    model: PreTrainedConfig
    num_tokens: int  # of the whole sequence
    weight_dtype: torch.dtype = torch.float32  # what weights are in while they compute
    autocast: torch.dtype | None = None
    degrees: Degrees = Degrees()
    checkpointing: Choice = False
    tile_tokens: int | None = None
    offload_activations: bool = False
    lora: LoRA | None = None
    loss: Loss = "chunked"
    kernel: Literal["flash", "sdpa"] = "flash"
    num_scored: int | None = None  # labels that are scored in a forward without gradients; None: a step is trained

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.model.get_text_config().num_hidden_layers


class Phases(NamedTuple):
    """Bytes of activations, everything but weights and finished gradients: the most alive in each phase."""

    forward: float  # embedding and layers
    kept: float  # alive at the end of it: what backward needs
    loss: float  # head and loss
    head: float  # their backward
    backward: float  # layers
    end: float  # embedding


_TRACED: dict[tuple[str, str, int], Phases] = {}


class Activations(NamedTuple):
    """Phases of a model with no layer, and what each layer adds to them."""

    base: Phases
    per_layer: Phases

    def at(self, num_layers: int) -> Phases:
        """Those of a model with so many layers."""
        return Phases(*(base + num_layers * slope for base, slope in zip(self.base, self.per_layer)))


def trace(computation: Computation) -> Activations:
    """Run the step twice with few layers; each further layer adds what the last ones added.

    Of a long sequence two shorter ones are traced: what each further token adds is the same from `LONGEST` on, where
    tiles and chunks are full. Every n-th layer computed again makes a pattern of n layers, which is what is counted.
    """
    longest = LONGEST * computation.degrees.size
    if computation.num_tokens <= longest:
        return trace_whole(computation)
    low, high = (trace_whole(computation._replace(num_tokens=tokens)) for tokens in (longest // 2, longest))
    factor = (computation.num_tokens - longest) / (longest - longest // 2)
    return Activations(*(
        Phases(*(end + factor * (end - start) for start, end in zip(*pair))) for pair in zip(low, high)
    ))  # fmt: skip


def trace_whole(computation: Computation) -> Activations:
    """Activations of a sequence as it is."""
    choice = computation.checkpointing
    period = choice if type(choice) is int else 1
    few, more = (traced_layers(computation, count * period) for count in (MIN_LAYERS, MIN_LAYERS + 1))
    slope = Phases(*((high - low) / period for low, high in zip(few, more)))
    base = Phases(*(low - MIN_LAYERS * period * step for low, step in zip(few, slope)))
    if choice == ATTENTION:  # its bookkeeping needs addresses, which these tensors have not
        slope = plus(slope, of_attention(computation))
    if computation.offload_activations:
        away = of_layer_input(computation) + (of_attention(computation) if choice == ATTENTION else 0)
        slope, base = plus(slope, -away / period), plus(base, LAYERS_IN_FLIGHT * away)
    return Activations(base, slope)


def plus(phases: Phases, num_bytes: float) -> Phases:
    """With so many bytes more wherever what backward needs is alive."""
    return Phases(*(value + num_bytes for value in phases))._replace(end=phases.end)


def of_attention(computation: Computation) -> int:
    """Bytes that the attention of a layer keeps where it is not computed again: by formula."""
    config = computation.model.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = (computation.autocast or computation.weight_dtype).itemsize
    num_own = computation.num_tokens // computation.degrees.size
    return kept_bytes(config.num_attention_heads, head_size, itemsize) * num_own


def of_layer_input(computation: Computation) -> int:
    """Bytes that a layer which is computed again keeps: its input, in the precision of the embedding."""
    num_own = computation.num_tokens // computation.degrees.size
    return computation.model.get_text_config().hidden_size * computation.weight_dtype.itemsize * num_own


def traced_layers(computation: Computation, num_layers: int) -> Phases:
    """`trace_layers`, once for computations that differ in what formulas add."""
    again = True if computation.checkpointing == ATTENTION else computation.checkpointing
    same = computation._replace(checkpointing=again, offload_activations=False)
    key = (computation.model.to_json_string(), str(same._replace(model=None)), num_layers)
    if key not in _TRACED:
        _TRACED[key] = trace_layers(same, num_layers)
    return _TRACED[key]


def trace_layers(computation: Computation, num_layers: int) -> Phases:
    """The phases of the model cut to its first layers."""
    with quiet(), FakeTensorMode():
        llm = build(computation, num_layers)
        live = LiveBytes()
        live.ignore([*llm.parameters(), *llm.buffers()])
        for parameter in llm.parameters():
            if parameter.requires_grad:  # who holds gradients is the strategy's matter
                parameter.register_post_accumulate_grad_hook(forget)
        with live:
            return run(llm, computation, live)


def build(computation: Computation, num_layers: int) -> PreTrainedModel:
    """The model as `build_llm` makes it, of tensors without values; inside a FakeTensorMode."""
    config = copy.deepcopy(computation.model)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    name = register(computation.degrees, computation.kernel)
    llm = hollow(config, computation.lora, name)
    give_memory(llm, computation.weight_dtype)
    if computation.lora is not None and computation.autocast is not None:
        set_compute_dtype(llm, computation.autocast)
    if computation.checkpointing:
        enable_gradient_checkpointing(llm, computation.checkpointing)
    if computation.tile_tokens is not None:
        tile(llm, computation.tile_tokens)
    return llm.train(computation.num_scored is None)


def hollow(config: PreTrainedConfig, lora: LoRA | None, attention: str = "eager") -> PreTrainedModel:
    """The model on the meta device, perhaps with an adapter, whose 4-bit weights are taken for whole ones."""
    with unset_fake_temporarily():
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
        if lora is not None:
            llm.requires_grad_(False)
            inject(llm, lora, find_targets(llm, lora.targets), Base("", "random", 0))
            for name in find_modules(llm, lora.modules_to_save, []):
                llm.get_submodule(name).requires_grad_(True)
            llm.__dict__["tuner_adapter"] = lora
    return llm


def give_memory(llm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Tensors of this device in place of those on the meta device."""
    for name, places in parameter_places(llm).items():
        meta = llm.get_parameter(name)
        parameter = nn.Parameter(torch.empty(meta.shape, dtype=dtype), requires_grad=meta.requires_grad)
        for module, leaf in places:
            setattr(module, leaf, parameter)
    for name, buffer in list(llm.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        llm.get_submodule(parent).register_buffer(leaf, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)


def run(llm: PreTrainedModel, computation: Computation, live: LiveBytes) -> Phases:
    """A forward and a backward."""
    num_own = computation.num_tokens // computation.degrees.size
    enabled = computation.autocast is not None
    ids = torch.zeros(1, num_own, dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": False}
    batch |= {"cu_seqlens": Edges(computation.num_tokens), "max_seqlen": computation.num_tokens}
    if computation.num_scored is not None:
        return score(llm, batch, computation, live)
    peaks: dict[str, int] = {}

    def reached_the_layers(grad: Tensor) -> None:
        peaks["head"] = live.restart()

    def reached_the_embedding(grad: Tensor) -> None:
        peaks["backward"] = live.restart()

    def watch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        output.register_hook(reached_the_embedding)
        return output

    llm.get_input_embeddings().register_forward_hook(watch)
    live.restart()
    with torch.autocast("cpu", dtype=computation.autocast, enabled=enabled):
        hidden = llm.get_decoder()(**batch).last_hidden_state[0]
        hidden.register_hook(reached_the_layers)
        peaks["forward"], kept = live.restart(), live.now
        loss = loss_of(hidden, llm.get_output_embeddings().weight, ids[0], computation.loss)
    del hidden
    peaks["loss"] = live.restart()
    loss.backward()
    end = live.restart()
    peaks.setdefault("backward", end)  # a frozen embedding gets no gradient
    return Phases(peaks["forward"], kept, peaks["loss"], peaks["head"], peaks["backward"], end)


@torch.no_grad()
def score(llm: PreTrainedModel, batch: dict[str, Any], computation: Computation, live: LiveBytes) -> Phases:
    """A forward, and scores of some labels, after which nothing is left."""
    live.restart()
    with torch.autocast("cpu", dtype=computation.autocast, enabled=computation.autocast is not None):
        hidden = llm.get_decoder()(**batch).last_hidden_state[0]
        forward = live.restart()
        rows = slice(computation.num_scored)
        scores_of(F.linear(hidden[rows], llm.get_output_embeddings().weight), batch["input_ids"][0, rows])
    return Phases(forward, 0, live.restart(), 0, 0, 0)


def loss_of(hidden: Tensor, head: Tensor, labels: Tensor, kind: Loss) -> Tensor:
    """(T, H), (V, H), (T,) -> scalar; "naive" is what transformers' own code for InternLM2 did, in fp32."""
    if kind == "chunked":
        return trained_cross_entropy(hidden, head, labels)
    scores = F.linear(hidden, head).float()
    return F.cross_entropy(scores[:-1].contiguous(), labels[1:])


def forget(parameter: Tensor) -> None:
    """Drop a gradient that is there."""
    parameter.grad = None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of a model that is never used."""
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
