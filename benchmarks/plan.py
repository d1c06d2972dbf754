"""What `tuner plan` predicts of a rank's memory, beside the peak of steps that are really run here, on CPUs.

Measured is what torch's allocator says: its profiler notes every allocation and release with their bytes, what kernels
take for themselves included, from before the model is built; the figure is the most that is held during the second
step, when the optimizer's state is there. Predicted is `tuner.plan.memory.memory_of` of the same setup, without what a
GPU needs besides. Ranks talk through gloo, whose own buffers are not torch's. What is offloaded lies in memory of
numpy's, which is none of torch's, and comes back as it would to a GPU, so that host and device are told apart.

    python benchmarks/plan.py [--only zero]
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

NUM_TOKENS, NUM_STEPS = 1024, 2
NEEDLES = "needles"  # what a plan calls them
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


class Case(NamedTuple):
    """A row: how many ranks, settings of `build_strategy` and `build_llm`, and what else differs."""

    name: str
    num_ranks: int
    strategy: Mapping[str, Any]
    llm: Mapping[str, Any] = {}
    sizes: Mapping[str, int] = {}
    num_tokens: int = NUM_TOKENS
    num_accumulation_steps: int = 1
    lora: Mapping[str, Any] | None = None
    in_backward: bool = False
    loss: Any = "chunked"
    needle_tokens: int | None = None  # measured is a document that is scored after the steps, in their place


FP32, BF16, AGAIN = {"precision": "fp32"}, {"precision": "bf16"}, {"gradient_checkpointing": True}
CASES = (
    Case("fp32", 1, FP32),
    Case("fp32, naive loss", 1, FP32, loss="naive"),
    Case("fp32, checkpointing", 1, FP32, AGAIN, num_tokens=4096),
    Case("fp32, checkpointing, tiles of 512", 1, FP32, {**AGAIN, "tile_tokens": 512}, num_tokens=4096),
    Case("bf16", 1, BF16),
    Case("fp32, 8 wider layers, 2 micro-batches", 1, FP32, AGAIN, {"hidden_size": 384, "num_hidden_layers": 8},
         num_accumulation_steps=2),
    Case("fp32, all but attention again", 1, FP32, {"gradient_checkpointing": "attention"}, num_tokens=4096),
    Case("fp32, every 2nd layer again", 1, FP32, {"gradient_checkpointing": 2}, num_tokens=4096),
    Case("fp32, layers again, offloaded", 1, FP32, {**AGAIN, "offload_activations": True}, num_tokens=4096),
    Case("fp32, tiles, attention kept, offloaded", 1, FP32,
         {"gradient_checkpointing": "attention", "offload_activations": True, "tile_tokens": 512}, num_tokens=4096),
    Case("fp32, optimizer in backward", 1, FP32, in_backward=True),
    Case("fp32, LoRA of rank 8", 1, FP32, lora={"rank": 8}),
    Case("bf16, LoRA of rank 8, checkpointing", 1, BF16, AGAIN, lora={"rank": 8}),
    Case("bf16, DoRA of rank 8, checkpointing", 1, BF16, AGAIN, lora={"rank": 8, "variant": "dora"}),
    Case("bf16, QLoRA of rank 8, checkpointing", 1, BF16, AGAIN, lora={"rank": 8, "quantise": "nf4"}),
    Case("bf16, LoRA and a trained head", 1, BF16, lora={"rank": 8, "modules_to_save": ["output"]}),
    Case("fp32, checkpointing, needles in 8,192", 1, FP32, AGAIN, needle_tokens=8192),
    Case("bf16, tiles of 512, needles in 8,192", 1, BF16, {"tile_tokens": 512}, needle_tokens=8192),
    Case("2 ranks, DDP", 2, FP32, num_tokens=512),
    Case("2 ranks, DDP, sp 2", 2, {**FP32, "sequence_parallel_size": 2}),
    Case("2 ranks, DDP, ring 2", 2, {**FP32, "sequence_parallel_size": {"ring": 2}}),
    Case("2 ranks, zero1", 2, {**FP32, "deepspeed": "zero1"}, AGAIN),
    Case("2 ranks, zero2, bf16", 2, {**BF16, "deepspeed": "zero2"}, AGAIN),
    Case("2 ranks, zero3", 2, {**FP32, "deepspeed": "zero3"}, AGAIN),
    Case("2 ranks, zero3, bf16, sp 2", 2, {**BF16, "deepspeed": "zero3", "sequence_parallel_size": 2}, AGAIN),
    Case("2 ranks, zero3, bf16", 2, {**BF16, "deepspeed": "zero3"}, AGAIN),
    Case("2 ranks, zero3_hpz of 2, bf16", 2, {**BF16, "deepspeed": "zero3_hpz", "hpz_partition_size": 2}, AGAIN),
    Case("2 ranks, FSDP2", 2, {**FP32, "fsdp": "full"}, AGAIN),
    Case("2 ranks, FSDP2, optimizer in backward", 2, {**FP32, "fsdp": "full"}, AGAIN, in_backward=True),
)  # fmt: skip


def measure(cases: tuple[Case, ...]) -> list[int]:
    """Peak bytes of this rank in the second step of each case."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    return [peak_of(case, rank, size) for case in cases]


