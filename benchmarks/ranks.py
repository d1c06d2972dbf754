"""Ways to spread a training step over ranks: tokens/s, peak memory of a rank, and bytes sent beside the formula.

All rows train the same model on the same packs, so their losses agree; with 2 ranks each has half of them, under
sequence parallelism half of each. Ranks are processes of one thread that talk through gloo, over TCP on this machine:
sent is what the kernel counts on a rank's own connections. Memory is a rank's peak above what it held once torch was
imported. On two cores two ranks share the memory's bandwidth and whatever else runs; on GPUs the order may differ.

    python benchmarks/ranks.py [--only zero] [--steps 3]

Formulas, bytes that a rank sends in a step: n ranks, f = (n - 1) / n, W bytes of the weights and G of the gradient
(fp32), a micro-batches of a rank. DDP 2 f G. ZeRO-1 f (G + W): the gradient reduced to its parts, the weights gathered.
ZeRO-2 f (a G + W): reduced in each micro-batch. ZeRO-3 and FSDP2 a f (2 W + G): gathered in forward and in backward.
Ulysses, on top of these, for each micro-batch: layers x 2 passes x f x 4 bytes x `tuner.parallel.ulysses.num_elements`.
They are those of rings. gloo reduces to parts by an all-reduce, which doubles G, and DeepSpeed and FSDP2 keep some
weights from forward to backward, which saves part of a W.
"""

import argparse
import multiprocessing
import os
import resource
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

NUM_PACKS, PACK_LENGTH, DOCUMENT_LENGTH = 4, 256, 64
NUM_WARMUP_STEPS = 2
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BYTES_ACKED = 120  # offset in Linux's struct tcp_info


class Layout(NamedTuple):
    """A row: settings of `build_strategy`, and how often f x the model's bytes leave a rank in a step."""

    name: str
    num_ranks: int
    settings: dict[str, Any]
    sent_once: int = 0
    sent_per_batch: int = 0


LAYOUTS = (
    Layout("1 rank", 1, {}),
    *(Layout(f"1 rank, {name}", 1, {"deepspeed": name}) for name in ("zero1", "zero2", "zero3")),
    Layout("2 ranks, DDP (ZeRO-0)", 2, {}, sent_once=2),
    Layout("2 ranks, zero1", 2, {"deepspeed": "zero1"}, sent_once=2),
    Layout("2 ranks, zero2", 2, {"deepspeed": "zero2"}, sent_once=1, sent_per_batch=1),
    Layout("2 ranks, zero3", 2, {"deepspeed": "zero3"}, sent_per_batch=3),
    Layout("2 ranks, FSDP2", 2, {"fsdp": "full"}, sent_per_batch=3),
    Layout("2 ranks, sp 2", 2, {"sequence_parallel_size": 2}, sent_once=2),
    Layout("2 ranks, sp 2, zero3", 2, {"sequence_parallel_size": 2, "deepspeed": "zero3"}, sent_per_batch=3),
)


class Figures(NamedTuple):
    """What a rank measured; bytes and seconds of one step."""

    loss: float  # of the first step
    seconds: float
    wait_seconds: float  # the mean over ranks
    memory: int
    sent: int
    ulysses_sent: int


