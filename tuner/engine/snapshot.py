"""The whole state of a run to and from a checkpoint directory: tensors, random states, counters, a usable model."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.engine.checkpoint import publishing, verify_checkpoint
from tuner.engine.randomness import capture_random_state, restore_random_state
from tuner.engine.together import all_or_none
from tuner.engine.world import World
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.engine.runner import Runner, RunRecord

# settings that decide which tokens are in which step: a resumed run with others would be a third run, neither of two
DATA_SETTINGS = (
    "data_format", "chat_template", "loss_on", "train_newline", "parallel_tool_calls", "max_length", "too_long",
    "on_bad_row", "pack", "streaming", "seed",
)  # fmt: skip
# settings that change nothing which is computed; of the data it is the content that counts, not the path
FREE_SETTINGS = (
    "data_path", "num_accumulation_steps", "rank_timeout",
    "log_interval", "save_interval", "keep_checkpoints", "sample_interval", "sample_prompts", "cache_dir",
)  # fmt: skip


def save_snapshot(runner: "Runner") -> Path:
    """Publish a checkpoint of the current step, written by all ranks.

    Raises:
        OSError, SafetensorError: the disk of this rank refused.
        PeerError: that of another rank did.
        NonFiniteStepError: a weight is NaN or infinite.
    """
    strategy, loop, world = runner.strategy, runner.train_loop, runner.strategy.world
    with publishing(Path(runner.work_dir), strategy.step, world) as draft:
        state = {
            "strategy": strategy.save_checkpoint(draft),
            "num_loss_tokens": loop.num_loss_tokens,
            "next_data": next_data(runner),
            "packs_per_step": loop.dataloader.sampler.packs_per_step,
            "settings": runner.record.settings,
            "versions": versions(),
        }
        with all_or_none(world, (OSError,)):
            write_json(draft / random_state_file(world), capture_random_state())
            if world.is_first:
                write_json(draft / "state.json", state)
                (draft / "config.py").write_text(runner.record.config_text, encoding="utf-8")
                write_hf(draft / "hf", runner.model.get_submodule("llm"), runner.record)
    return draft.with_name(draft.name.removeprefix(".draft_"))


def load_snapshot(runner: "Runner", checkpoint: Path) -> None:
    """Verify a checkpoint, then put the runner where it was; the random states come last.

    Raises:
        UserError: a damaged file, another model, other data.
    """
    verify_checkpoint(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    compare_settings(state["settings"], runner.record.settings, checkpoint)
    compare_packs_per_step(state["packs_per_step"], runner, checkpoint)
    runner.strategy.resume(checkpoint, state["strategy"])
    runner.train_loop.num_loss_tokens = state["num_loss_tokens"]
    if runner.strategy.step > runner.train_loop.num_steps:
        raise UserError(
            f"{checkpoint} is {runner.strategy.step} steps old, but this config has only {runner.train_loop.num_steps}."
        )
    compare_data(state["next_data"], runner, checkpoint)
    random_states = checkpoint / random_state_file(runner.strategy.world)
    if random_states.is_file():
        restore_random_state(json.loads(random_states.read_text(encoding="utf-8")))
    else:
        print(f"warning: {checkpoint} was saved by fewer ranks: this one draws random numbers anew", flush=True)


def random_state_file(world: World) -> str:
    """Where a rank keeps the states of its random generators."""
    return f"rng-{world.rank:05d}.json"


def compare_settings(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Other data is an error; whatever else differs and matters is said aloud, and then used."""
    names = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    changes = {name: f"{name} was {saved.get(name)!r} and is {current.get(name)!r}" for name in names}
    forbidden = [text for name, text in changes.items() if name in DATA_SETTINGS]
    if forbidden:
        raise UserError(
            f"{checkpoint} cannot be continued with other data: {'; '.join(forbidden)}. "
            "Restore these settings, or start a new run in another --work-dir."
        )
    for name, text in changes.items():
        if name not in FREE_SETTINGS:
            print(f"warning: resumed with a changed setting, this is no longer the same run: {text}", flush=True)


def compare_packs_per_step(saved: int, runner: "Runner", checkpoint: Path) -> None:
    """Any number of ranks can go on where as many packs make a step: else the steps would have other documents."""
    now = runner.train_loop.dataloader.sampler.packs_per_step
    if now != saved:
        world, mesh = runner.strategy.world, runner.strategy.mesh
        num_ranks = world.size // mesh.degrees.size
        fits = saved % num_ranks == 0
        remedy = f"Set num_accumulation_steps={saved // num_ranks}." if fits else f"Use a divisor of {saved} as number."
        raise UserError(
            f"{checkpoint} has {saved} packs in a step, this run {now} (num_accumulation_steps times {num_ranks} "
            f"data-parallel ranks), so it would not continue it. {remedy}"
        )


def compare_data(saved: dict[str, Any], runner: "Runner", checkpoint: Path) -> None:
    """The step after the checkpoint must consist of the documents it would have had then, wherever their files lie."""
    if saved and next_data(runner) not in ({}, saved):
        raise UserError(
            f"{checkpoint} cannot be continued: step {runner.strategy.step} would now read other documents than when "
            "it was saved. Restore the data files, or start a new run in another --work-dir."
        )


def next_data(runner: "Runner") -> dict[str, Any]:
    """What the step that comes next reads, over all ranks: the shards by their content, and document numbers.

    Empty at the end.
    """
    loader = runner.train_loop.dataloader
    if runner.strategy.step >= runner.train_loop.num_steps:
        return {}
    packs = loader.sampler.of_all_ranks(runner.strategy.step).packs
    return {"shards": loader.dataset.fingerprint(packs), "packs": [list(map(int, documents)) for documents in packs]}


def write_hf(directory: Path, llm: Any, record: "RunRecord") -> None:
    """All of a Hugging Face directory but the weights: `convert` needs nothing outside the checkpoint."""
    llm.config.save_pretrained(directory)
    if llm.can_generate():
        llm.generation_config.save_pretrained(directory)
    for path in remote_code(llm.config):
        shutil.copy(path, directory)
    record.tokenizer.save_pretrained(directory)
    choice = record.settings.get("parallel_tool_calls", "template")
    write_json(directory / "template.json", {"chat_template": record.chat_template, "parallel_tool_calls": choice})


def remote_code(config: Any) -> list[Path]:
    """The .py files that `auto_map` names and that lie beside the model: for loaders that need them, never run here."""
    named = [reference for entry in (config.to_dict().get("auto_map") or {}).values() for reference in np.ravel(entry)]
    modules = {str(reference).rpartition("--")[2].split(".")[0] for reference in named if reference}
    paths = [Path(config.name_or_path) / f"{module}.py" for module in sorted(modules)]
    return [path for path in paths if path.is_file()]


def versions() -> dict[str, str]:
    """What computed this state; for people who look at an old checkpoint."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("tuner", "torch", "transformers")}}


def write_json(path: Path, value: Any) -> None:
    """JSON with Chinese readable."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