def peak_of(case: Case, rank: int, size: int) -> int:
    """Of one case."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    keep_elsewhere()
    with tempfile.TemporaryDirectory() as directory:
        write_model(case, directory)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            strategy = start(case, directory, rank, size)
            torch.manual_seed(rank)
            ids = torch.randint(0, SIZES["vocab_size"], (1, case.num_tokens))
            batch = {
                "input_ids": ids,
                "labels": ids.clone(),
                "position_ids": torch.arange(case.num_tokens)[None],
                "cu_seqlens": torch.tensor([0, case.num_tokens], dtype=torch.int32),
                "max_seqlen": case.num_tokens,
                "num_loss_tokens": float(case.num_tokens * size * case.num_accumulation_steps),
            }
            for step in range(NUM_STEPS):
                take_step(strategy, [batch] * case.num_accumulation_steps, f"step {step}")
            if case.needle_tokens is not None:
                score(strategy, case.needle_tokens)
            del strategy
    name = f"step {NUM_STEPS - 1}" if case.needle_tokens is None else NEEDLES
    return peak_in(profiled.profiler.kineto_results.events(), name)


def score(strategy: Any, num_tokens: int) -> None:
    """A document on each place of a sequence, the answer at its end, as between two steps of training."""
    import numpy as np
    from torch.profiler import record_function

    from tuner.dataset.tokenize import Document
    from tuner.engine.aside import aside
    from tuner.engine.scoring import score_documents

    document = Document(
        np.arange(num_tokens, dtype=np.uint32) % SIZES["vocab_size"], np.arange(num_tokens) >= num_tokens - 8
    )
    lengths = [num_tokens] * (strategy.world.size // strategy.degrees.size)
    with record_function(NEEDLES), aside(strategy.model):
        list(score_documents(strategy, lengths, lambda number: document, num_tokens))


def keep_elsewhere() -> None:
    """Let `tuner.model.offload` put tensors of a CPU where torch's allocator does not count them."""
    import torch

    from tuner.model import offload

    class Elsewhere(offload.Away):
        here: torch.Tensor | None = None

        def __init__(self, layer: offload.Layer, tensor: torch.Tensor) -> None:
            super().__init__(layer, tensor)
            self.host = torch.from_numpy(tensor.numpy().copy())

        def start(self) -> None:
            if self.here is None:
                self.here = self.host.clone()

        def take(self) -> torch.Tensor:
            self.was_taken = True
            self.start()
            tensor, self.here = self.here, None
            assert tensor is not None
            return tensor

    offload.Away = Elsewhere  # type: ignore[misc]


def take_step(strategy: Any, batches: list[dict[str, Any]], name: str) -> None:
    """Take one, which the profile then has by this name."""
    from torch.profiler import record_function

    with record_function(name):
        strategy.train_step(batches)


