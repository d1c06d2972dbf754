"""Training from a config's text to a trained checkpoint: check, prepare the data, build, run."""

import copy
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tuner.check import check
from tuner.config import loads
from tuner.configs import literals
from tuner.dataset.staged import StagedDataset
from tuner.engine.assemble import Assembly
from tuner.engine.checkpoint import write_text_atomically
from tuner.engine.loop import RANK_TIMEOUT, documents_of_rank
from tuner.engine.machine import set_num_threads
from tuner.engine.randomness import seed_everything
from tuner.engine.runner import Parts, Runner, RunRecord
from tuner.engine.sameness import compare_ranks, own_facts
from tuner.engine.shortage import Shortage, shortage_told
from tuner.engine.stages import StagedRope, StagedSchedule, told_shares
from tuner.engine.strategy import Strategy
from tuner.engine.together import from_first
from tuner.engine.watch import Patience, watched
from tuner.engine.work_dir import check_shared, choose_checkpoints, locked, write_config
from tuner.engine.world import World, joined, read_world
from tuner.errors import StoppedError, UserError
from tuner.masking import mask_source
from tuner.model.build import build_llm
from tuner.model.hollow import Hold
from tuner.model.rope import Rope
from tuner.model.tokenizer import check_vocabulary
from tuner.parallel.mesh import Layout, arrange, build_mesh

MAX_SHOWN = 60  # characters of a setting that differs between ranks


def train(
    source: str,
    *,
    work_dir: Path,
    resume: str | None = None,
    name: str = "config.py",
    before: Callable[[Any], None] = lambda config: None,
    explain: Callable[[Any, Shortage], str] = lambda config, shortage: str(shortage),
) -> Path:
    """Train what the config says; returns the work dir.

    Args:
        source: the text of a config with all settings filled in.
        work_dir: gets config.py, ledger.json, metrics.jsonl, tensorboard/, curves.png, samples.jsonl, checkpoints/.
        resume: None begins, "auto" goes on from the newest checkpoint of `work_dir`, a path from that one.
        name: what error messages call the config.
        before: gets the checked config before anything is made; may raise a UserError.
        explain: (config, shortage) -> the message where memory runs out.

    Raises:
        UserError: whatever the user can mend, before the first step where it can be known by then.
        StoppedError: a signal or the stop file ended the run early; all is saved.
    """
    config = loads(source, name)
    check(config)
    before(config)
    work_dir, world = work_dir.resolve(), read_world()
    kept = without_secrets(source, name, world)
    settings = {key: setting.value for key, setting in literals.settings(kept, name).items()}
    with locked(work_dir) if world.is_first else nullcontext():
        checkpoints = choose_checkpoints(work_dir, resume) if world.is_first else []
        if world.is_first:
            write_config(work_dir, kept, is_resumed=bool(checkpoints))
        prepared = prepare(config, world)
        with meeting(config, prepared, work_dir), shortage_told(prepared.strategy, partial(explain, config)):
            compare_run(source, settings, prepared.dataloader, world)
            checkpoints = from_first(checkpoints, world)
            check_shared(work_dir, world)
            prepared.strategy.place(world, build_mesh(prepared.strategy.degrees))
            runner = build_runner(config, prepared, kept, settings, work_dir=work_dir, checkpoints=checkpoints)
            runner.train()
        if world.is_first:
            save_ledger(prepared.dataloader, work_dir)  # a stream's has grown
            if isinstance(prepared.dataloader.dataset, StagedDataset):
                print(told_shares(prepared.dataloader.dataset), flush=True)
    if runner.train_loop.stopped_by:
        raise StoppedError(runner.train_loop.stopped_by)
    return work_dir


def without_secrets(source: str, name: str, world: World) -> str:
    """The config's text as the run keeps it: with its tokens and passwords masked, which is said."""
    kept = mask_source(source)
    if kept.places and world.is_first:
        print(
            f"warning: {name} holds what looks like tokens or passwords ({', '.join(kept.places)}); they are masked in "
            "what this run writes. Read them from the environment: os.environ[...].",
            flush=True,
        )
    return kept.text


