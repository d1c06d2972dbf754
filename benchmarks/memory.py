"""Peak memory of forward and backward against length: what each setting saves, beside transformers' Llama and its loss.

    python benchmarks/memory.py [--lengths 2048 8192 32768 131072] [--document 1024] [--picture memory.png]

A small InternLM2 in fp32 with the proportions of a large one, packs of documents, one thread, every figure in a process
of its own, forked from one that has computed nothing. Counted are the bytes of all living tensors, as operations make
them and let them go, without weights; what lies in the host's memory by offloading is no part of them. Beside them the
growth of the process, where offloading saves nothing, since host and device are one here. Bytes per token are those
between the two greatest lengths; "bend" is by how much they differ from those between the two before, 0 where memory is
linear; "plan" is what `tuner plan` computes for them, and "of plan" the measured ones over that. SDPA, which is what a
CPU has, copies the outputs of several documents; a plan means one document, or a kernel of a GPU.
"""

import argparse
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 262_144,
}
TILE_TOKENS = 2048
LONGEST_DOCUMENT = 32_768  # of what has one document of all tokens: its work grows with the square


class Way(NamedTuple):
    """How a step is computed."""

    memory: dict[str, Any] | None = None  # arguments of `Memory`; None is transformers' Llama
    is_chunked: bool = True
    longest: int | None = None  # sequence, where it is one document; None: documents of a length, as many as there are


WAYS = {
    "transformers' Llama and loss, layers again": Way(longest=LONGEST_DOCUMENT),
    "naive": Way({}, is_chunked=False),
    "+ chunked head and loss": Way({}),
    "+ layers again": Way({"gradient_checkpointing": True}),
    "+ tiles": Way({"gradient_checkpointing": True, "tile_tokens": TILE_TOKENS}),
    "+ tiles, attention kept": Way({"gradient_checkpointing": "attention", "tile_tokens": TILE_TOKENS}),
    "+ the same, one document": Way(
        {"gradient_checkpointing": "attention", "tile_tokens": TILE_TOKENS}, longest=LONGEST_DOCUMENT // 4
    ),
    "+ tiles, offloaded": Way(
        {"gradient_checkpointing": True, "tile_tokens": TILE_TOKENS, "offload_activations": True}
    ),
}


class Figures(NamedTuple):
    """Of one step."""

    tensor_bytes: float
    process_bytes: float
    seconds: float


def make_step(way: Way, num_tokens: int, document: int) -> tuple[Any, Callable[[], Any], Callable[[], int]]:
    """The model, a function that computes the loss, and one that says what lies on the host."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tuner.method.sft import SFT
    from tuner.model.checkpointing import Checkpointing
    from tuner.model.internlm2.configuration import InternLM2Config
    from tuner.model.memory import Memory
    from tuner.model.tiles import decoder_layers

    torch.manual_seed(0)
    ids = torch.randint(0, SIZES["vocab_size"], (1, num_tokens))
    if way.memory is None:
        llm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa").train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its newer name is missing in transformers that we allow
            llm.gradient_checkpointing_enable({"use_reentrant": False})
        return llm, lambda: llm(input_ids=ids, labels=ids, use_cache=False).loss, lambda: 0
    llm = AutoModelForCausalLM.from_config(InternLM2Config(**SIZES), attn_implementation="tuner_sdpa").train()
    Memory(**way.memory).save(llm)
    method = SFT(llm)
    method.head_is_product = way.is_chunked
    edges = torch.arange(0, num_tokens + 1, document, dtype=torch.int32)
    positions = torch.arange(num_tokens)[None] % document
    checkpointing = getattr(decoder_layers(llm)[0], "_gradient_checkpointing_func", None)
    host = checkpointing.host if isinstance(checkpointing, Checkpointing) else None
    return (
        llm,
        lambda: method(ids, ids, positions, edges, document, num_tokens)["loss"],
        lambda: host.host_bytes if host is not None else 0,
    )


def measure(name: str, num_tokens: int, document: int) -> Figures:
    """Of a step in this process."""
    import torch

    from tuner.plan.live import LiveBytes

    class DeviceBytes(LiveBytes):
        """Without what lies on the host; what leaves for it is looked at once it has left."""

        most = 0

        def look(self) -> None:
            self.most = max(self.most, self.now - host_bytes())

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.look()
            result = super().__torch_dispatch__(function, types, args, kwargs)
            if function is not torch.ops.aten.clone.default:
                self.look()
            return result

    warm_up, loss_of, _ = make_step(WAYS[name], min(num_tokens, document, 128), min(num_tokens, document, 128))
    loss_of().backward()
    del warm_up, loss_of
    llm, loss_of, host_bytes = make_step(WAYS[name], num_tokens, min(document, num_tokens))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    counter = DeviceBytes()
    counter.ignore(list(llm.parameters()))
    with counter:
        loss_of().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Figures(counter.most, grown * 1024, time.process_time() - started)


def measure_apart(name: str, num_tokens: int, document: int) -> Figures:
    """`measure` in a process of its own, whose peak is its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def tell() -> None:
        sender.send(measure(name, num_tokens, document))

    process = multiprocessing.get_context("fork").Process(target=tell)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{name} with {num_tokens} tokens failed.") from None
    finally:
        process.join()


