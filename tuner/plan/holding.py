"""Bytes of weights, gradients, optimizer state and buffers that a rank holds: what each strategy's code allocates."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from tuner.engine.zero_config import ModelSizes, derived_sizes
from tuner.model.flops import Matmuls, count_matmuls
from tuner.model.hollow import parameter_places
from tuner.model.tiles import decoder_layers
from tuner.plan.setup import Setup
from tuner.plan.trace import hollow

FP32 = 4
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes of a trained weight; bitsandbytes scales 256 at a time
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: 4 bits, a byte for 64 of them, fp32 for 256 such bytes
MAX_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps whole, DeepSpeed's stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # elements that ZeRO-3 updates at a time


class Sizes(NamedTuple):
    """Elements of a model's parameters, and what they are multiplied with."""

    total: int
    trained: int
    layer: int  # the largest decoder layer
    layer_trained: int
    head: int  # trained, and not the embedding's too
    embedding: int  # trained
    largest: int  # parameter
    frozen_linear: int  # kept in the compute precision under an adapter
    matmuls: Matmuls


class Held(NamedTuple):
    """Bytes on a rank all the time, and what comes and goes with the phases of a step."""

    weights: float
    optimizer: float
    gradient: float  # of all trained weights, once backward is done
    is_static: bool  # gradients are there from the start
    gathered: float = 0.0  # whole weights, in forward and backward
    at_loss: float = 0.0  # of the gathered ones and buffers, those at head and loss alone
    reducing: float = 0.0  # gradients on their way between ranks, in backward
    updating: float = 0.0  # on top of all while the optimizer steps


def count(setup: Setup) -> Sizes:
    """The parameters of the model that trains, laid out without memory."""
    llm = hollow(setup.model, setup.lora)
    layers = decoder_layers(llm)
    head, embedding = llm.get_output_embeddings().weight, llm.get_input_embeddings().weight
    frozen = [
        module.weight
        for module in llm.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight is not embedding
    ]
    largest = max(layers, key=lambda layer: elements(layer.parameters()))
    return Sizes(
        total=sum(llm.get_parameter(name).numel() for name in parameter_places(llm)),
        trained=elements(parameter for parameter in llm.parameters() if parameter.requires_grad),
        layer=elements(largest.parameters()),
        layer_trained=elements(parameter for parameter in largest.parameters() if parameter.requires_grad),
        head=0 if head is embedding or not head.requires_grad else head.numel(),
        embedding=embedding.numel() if embedding.requires_grad else 0,
        largest=max(parameter.numel() for parameter in llm.parameters()),
        frozen_linear=elements(frozen) if setup.lora is not None else 0,
        matmuls=count_matmuls(llm),
    )


