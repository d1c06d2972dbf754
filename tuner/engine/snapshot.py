"""The whole state of a run to and from a checkpoint directory: tensors, random states, counters, a usable model."""

import hashlib
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner.dataset.stages import without_paths
from tuner.engine.checkpoint import Entry, read_manifest
from tuner.engine.draft import write_file
from tuner.engine.host_copies import HostCopies
from tuner.engine.randomness import capture_random_state, restore_random_state
from tuner.engine.strategy import Strategy
from tuner.engine.tensor_files import file_name, share_of, tensor_pieces
from tuner.engine.together import from_first
from tuner.engine.world import World
from tuner.errors import UserError
from tuner.model.adapter import adapter_facts, write_adapter_notes

if TYPE_CHECKING:
    from tuner.engine.runner import Runner, RunRecord

# settings that decide which tokens are in which step: a resumed run with others would be a third run, neither of two
DATA_SETTINGS = (
    "data_format", "chat_template", "loss_on", "train_newline", "parallel_tool_calls", "max_length", "too_long",
    "on_bad_row", "pack", "streaming", "seed", "stages",
)  # fmt: skip
# settings that change nothing which is computed; of the data it is the content that counts, not the path
FREE_SETTINGS = (
    "data_path", "num_accumulation_steps", "rank_timeout",
    "log_interval", "save_interval", "keep_checkpoints", "keep_every", "keep_best", "async_save",
    "copy_checkpoints_to", "sample_interval", "sample_prompts", "cache_dir",
    "needle_interval", "needle_lengths", "needle_depths", "needle_languages", "needle_haystack",
)  # fmt: skip
# of a model's config: what changes nothing that is computed, or is a setting of its own
FREE_MODEL_FACTS = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map",
    "_attn_implementation", "attn_implementation", "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip


class Snapshot(NamedTuple):
    """The state of a run after a step, of which this rank keeps a part, all in this host's memory."""

    step: int
    shares: dict[str, dict[str, Tensor]]  # kind -> name -> tensor
    files: dict[str, bytes]  # the rest
    facts: dict[str, Any]  # for the manifest

    @property
    def num_bytes(self) -> int:
        """What it takes on the disk, but for the headers of files."""
        tensors = sum(tensor.nbytes for share in self.shares.values() for tensor in share.values())
        return tensors + sum(map(len, self.files.values()))


def take_snapshot(runner: "Runner", *, loss: float | None = None, copies: HostCopies | None = None) -> Snapshot:
    """This rank's part of the state as it is now; all ranks must call it.

    Args:
        runner: between two steps.
        loss: mean over the tokens since the snapshot before, by which the best is chosen.
        copies: where tensors are copied to, so that training can go on; None leaves them where they are.
    """
    strategy, loop, world = runner.strategy, runner.train_loop, runner.strategy.world
    shares = {kind: share_of(kind, named, world, copies) for kind, named in strategy.state_tensors().items()}
    if copies is not None:
        copies.wait()
    device = strategy.device.index if strategy.device.type == "cuda" else None
    files = {random_state_file(world): as_json(of_device(capture_random_state(), device))}
    facts = {"step": strategy.step, "run": runner.run, "num_ranks": world.size, "loss": loss, "versions": versions()}
    if world.is_first:
        state = {
            "strategy": strategy.state_counters(),
            "num_ranks": world.size,
            "num_loss_tokens": loop.num_loss_tokens,
            "bad_steps": loop.bad_steps.state(),
            "next_data": next_data(runner),
            "packs_per_step": loop.dataloader.sampler.packs_per_step,
            "settings": runner.record.settings,
            "model": model_facts(runner.model.get_submodule("llm")),
            "tokenizer": tokenizer_facts(runner.record.tokenizer),
            "adapter": adapter_facts(runner.model.get_submodule("llm")),
        }
        files |= {"state.json": as_json(state), "config.py": runner.record.config_text.encode(), **runner.hf_files}
    return Snapshot(strategy.step, shares, files, facts)


def write_snapshot(snapshot: Snapshot, draft: Path, world: World) -> dict[str, Entry]:
    """Write this rank's files into a draft; what the manifest says of them.

    Raises:
        OSError: the disk refused.
        NonFiniteTensorError: a weight, or a tensor of the optimizer, is NaN or infinite.
    """
    entries = {}
    for kind, share in snapshot.shares.items():
        name = file_name(kind, world)
        entries[name] = write_file(draft / name, tensor_pieces(kind, share))
    for name, content in snapshot.files.items():
        entries[name] = write_file(draft / name, [content])
    return entries