def planned_slope(way: Way, lengths: list[int]) -> float:
    """Bytes per token between two lengths, as `tuner plan` computes them for one document, without running anything."""
    from tuner.model.internlm2.configuration import InternLM2Config
    from tuner.plan.memory import memory_of
    from tuner.plan.setup import Setup

    names = {"gradient_checkpointing": "checkpointing"}
    settings = {names.get(name, name): value for name, value in (way.memory or {}).items()}
    setup = Setup(InternLM2Config(**SIZES), 0, precision="fp32", on_cpu=True, **settings)
    setup = setup._replace(loss="chunked" if way.is_chunked else "naive")
    peaks = [memory_of(setup._replace(num_tokens=length)).peak.total for length in lengths]
    return (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])


def slope(figures: dict[int, Figures]) -> tuple[float, float | None]:
    """Bytes per token between the two greatest lengths, and its difference to that before as a share of it."""
    lengths = sorted(figures)
    steps = [
        (figures[longer].tensor_bytes - figures[shorter].tensor_bytes) / (longer - shorter)
        for shorter, longer in pairwise(lengths)
    ]
    return steps[-1], abs(steps[-1] / steps[-2] - 1) if len(steps) > 1 else None


def row(name: str, cells: list[str], last: list[str]) -> str:
    """A line of the table."""
    return f"{name:44}" + "".join(f"{cell:>16}" for cell in cells) + "".join(f"{cell:>12}" for cell in last)


def draw(table: dict[str, dict[int, Figures]], path: Path) -> None:
    """Peak against length, both logarithmic: straight lines of slope one are linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, figures in table.items():
        axes.plot(list(figures), [each.tensor_bytes / 2**20 for each in figures.values()], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("peak of living tensors, MiB")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32_768, 131_072])
    parser.add_argument("--document", type=int, default=1024, help="tokens of a document")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    lengths = sorted(arguments.lengths)
    load()
    print(f"peak MiB of living tensors (growth of the process), documents of {arguments.document} tokens")
    print(row("", [f"{length:,}" for length in lengths], ["bytes/token", "bend", "plan", "of plan", "CPU s"]))
    table: dict[str, dict[int, Figures]] = {}
    for name, way in WAYS.items():
        known = [length for length in lengths if way.longest is None or length <= way.longest]
        document = arguments.document if way.longest is None else way.longest
        figures = {length: measure_apart(name, length, document) for length in known}
        table[name] = figures
        cells = [f"{each.tensor_bytes / 2**20:.1f} ({each.process_bytes / 2**20:.0f})" for each in figures.values()]
        cells += [""] * (len(lengths) - len(cells))
        print(row(name, cells, last_cells(way, figures)), flush=True)
    if arguments.picture:
        draw(table, arguments.picture)


def last_cells(way: Way, figures: dict[int, Figures]) -> list[str]:
    """How memory grows, what was planned, and the seconds of the longest step."""
    seconds = f"{list(figures.values())[-1].seconds:.0f}"
    if len(figures) < 2:
        return ["", "", "", "", seconds]
    rise, bend = slope(figures)
    cells = [f"{rise:.0f}", "" if bend is None else f"{bend:.1%}"]
    if way.memory is None:
        return [*cells, "", "", seconds]
    planned = planned_slope(way, sorted(figures)[-2:])
    return [*cells, f"{planned:.0f}", f"{rise / planned:.3f}", seconds]


def load() -> None:
    """Import whatever the processes need, once; compute nothing, for threads do not come along to a fork."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tuner.method.sft
    import tuner.model.internlm2.modeling
    import tuner.plan.memory  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