def start(case: Case, directory: str, rank: int, size: int) -> Any:
    """The strategy with its model, as training makes them."""
    from torch.optim import AdamW

    from tuner.engine.schedule import WarmupCosine
    from tuner.engine.strategies import build_strategy
    from tuner.engine.world import World
    from tuner.method.sft import SFT
    from tuner.model.adapter import LoRA
    from tuner.model.build import build_llm
    from tuner.model.memory import Memory
    from tuner.parallel.mesh import build_mesh
    from tuner.plan.trace import loss_of

    class Naive(SFT):
        """All logits at once."""

        def forward(self, input_ids: Any, labels: Any, num_loss_tokens: float, **batch: Any) -> dict[str, Any]:  # type: ignore[override]
            hidden = self.llm.get_decoder()(input_ids=input_ids, use_cache=False, **batch).last_hidden_state[0]
            return {"loss": loss_of(hidden, self.llm.get_output_embeddings().weight, labels[0], "naive")}

    strategy = build_strategy(device="cpu", **case.strategy)
    strategy.place(World(rank, size, rank, size), build_mesh(strategy.degrees))
    adapter = LoRA(**case.lora) if case.lora else None
    llm = build_llm(
        directory,
        weights="random",
        attention="sdpa",
        hold=strategy.holder(),
        adapter=adapter,
        memory=Memory(**case.llm),
    )
    method = (Naive if case.loss == "naive" else SFT)(llm)
    if strategy.degrees.size > 1:
        method.cut_sequences(strategy.mesh)
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    wrapper = {"optimizer": {"type": AdamW, "lr": 1e-3}, "in_backward": case.in_backward}
    wrapper |= {} if case.in_backward else {"clip_grad": {"max_norm": 1.0}}
    strategy.prepare(method, optim_wrapper=wrapper, param_scheduler=schedule, num_steps=10)
    return strategy


def peak_in(events: Any, name: str) -> int:
    """The most bytes held while the range `name` ran."""
    began, ended = next(
        (event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name() == name
    )
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for when, num_bytes in moves:
        held += num_bytes
        if began <= when <= ended:
            peak = max(peak, held)
    return peak


def write_model(case: Case, directory: str) -> Any:
    """The config.json of a case."""
    from tuner.model.internlm2.configuration import InternLM2Config

    config = InternLM2Config(**{**SIZES, **case.sizes}, architectures=["InternLM2ForCausalLM"])
    config.save_pretrained(directory)
    return config


def predict(case: Case) -> Any:
    """What the plan says of a case."""
    from tuner.model.adapter import LoRA
    from tuner.model.internlm2.configuration import InternLM2Config
    from tuner.parallel.mesh import read_degrees
    from tuner.plan.memory import memory_of
    from tuner.plan.needles import Passes
    from tuner.plan.setup import Setup

    strategy, llm = case.strategy, case.llm
    needles = None if case.needle_tokens is None else Passes(1, ((case.needle_tokens,),))
    memory = memory_of(
        Setup(
            model=InternLM2Config(**{**SIZES, **case.sizes}),
            num_tokens=case.num_tokens,
            num_ranks=case.num_ranks,
            ranks_per_node=case.num_ranks,
            holding="fsdp" if "fsdp" in strategy else strategy.get("deepspeed", "none"),
            precision=strategy["precision"],
            degrees=read_degrees(strategy.get("sequence_parallel_size", 1)),
            checkpointing=llm.get("gradient_checkpointing", False),
            tile_tokens=llm.get("tile_tokens"),
            offload_activations=llm.get("offload_activations", False),
            num_accumulation_steps=case.num_accumulation_steps,
            lora=LoRA(**case.lora) if case.lora else None,
            in_backward=case.in_backward,
            hpz_size=strategy.get("hpz_partition_size"),
            loss=case.loss,
            on_cpu=True,
            needles=needles,
        )
    )
    return memory if needles is None else memory._replace(phases={NEEDLES: memory.phases[NEEDLES]})


def compare(cases: tuple[Case, ...]) -> list[tuple[Case, Any, int]]:
    """Each case with what is predicted of it and what is measured, the largest of its ranks."""
    from tuner.prove.processes import on_ranks

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    measured: dict[str, int] = {}
    for num_ranks in sorted({case.num_ranks for case in cases}):
        chosen = tuple(case for case in cases if case.num_ranks == num_ranks)
        found = on_ranks(num_ranks, measure, chosen, timeout=600)
        measured |= {case.name: max(peaks) for case, *peaks in zip(chosen, *found)}
    return [(case, predict(case), measured[case.name]) for case in cases]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this")
    only = parser.parse_args().only
    print(f"{'case':42}{'predicted':>12}{'measured':>12}{'ratio':>8}   peak in the")
    for case, memory, measured in compare(tuple(case for case in CASES if only in case.name)):
        predicted = memory.peak.total
        print(f"{case.name:42}{predicted / 1e6:9.1f} MB{measured / 1e6:9.1f} MB{predicted / measured:8.3f}   ", end="")
        print(memory.peak_phase, flush=True)


if __name__ == "__main__":
    main()