def bytes_sent() -> int:
    """Over all TCP connections that this process holds, as far as the other side has them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode)
        except FileNotFoundError:  # the listing's own
            continue
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_batches(place: int, num_places: int, num_parts: int) -> list[Any]:
    """The packs of the data-parallel rank `place`, the same documents in each run."""
    import numpy as np

    from tuner.dataset.collate import collate
    from tuner.dataset.tokenize import Document

    rng = np.random.default_rng(0)
    num_documents = PACK_LENGTH // DOCUMENT_LENGTH
    trained = np.ones(DOCUMENT_LENGTH, bool)
    packs = [
        [Document(rng.integers(0, SIZES["vocab_size"], DOCUMENT_LENGTH).astype(np.uint32), trained)] * num_documents
        for _ in range(NUM_PACKS)
    ]
    num_loss_tokens = NUM_PACKS * num_documents * (DOCUMENT_LENGTH - 1)
    return [collate(pack, num_loss_tokens, pad_to_multiple_of=num_parts) for pack in packs[place::num_places]]


def train(layout: Layout, rank: int, num_steps: int) -> Figures:
    """Train on this rank."""
    import torch
    from torch.optim import AdamW

    from tuner.engine.schedule import WarmupCosine
    from tuner.engine.strategies import build_strategy
    from tuner.engine.world import World
    from tuner.method.sft import SFT
    from tuner.model.internlm2.configuration import InternLM2Config
    from tuner.model.internlm2.modeling import InternLM2ForCausalLM
    from tuner.parallel.mesh import build_mesh

    before = peak()
    strategy = build_strategy(precision="fp32", device="cpu", **layout.settings)
    strategy.place(World(rank, layout.num_ranks, rank, layout.num_ranks), build_mesh(strategy.degrees))
    torch.manual_seed(0)
    method = SFT(InternLM2ForCausalLM._from_config(InternLM2Config(**SIZES), attn_implementation="tuner_sdpa"))
    num_sharing = strategy.degrees.size
    if num_sharing > 1:
        method.cut_sequences(strategy.mesh)
    wrapper = {"optimizer": {"type": AdamW, "lr": 1e-4}, "clip_grad": {"max_norm": 1.0}}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(method, optim_wrapper=wrapper, param_scheduler=schedule, num_steps=1000)
    batches = make_batches(rank // num_sharing, layout.num_ranks // num_sharing, num_sharing)
    losses, seconds, waits = [], [], []
    for step in range(NUM_WARMUP_STEPS + num_steps):
        if step == NUM_WARMUP_STEPS:
            sent, strategy.mesh.ulysses.bytes_sent = bytes_sent(), 0
        started = time.perf_counter()
        result = strategy.train_step(batches)
        seconds.append(time.perf_counter() - started)
        losses.append(result.loss)
        waits.append(result.tally.wait_seconds)
    fastest = min(range(NUM_WARMUP_STEPS, len(seconds)), key=seconds.__getitem__)
    return Figures(
        losses[0],
        seconds[fastest],
        waits[fastest],
        peak() - before,
        (bytes_sent() - sent) // num_steps,
        strategy.mesh.ulysses.bytes_sent // num_steps,
    )


def run_rank(layout: Layout, rank: int, store: Path, num_steps: int, writer: Connection) -> None:
    """What a process does; what libraries print is dropped, but not what they complain of."""
    import torch
    import torch.distributed as dist

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = (rank, layout.num_ranks, rank, layout.num_ranks)
    os.environ.update({name: str(value) for name, value in zip(names, values)}, GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=layout.num_ranks)
    writer.send(train(layout, rank, num_steps))
    dist.barrier()
    dist.destroy_process_group()


def measure(layout: Layout, num_steps: int) -> list[Figures]:
    """Figures of all ranks."""
    context = multiprocessing.get_context("forkserver")  # imports once; each rank is a fork of that
    context.set_forkserver_preload(["torch", "tuner.method.sft", "tuner.engine.fsdp", "deepspeed"])
    with tempfile.TemporaryDirectory() as folder:
        readers, processes = [], []
        for rank in range(layout.num_ranks):
            reader, writer = context.Pipe(duplex=False)
            arguments = (layout, rank, Path(folder) / "store", num_steps, writer)
            processes.append(context.Process(target=run_rank, args=arguments))
            processes[-1].start()
            writer.close()
            readers.append(reader)
        figures = [reader.recv() for reader in readers]
        for process in processes:
            process.join()
    return figures


def formula(layout: Layout, num_parameters: int) -> tuple[float, float]:
    """Bytes that a rank should send in a step: in all, and by Ulysses alone."""
    from tuner.parallel.ulysses import num_elements

    n, num_sharing = layout.num_ranks, layout.settings.get("sequence_parallel_size", 1)
    share, num_batches = (n - 1) / n, NUM_PACKS * num_sharing // n
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    exchanged = num_elements(PACK_LENGTH, heads, kv_heads, SIZES["hidden_size"] // heads, num_sharing)
    passes = 2 * SIZES["num_hidden_layers"] * num_batches
    ulysses = passes * (num_sharing - 1) / num_sharing * 4 * exchanged
    times = layout.sent_once + layout.sent_per_batch * num_batches
    return times * share * 4 * num_parameters + ulysses, ulysses


def count_parameters() -> int:
    """Of the model."""
    import torch

    from tuner.model.internlm2.configuration import InternLM2Config
    from tuner.model.internlm2.modeling import InternLM2ForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in InternLM2ForCausalLM(InternLM2Config(**SIZES)).parameters())


def row(layout: Layout, figures: Sequence[Figures], num_parameters: int) -> str:
    """A line of the table: the slowest rank's time, the largest rank's memory and bytes."""
    seconds = max(own.seconds for own in figures)
    tokens = NUM_PACKS * PACK_LENGTH / seconds
    waits = f"{figures[0].wait_seconds / seconds:.0%}" if layout.num_ranks > 1 else "-"
    in_all, by_ulysses = (number / 1e6 for number in formula(layout, num_parameters))
    columns = [
        f"{layout.name:24}{tokens:9.0f}{tokens / layout.num_ranks:10.0f}{waits:>7}",
        f"{max(own.memory for own in figures) / 1e6:9.0f}",
        f"{max(own.sent for own in figures) / 1e6:11.2f}{in_all:9.2f}",
        f"{max(own.ulysses_sent for own in figures) / 1e6:11.2f}{by_ulysses:9.2f}{figures[0].loss:12.6f}",
    ]
    return "".join(columns)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the fastest counts")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    num_parameters = count_parameters()
    print(
        f"{num_parameters / 1e6:.1f} M parameters, fp32, a step of {NUM_PACKS} packs of {PACK_LENGTH} tokens, "
        f"fastest of {arguments.steps}; {len(os.sched_getaffinity(0))} cores; MB of one rank and step"
    )
    print(f"{'':24}{'tokens/s':>9}{'a rank':>10}{'waits':>7}{'peak MB':>9}{'sent MB':>11}{'formula':>9}"
          f"{'Ulysses':>11}{'formula':>9}{'first loss':>12}", flush=True)  # fmt: skip
    for layout in LAYOUTS:
        if arguments.only in layout.name:
            print(row(layout, measure(layout, arguments.steps), num_parameters), flush=True)


if __name__ == "__main__":
    main()
