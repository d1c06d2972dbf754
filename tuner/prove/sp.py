"""`tuner check sp`: a step of the user's data, spread over ranks, has the gradient of its documents one by one."""

import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tuner.check import DATA_PARTS, check
from tuner.config import loads
from tuner.errors import UserError
from tuner.parallel.mesh import Degrees, arrange, check_heads, read_degrees
from tuner.prove.documents import (
    LAST,
    OWN,
    PACK_LENGTHS,
    PLACEMENTS,
    Step,
    build_data,
    make_step,
    num_shared,
    short_documents,
    train_last_shard,
)
from tuner.prove.gradients import Tolerance, table, worst
from tuner.prove.holding import read_holding
from tuner.prove.processes import on_ranks
from tuner.prove.small_model import (
    HEAD_SIZE,
    NUM_TOKEN_IDS,
    Family,
    Float64,
    build_small,
    narrow,
    read_family,
    write_model,
)
from tuner.prove.spread_step import Job, Outcome, by_definition, expected_path, outcomes_on_rank

NUM_ROWS = 5  # parameters shown of each placement
NUM_ACCUMULATED = 4  # micro-batches of a rank, at most
EXIT_DIFFERS = 2


class Options(NamedTuple):
    """What the command line says."""

    sp: str | None = None  # ranks that share a sequence; the config's where it is None
    ranks: int | None = None  # of the world; None is one sequence's, and at least 2
    tokens: int = 64  # that documents are shortened to, more or less
    train: str = "both"  # OWN, LAST or "both"
    scale_loss: float = 1.0


def check_sp(source: str, *, name: str = "config.py", **options: Any) -> int:
    """Print how the gradients of a step differ; returns 0 where they do not, 2 where they do.

    Args:
        source: the text of a config with all settings filled in; weights of its model are not needed.
        name: what error messages call the config.
        options: the entries of Options.

    Raises:
        UserError: whatever the user can mend, as training would say it.
    """
    started, wanted = time.monotonic(), Options(**options)
    config = loads(source, name)
    check(config, {*DATA_PARTS, "strategy", "optim_wrapper"})
    strategy = config.get("strategy") or {}
    own_sp = strategy.get("sequence_parallel_size", 1)
    holding = read_holding(strategy)
    degrees = read_degrees(read_sp(wanted.sp) if wanted.sp is not None else own_sp)
    num_ranks = wanted.ranks if wanted.ranks is not None else max(2, degrees.size)
    if num_ranks < 1:
        raise UserError(f"--ranks {num_ranks}: give at least 1, the number of processes.")
    arrange(num_ranks, degrees)
    family = read_family(config)
    check_heads(family.num_heads, family.num_kv_heads, degrees.ulysses)
    attention = "eager" if family.attention == "eager" else "sdpa"
    ranks = "rank" if num_ranks == 1 else "ranks"
    print(f"{name}: is a step's gradient the same when it is spread over {num_ranks} {ranks}?")
    print(f"  model   {describe(family)}")
    print(f"  weights {holding.words}")
    steps = choose_steps(config, degrees, num_ranks, wanted)
    with tempfile.TemporaryDirectory(prefix="tuner-prove-") as directory:
        model = write_model(narrow(family), Path(directory))
        job = Job(source, name, model, attention, degrees, holding, steps, wanted.scale_loss)
        losses = expect(config, job)
        print(
            f"  {time.monotonic() - started:6.1f} s  one process has done it, document by document; {num_ranks} start",
            flush=True,
        )
        outcomes = on_ranks(num_ranks, outcomes_on_rank, job)
    print(f"  {time.monotonic() - started:6.1f} s  {num_ranks} processes have done it", flush=True)
    tolerance = holding.tolerance
    good = [report(name, losses[name], [found[name] for found in outcomes], tolerance) for name in steps]
    seconds = f"{time.monotonic() - started:.0f} s"
    if all(good):
        print(f"\nThe same: no parameter's gradient is more than {tolerance.apart:g} apart, nor is the loss. {seconds}")
        return 0
    print(f"\nNOT THE SAME (allowed is {tolerance.apart:g}): what is trained depends on how it is spread. {seconds}")
    return EXIT_DIFFERS


def read_sp(text: str) -> int | dict[str, int]:
    """`8`, `ulysses=8,ring=2` or a dict as in a config."""
    if text.isdecimal():
        return int(text)
    pairs = re.findall(r"(\w+)\W*[=:]\s*(\d+)", text)
    if not pairs:
        raise UserError(f"--sp {text} is not understood. Give a number of ranks, or ulysses=8,ring=2.")
    return {name: int(number) for name, number in pairs}


def describe(family: Family) -> str:
    """The small model in a line."""
    return (
        f"{type(family.config).__name__} made small: {family.num_heads} heads and {family.num_kv_heads} kv heads as in "
        f"config.json, of {HEAD_SIZE}; {NUM_TOKEN_IDS} token ids, random weights"
    )


def choose_steps(config: Any, degrees: Degrees, num_ranks: int, options: Options) -> dict[str, Step]:
    """The step by where its trained tokens lie; what it is made of is printed."""
    if options.tokens < 8:
        raise UserError(f"--tokens {options.tokens} leaves too little of a document. Give at least 8.")
    if options.train not in (*PLACEMENTS, "both"):
        raise UserError(f"--train {options.train} is unknown. Choose {', '.join(PLACEMENTS)} or both.")
    dataloader = build_data(config)
    num_replicas = num_ranks // degrees.size
    num_accumulated = max(2, min(NUM_ACCUMULATED, config.train_dataloader.get("num_accumulation_steps", 1)))
    max_length = PACK_LENGTHS * options.tokens
    num_tokens = max_length * num_replicas * num_accumulated
    documents = short_documents(dataloader, num_tokens - max_length // 2, length=options.tokens)
    own = make_step(documents, max_length, packed=dataloader.dataset.pack)
    steps = {OWN: own, LAST: train_last_shard(own, degrees)}
    lengths = [len(document.ids) for document in documents]
    print(
        f"  data    {len(documents)} documents, the first of training, shortened to {min(lengths)} to {max(lengths)} "
        f"tokens; {sum(lengths):,} in {own.num_packs} packs"
    )
    print(
        f"  ranks   data parallel {num_replicas} x Ulysses {degrees.ulysses} x ring {degrees.ring}, "
        f"{-(-own.num_packs // num_replicas)} micro-batches a rank; {num_shared(own, degrees)} documents lie on "
        "several ranks",
        flush=True,
    )
    return {name: step for name, step in steps.items() if options.train in (name, "both")}


def expect(config: Any, job: Job) -> dict[str, float]:
    """The loss of each step by definition; its gradients are written where ranks look for them."""
    losses = {}
    method = build_small(config, job.model, attention=job.attention, dtype=torch.float64)
    for placement, step in job.steps.items():
        with Float64():
            losses[placement], gradients = by_definition(method, step)
        torch.save(gradients, expected_path(job.model, placement))
    return losses


def report(placement: str, expected: float, outcomes: list[Outcome], tolerance: Tolerance) -> bool:
    """Print what the ranks found for a placement; whether it is the same step."""
    apart = max(abs(outcome.loss - expected) / abs(expected) for outcome in outcomes)
    differences = worst(outcome.differences for outcome in outcomes)
    print(f"\ntrained: {PLACEMENTS[placement]}")
    print(f"  loss {outcomes[0].loss:.12f}, by definition {expected:.12f}, ratio {outcomes[0].loss / expected:.12f}")
    print("\n".join(table(differences, NUM_ROWS)))
    return tolerance.holds(apart) and all(tolerance.holds(difference.apart) for difference in differences)