@contextmanager
def meeting(config: Any, prepared: "Prepared", work_dir: Path) -> Iterator[None]:
    """The group of all ranks, each of which watches that the others come."""
    world, strategy, dataloader = read_world(), prepared.strategy, prepared.dataloader
    timeout = config.train_cfg.get("rank_timeout", RANK_TIMEOUT)
    num_sharing = strategy.degrees.size

    def documents(step: int, rank: int) -> list[str]:
        return documents_of_rank(dataloader, step, rank // num_sharing, world.size // num_sharing)

    of_groups = timedelta(seconds=Patience(timeout).of_groups)
    with (
        joined(world, strategy.device, timeout=of_groups),
        watched(world, strategy.progress, timeout=timeout, documents=documents, work_dir=work_dir),
    ):
        yield


def compare_run(source: str, settings: Mapping[str, Any], dataloader: DataLoader, world: World) -> None:
    """Raise a UserError, the same on all ranks, where they have other configs, data or code; all must call it.

    Args:
        settings: of the config, without secrets; those that differ are shown.
    """
    if world.size > 1:
        shown = {f"setting {name}": textwrap.shorten(repr(value), MAX_SHOWN) for name, value in settings.items()}
        compare_ranks(world, own_facts(source, dataloader.dataset) | shown)


class Prepared(NamedTuple):
    """What takes long, may fail on a row, and needs no other rank."""

    assembly: Assembly
    strategy: Strategy
    tokenizer: PreTrainedTokenizerBase
    dataloader: DataLoader


def prepare(config: Any, world: World) -> Prepared:
    """Tokenise and pack; no process group exists yet, so nobody's patience ends however long it takes."""
    if "tokenizer" not in config:
        raise UserError("The config needs its tokenizer by name: tokenizer = dict(type=build_tokenizer, path=...).")
    assembly = Assembly(config)
    strategy = assembly.build(config.strategy)
    layout = arrange(world.size, strategy.degrees)
    set_num_threads(world.local_size)
    seed_everything(config.get("seed", 0))
    tokenizer = assembly.build(config.tokenizer)
    node = share_of_rank(config.train_dataloader, layout, world.rank, strategy.degrees.size)
    return Prepared(assembly, strategy, tokenizer, assembly.build(node))


def share_of_rank(dataloader: Any, layout: Layout, rank: int, num_parts: int) -> Any:
    """The dataloader's node for one rank: those that share a sequence get the same packs, of a length that divides."""
    node = copy.deepcopy(dataloader)
    if len(layout.sequence) > 1:
        node.rank = next(place for place, members in enumerate(layout.sequence) if rank in members)
        node.num_ranks = len(layout.sequence)
    if num_parts > 1:
        node.dataset.pad_to_multiple_of = num_parts
    return node


def build_runner(
    config: Any,
    prepared: Prepared,
    source: str,
    settings: dict[str, Any],
    *,
    work_dir: Path,
    checkpoints: Sequence[Path] = (),
) -> Runner:
    """Weights, then the frame around them."""
    assembly, strategy, tokenizer, dataloader = prepared
    world, seed = strategy.world, config.get("seed", 0)
    if world.is_first:
        save_ledger(dataloader, work_dir)
    model = assembly.build(with_holder(config.model, strategy.holder()))
    check_vocabulary(tokenizer, model.llm)
    rope = StagedRope(model.llm, assembly.build(config.get("rope")) or Rope(), dataloader.dataset)
    rope.enter(0)
    schedule = assembly.build(config.param_scheduler)
    if isinstance(dataloader.dataset, StagedDataset):
        schedule = StagedSchedule(schedule, dataloader.dataset)
    if strategy.degrees.size > 1:
        model.cut_sequences(strategy.mesh)
    parts = Parts(
        model=model,
        dataloader=dataloader,
        optim_wrapper=config.optim_wrapper,
        schedule=schedule,
        strategy=strategy,
        train_cfg=config.train_cfg,
        hooks=assembly.build(config.get("custom_hooks", [])),
        rope=rope,
    )
    record = RunRecord(source, json.loads(json.dumps(settings)), tokenizer, settings.get("chat_template"))
    # what building drew depends on the model's code, and what training draws should not; ranks drop other units
    seed_everything(seed + world.rank)
    return Runner(parts, record, work_dir=work_dir, checkpoints=checkpoints)


def with_holder(model: Any, hold: Hold | None) -> Any:
    """The model's node; where no rank may hold all weights, its LLMs leave them to the strategy."""
    if hold is None:
        return model
    node = copy.deepcopy(model)
    pending = [node]
    while pending:
        part = pending.pop()
        pending += [value for value in part.values() if isinstance(value, Mapping)]
        if part.get("type") is build_llm:
            part["hold"] = hold
    return node


def save_ledger(dataloader: DataLoader, work_dir: Path) -> None:
    """Where every token went, beside the run that used them."""
    dataset = dataloader.dataset
    ledger = dataset.ledger.to_dict() | {"sources": dataset.contributions}
    if isinstance(dataset, StagedDataset):
        ledger["stages"] = dataset.achieved()
    write_text_atomically(work_dir / "ledger.json", json.dumps(ledger, ensure_ascii=False, indent=1) + "\n")