def elements(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold."""
    return sum(parameter.numel() for parameter in parameters)


def hold(setup: Setup, sizes: Sizes) -> Held:
    """What a rank holds under the strategy of a setup."""
    if setup.holding in ("none", "fsdp"):
        held = replicated(setup, sizes) if setup.holding == "none" else fully_sharded(setup, sizes)
        # in backward each gradient is used as soon as it is there, and so are those of the trace
        return held._replace(gradient=0.0, is_static=False) if setup.in_backward else held
    return {1: zero_1, 2: zero_2, 3: zero_3}[setup.stage](setup, sizes)


def replicated(setup: Setup, sizes: Sizes) -> Held:
    """fp32 on every rank; under an adapter frozen linear layers in the precision, or in 4 bits. DDP's buckets are the
    gradients, and stay."""
    quantised = setup.lora is not None and setup.lora.quantise is not None
    frozen = sizes.frozen_linear
    linear = frozen * (NF4 if quantised else setup.itemsize)
    return Held(
        weights=FP32 * (sizes.total - frozen) + linear,
        optimizer=MOMENTS[setup.optimizer] * sizes.trained,
        gradient=FP32 * sizes.trained,
        is_static=setup.num_ranks > 1,
    )


def fully_sharded(setup: Setup, sizes: Sizes) -> Held:
    """Rows of fp32; a layer and the next are whole in the precision, what no layer has all the time."""
    shards = min(setup.num_ranks, setup.ranks_per_node) if setup.hybrid else setup.num_ranks
    outside = sizes.total - setup.model.get_text_config().num_hidden_layers * sizes.layer
    whole = setup.itemsize * outside
    of_layer = setup.itemsize * sizes.layer
    return Held(
        weights=FP32 * sizes.total / shards,
        optimizer=MOMENTS["adamw"] * sizes.trained / shards,
        gradient=FP32 * sizes.trained / shards,
        is_static=False,
        gathered=whole + 2 * of_layer,
        at_loss=whole + of_layer,
        reducing=(FP32 + setup.itemsize) * sizes.layer_trained,
    )


def masters(setup: Setup, sizes: Sizes) -> float:
    """ZeRO's fp32 weights and their moments; nothing where they are offloaded."""
    is_offloaded = "offload_optimizer" in setup.zero
    return 0.0 if is_offloaded else (FP32 + MOMENTS["adamw"]) * sizes.trained / setup.num_ranks


def bucket(setup: Setup, sizes: Sizes, name: str = "reduce_bucket_size") -> float:
    """Elements of a bucket, as the file says or as `zero_config` derives it."""
    num_layers = setup.model.get_text_config().num_hidden_layers
    derived = derived_sizes(
        ModelSizes(setup.model.get_text_config().hidden_size, sizes.total // num_layers), setup.stage
    )
    given = setup.zero.get(name, "auto")
    return float(derived[name] if given == "auto" else given)


def zero_1(setup: Setup, sizes: Sizes) -> Held:
    """All weights in the precision, all gradients in fp32; a rank's part of them is copied to be stepped with."""
    part = FP32 * sizes.trained / setup.num_ranks
    return Held(
        weights=setup.itemsize * sizes.total,
        optimizer=masters(setup, sizes),
        gradient=FP32 * sizes.trained,
        is_static=False,
        reducing=buffers(setup) * FP32 * bucket(setup, sizes),
        updating=2 * part - (FP32 * sizes.trained if setup.itemsize == FP32 else 0.0),
    )


def zero_2(setup: Setup, sizes: Sizes) -> Held:
    """All weights in the precision, a rank's part of the gradients in fp32, of which the step makes a flat copy."""
    part = FP32 * sizes.trained / setup.num_ranks
    is_offloaded = "offload_optimizer" in setup.zero
    return Held(
        weights=setup.itemsize * sizes.total,
        optimizer=masters(setup, sizes),
        gradient=0.0 if is_offloaded else part,
        is_static=False,
        reducing=buffers(setup) * FP32 * bucket(setup, sizes),
        updating=0.0 if is_offloaded else part,
    )


def zero_3(setup: Setup, sizes: Sizes) -> Held:
    """A rank's part of everything, and up to `MAX_LIVE` elements whole, since DeepSpeed keeps what comes again soon."""
    ranks = setup.num_ranks
    weights = 0.0 if "offload_param" in setup.zero else setup.itemsize * sizes.total / ranks
    if "zero_hpz_partition_size" in setup.zero:
        weights += setup.itemsize * sizes.total / (setup.hpz_size or min(ranks, setup.ranks_per_node))
    live = float(setup.zero.get("stage3_max_live_parameters", MAX_LIVE))
    fetched = bucket(setup, sizes, "stage3_prefetch_bucket_size")
    is_offloaded = "offload_optimizer" in setup.zero
    gathered = setup.itemsize * min(sizes.total, live + fetched)
    part = 0.0 if is_offloaded else FP32 * sizes.trained / ranks
    return Held(
        weights=weights,
        optimizer=masters(setup, sizes),
        gradient=part,
        is_static=True,
        gathered=gathered if ranks > 1 else 0.0,
        at_loss=gathered if ranks > 1 else 0.0,
        reducing=FP32 * bucket(setup, sizes) + (staged(setup, sizes) if ranks > 1 else 0.0),
        updating=min(part, FP32 * SUB_GROUP),
    )


def staged(setup: Setup, sizes: Sizes) -> float:
    """Copies that gloo makes on CPUs: the embedding's weights are fetched twice over while the head's gradient goes."""
    return (2.0 * setup.itemsize + FP32) * sizes.largest if setup.on_cpu else 0.0


def buffers(setup: Setup) -> int:
    """Buckets at a time: the next one fills while one travels, where communication overlaps."""
    return 1 if setup.on_cpu else 2