def load_snapshot(runner: "Runner", checkpoint: Path) -> None:
    """Put the runner where a verified checkpoint is; the random states come last.

    Raises:
        UserError: another model, another tokenizer, other data.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    runner.enter_stage(max(0, read_manifest(checkpoint)["step"] - 1))
    compare_facts(state, runner, checkpoint)
    compare_settings(state["settings"], runner.record.settings, checkpoint)
    compare_packs_per_step(state["packs_per_step"], runner, checkpoint)
    runner.strategy.resume(checkpoint, state["strategy"])
    runner.run = read_manifest(checkpoint)["run"]
    runner.train_loop.num_loss_tokens = state["num_loss_tokens"]
    runner.train_loop.bad_steps.restore(state["bad_steps"])
    if runner.strategy.step > runner.train_loop.num_steps:
        raise UserError(
            f"{checkpoint} is {runner.strategy.step} steps old, but this config has only {runner.train_loop.num_steps}."
        )
    compare_data(state["next_data"], runner, checkpoint)
    load_random_state(runner.strategy, checkpoint, state["num_ranks"])


def load_random_state(strategy: Strategy, checkpoint: Path, num_ranks: int) -> None:
    """Go on drawing where this rank stopped; with another number of ranks the draws are others, which is said.

    Data needs none of them, dropout does: a rank that was there before has its own state, a new one keeps the fresh
    state that it was seeded with.
    """
    world, device = strategy.world, strategy.device
    random_states = checkpoint / random_state_file(world)
    if random_states.is_file():
        state = json.loads(random_states.read_text(encoding="utf-8"))
        restore_random_state(state, [device.index] if device.type == "cuda" else [])
    if num_ranks != world.size and world.is_first:
        print(
            f"warning: {checkpoint} was saved by {num_ranks} ranks and goes on with {world.size}: the same data in the "
            "same steps, sums in another order, and dropout, if there is any, draws other numbers",
            flush=True,
        )


def random_state_file(world: World) -> str:
    """Where a rank keeps the states of its random generators."""
    return f"rng-{world.rank:05d}.json"


def of_device(state: dict[str, Any], device: int | None) -> dict[str, Any]:
    """A random state without those of GPUs that belong to other ranks."""
    return state | {"cuda": [] if device is None else state["cuda"][device : device + 1]}


def compare_facts(state: dict[str, Any], runner: "Runner", checkpoint: Path) -> None:
    """UserError that lists what of model and tokenizer is not as it was; tensors are compared when they are read."""
    llm, tokenizer, world = runner.model.get_submodule("llm"), runner.record.tokenizer, runner.strategy.world
    of_adapter = from_first(adapter_facts(llm) if world.is_first else None, world)  # it may read all of the base
    kinds = {"model": model_facts(llm), "tokenizer": tokenizer_facts(tokenizer), "adapter": of_adapter}
    problems = []
    for what, now in kinds.items():
        saved = state[what]
        names = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
        if names:
            shown = "; ".join(f"{name} was {saved[name]!r} and is {now[name]!r}" for name in names[:5])
            problems.append(f"another {what} ({len(names)} differences): {shown}")
    if problems:
        raise UserError(f"{checkpoint} is a checkpoint of {', and of '.join(problems)}.")


def model_facts(llm: PreTrainedModel) -> dict[str, Any]:
    """What a model's config says of how it computes."""
    config = json.loads(llm.config.to_json_string(use_diff=False))
    return {name: value for name, value in config.items() if name not in FREE_MODEL_FACTS}


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tells tokenizers apart."""
    vocabulary = tokenizer.get_vocab()
    listed = json.dumps(sorted(vocabulary.items()), ensure_ascii=False)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()
           if isinstance(token, str)}  # fmt: skip
    return {"tokens": len(vocabulary), "vocabulary": hashlib.sha256(listed.encode()).hexdigest()[:16], **ids}


def compare_settings(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Other data is an error; whatever else differs and matters is said aloud, and then used."""
    names = [name for name in sorted({*saved, *current}) if placeless(saved, name) != placeless(current, name)]
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


def placeless(settings: dict[str, Any], name: str) -> Any:
    """A setting as it is compared: of files it is the content that counts, which is compared elsewhere."""
    value = settings.get(name)
    return without_paths(value) if name == "stages" and value is not None else value


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


def hf_files(llm: PreTrainedModel, record: "RunRecord") -> dict[str, bytes]:
    """What `write_hf` writes, by its name in a checkpoint; it stays the same as long as a run does."""
    with tempfile.TemporaryDirectory() as name:
        write_hf(Path(name), llm, record)
        paths = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        return {f"hf/{path.relative_to(name).as_posix()}": path.read_bytes() for path in paths}


def write_hf(directory: Path, llm: Any, record: "RunRecord") -> None:
    """All of a Hugging Face directory but the weights: `convert` needs nothing outside the checkpoint."""
    llm.config.save_pretrained(directory)
    if llm.can_generate():
        llm.generation_config.save_pretrained(directory)
    for path in remote_code(llm.config):
        shutil.copy(path, directory)
    record.tokenizer.save_pretrained(directory)
    choice = record.settings.get("parallel_tool_calls", "template")
    note = {"chat_template": record.chat_template, "parallel_tool_calls": choice}
    (directory / "template.json").write_bytes(as_json(note))
    write_adapter_notes(directory, llm)


def remote_code(config: Any) -> list[Path]:
    """The .py files that `auto_map` names and that lie beside the model: for loaders that need them, never run here."""
    named = [reference for entry in (config.to_dict().get("auto_map") or {}).values() for reference in np.ravel(entry)]
    modules = {str(reference).rpartition("--")[2].split(".")[0] for reference in named if reference}
    paths = [Path(config.name_or_path) / f"{module}.py" for module in sorted(modules)]
    return [path for path in paths if path.is_file()]


def versions() -> dict[str, str]:
    """What computed this state; for people who look at an old checkpoint."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("tuner", "torch", "transformers")}}


def as_json(value: Any) -> bytes:
    """JSON with Chinese readable."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
