"""FLOPs of a step, and how long computing, memory and links take for them on a GPU that is named."""

from typing import NamedTuple

from tuner.model.checkpointing import ATTENTION
from tuner.model.flops import hardware_flops, model_flops
from tuner.parallel.mesh import head_counts
from tuner.plan.gpus import Gpu
from tuner.plan.holding import Sizes
from tuner.plan.needles import flops_of_turns
from tuner.plan.setup import Setup
from tuner.plan.trace import of_attention, of_layer_input

EFFICIENCY = 0.55  # of the data sheet's matrix rate that long products of bf16 reach; assumed, not measured
PCIE = 25e9  # bytes/s at which offloaded state comes and goes; assumed
HOST_BANDWIDTH = 200e9  # bytes/s of a node's own memory, which holds back the optimizer there; assumed
STEP_BYTES = 28  # AdamW reads weight, gradient and two moments in fp32 and writes three of them


class Speed(NamedTuple):
    """Of an optimizer step over all ranks."""

    model_flops: float
    hardware_flops: float
    num_tokens: float
    compute_seconds: float
    optimizer_seconds: float
    link_seconds: float  # if nothing of it ran beside the computing
    sent: float  # bytes a rank
    host_seconds: float  # that the CPUs and the way to them add, where something is offloaded
    needle_seconds: float = 0.0  # of all needle passes that come together, every so many steps
    needle_share: float = 0.0  # of them, those that fall on a step

    @property
    def seconds_with_needles(self) -> float:
        """Of a step and its share of the passes."""
        return self.seconds + self.needle_share

    @property
    def seconds(self) -> float:
        """Where communication runs beside computing, the longer of them, the optimizer, and the host."""
        return max(self.compute_seconds, self.link_seconds) + self.optimizer_seconds + self.host_seconds


def speed_of(setup: Setup, sizes: Sizes, gpu: Gpu, link: float, mean_length: float, efficiency: float) -> Speed:
    """Time of a step: every data-parallel rank takes `num_accumulation_steps` packs, all tokens trained.

    Args:
        setup: of a rank.
        sizes: of the model.
        gpu: each rank's.
        link: bytes/s that a rank sends.
        mean_length: sum over documents of length^2, over the sum of lengths; num_tokens where packs are one document.
        efficiency: share of the GPU's matrix rate.
    """
    packs = setup.num_accumulation_steps * setup.num_ranks // setup.degrees.size
    tokens = packs * setup.num_tokens
    squares = int(tokens * mean_length)
    computed = hardware_flops(sizes.matmuls, tokens, squares, tokens, gradient_checkpointing=setup.checkpointing)
    sent = bytes_sent(setup, sizes)
    stepped = sizes.trained / (setup.num_ranks if setup.holding != "none" else 1)
    is_on_host = "offload_optimizer" in setup.zero
    needle_seconds = 0.0
    if setup.needles is not None:
        of_rank = flops_of_turns(setup.needles, sizes.matmuls, setup.num_ranks, setup.degrees)
        needle_seconds = of_rank / (gpu.flops * efficiency)
    compute_seconds = computed / (setup.num_ranks * gpu.flops * efficiency)
    return Speed(
        model_flops=model_flops(sizes.matmuls, tokens, squares, tokens),
        hardware_flops=computed,
        num_tokens=tokens,
        compute_seconds=compute_seconds,
        optimizer_seconds=0.0 if is_on_host else STEP_BYTES * stepped / gpu.bandwidth,
        link_seconds=sent / link,
        sent=sent,
        host_seconds=host_seconds(setup, sizes, compute_seconds),
        needle_seconds=needle_seconds,
        needle_share=0.0 if setup.needles is None else needle_seconds / setup.needles.interval,
    )


def host_seconds(setup: Setup, sizes: Sizes, compute_seconds: float) -> float:
    """What the host adds to a step: gradients to it and weights back, over PCIe, and its own optimizer's step.

    Activations come and go beside the computing, and add what is longer than it.
    """
    seconds = 0.0
    if "offload_optimizer" in setup.zero:
        seconds += (4 + setup.itemsize) * sizes.trained / setup.num_ranks / PCIE
        num_nodes = max(1, setup.num_ranks // setup.ranks_per_node)
        seconds += STEP_BYTES * sizes.trained / num_nodes / HOST_BANDWIDTH
    if setup.offload_activations:
        computation, num_layers = setup.computation(), setup.model.get_text_config().num_hidden_layers
        kept = of_layer_input(computation) + (of_attention(computation) if setup.checkpointing == ATTENTION else 0)
        moved = 2 * kept * num_layers * setup.num_accumulation_steps / PCIE
        seconds += max(0.0, moved - compute_seconds)
    return seconds


def bytes_sent(setup: Setup, sizes: Sizes) -> float:
    """Bytes that leave a rank in a step; rings' formulas, as benchmarks/ranks.py measures them.

    DDP 2 f G; ZeRO-1 f (G + W); ZeRO-2 f (a G + W); ZeRO-3 and FSDP2 a f (2 W + G): f = (n - 1) / n, a micro-batches,
    W bytes of the weights in the precision, G of the gradient in fp32. Ulysses and rings on top, per layer and pass.
    """
    ranks, steps = setup.num_ranks, setup.num_accumulation_steps
    share = (ranks - 1) / ranks
    weights, gradient = setup.itemsize * sizes.total, 4.0 * sizes.trained
    if setup.holding == "none":
        sent = 2 * gradient
    elif setup.stage == 1:
        sent = gradient + weights
    elif setup.stage == 2:
        sent = steps * gradient + weights
    else:
        sent = steps * (2 * weights + gradient)
    return share * sent + steps * bytes_between_sequences(setup)


def bytes_between_sequences(setup: Setup) -> float:
    """What ranks that share a sequence send in a micro-batch: heads by Ulysses, keys and values by the ring."""
    text = setup.model.get_text_config()
    heads, kv_heads = head_counts(text)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    ulysses, ring = setup.degrees
    own = setup.num_tokens / setup.degrees.size
    passes = 2 if setup.checkpointing in (False, ATTENTION) else 3  # what is kept does not travel again
    moved = (2 * heads + 2 * max(kv_heads, ulysses)) * width * own * setup.itemsize * (ulysses - 1) / ulysses
    around = 2 * max(kv_heads // ulysses, 1) * width * own * ulysses * (ring - 1) * (setup.itemsize * passes + 4)
    return text.num_hidden_layers * (passes * moved + around)
