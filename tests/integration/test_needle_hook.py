"""Needles while a model trains: the same figures however the ranks hold it, and not a bit of the run is another."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tuner.config import loads, render
from tuner.configs import literals
from tuner.dataset.needle_grid import NeedleGrid
from tuner.demo.files import resolve
from tuner.engine import needle
from tuner.engine.world import read_world
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.tokenizer import build_tokenizer
from tuner.parallel.mesh import build_mesh
from tuner.train import build_runner, prepare

STEPS, EVERY = 3, 2
GRID = {"lengths": "96,128,301", "depths": "0,50,100", "languages": "en"}  # nine packs: two ranks have not as many
ASKED = {"needle_interval": EVERY, **{f"needle_{name}": value for name, value in GRID.items()}}
ALONE: dict[str, Any] = {"num_accumulation_steps": 2}
RANKS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ulysses": ALONE | {"sequence_parallel_size": 2},
    "ring": ALONE | {"sequence_parallel_size": {"ring": 2}},
    "fsdp": {"fsdp": "full"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "fsdp and sp": ALONE | {"fsdp": "full", "sequence_parallel_size": 2},
    "zero3 and sp": ALONE | {"deepspeed": "zero3", "sequence_parallel_size": 2},
}


def write_inputs(directory: Path) -> None:
    """A model with weights in files, and rows enough."""
    model = directory / "model"
    shutil.copytree(resolve("demo:model"), model)
    vocabulary = len(build_tokenizer(str(model)))
    sizes = {"hidden_size": 36, "intermediate_size": 71, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InternLM2Config(vocab_size=vocabulary, num_key_value_heads=1, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    turns = [[("user", f"What is {number} plus 1?"), ("assistant", f"It is {number + 1}.")] for number in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def train(directory: Path, name: str, **settings: Any) -> None:
    """What `tuner train` does in this process."""
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
    given = {
        "model_path": str(directory / "model"), "data_path": str(directory / "rows.jsonl"), "data_format": "openai",
        "cache_dir": str(directory / "cache"), "max_length": 128, "pack": False, "num_accumulation_steps": 1,
        "max_steps": STEPS, "num_epochs": 2, "precision": "fp32", "lr": 1e-4, "sample_interval": 0,
        "save_interval": None, "weights": "pretrained",
    } | settings  # fmt: skip
    source = render("internlm2_tiny-sft_full", given).replace("    dict(type=CurvesHook),\n", "")
    config, world = loads(source, name), read_world()
    (directory / name).mkdir(exist_ok=True)
    prepared = prepare(config, world)
    prepared.strategy.place(world, build_mesh(prepared.strategy.degrees))
    values = {key: setting.value for key, setting in literals.settings(source, name).items()}
    build_runner(config, prepared, source, values, work_dir=directory / name).train()


def train_all(directory: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Each run twice: `name` asks for needles, `name plain` does not."""
    if dist.is_initialized():
        needle.draw_maps = lambda *_: None  # a second for each picture
    for name, settings in runs.items():
        train(directory, f"{name} plain", **settings)
        train(directory, name, **settings, **ASKED)


def cells(directory: Path, name: str, step: int) -> list[dict[str, Any]]:
    return json.loads((directory / name / "needle" / f"step_{step:08d}.json").read_text())["cells"]


def final(directory: Path, name: str) -> dict[str, torch.Tensor]:
    (checkpoint,) = (directory / name / "checkpoints").glob("step_*")
    return {key: value for file in checkpoint.glob("*.safetensors") for key, value in load_file(file).items()}


def random_states(directory: Path, name: str) -> list[Any]:
    (checkpoint,) = (directory / name / "checkpoints").glob("step_*")
    assert list(checkpoint.glob("rng-*.json"))
    return [json.loads(path.read_text()) for path in sorted(checkpoint.glob("rng-*.json"))]


def assert_untouched(directory: Path, name: str) -> None:
    """Weights, optimizer's state, random states and the metrics' numbers."""
    with_needles, without = final(directory, name), final(directory, f"{name} plain")
    assert with_needles.keys() == without.keys()
    assert len(with_needles) > 40
    assert [key for key, value in without.items() if not torch.equal(value, with_needles[key])] == []
    assert random_states(directory, name) == random_states(directory, f"{name} plain")
    rows = [(directory / run / "metrics.jsonl").read_text().splitlines() for run in (name, f"{name} plain")]
    same = ("step", "loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens")
    assert len({json.dumps([[json.loads(line)[key] for key in same] for line in lines]) for lines in rows}) == 1


def assert_same_figures(directory: Path, name: str) -> None:
    """As one process has them, whose steps are those of all ranks together."""
    for step in (EVERY, STEPS):
        expected, found = cells(directory, "alone", step), cells(directory, name, step)
        assert [row | {"log_probability": 0} for row in found] == [row | {"log_probability": 0} for row in expected]
        for one, other in zip(found, expected, strict=True):
            assert one["log_probability"] == pytest.approx(other["log_probability"], abs=1e-5), (name, step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has trained, with and without needles."""
    directory = tmp_path_factory.mktemp("needles")
    write_inputs(directory)
    train_all(directory, {"alone": ALONE})
    return directory


def test_a_run_with_needles_is_the_same_run_bit_for_bit(folder: Path):
    assert_untouched(folder, "alone")


def test_figures_are_those_of_transformers_on_the_saved_weights_in_float64(folder: Path):
    """Document by document, without packs; and their means are in metrics.jsonl."""
    llm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    weights = {key: value for key, value in final(folder, "alone").items() if key in llm.state_dict()}
    llm.load_state_dict({key: value.double() for key, value in weights.items()})
    grid = NeedleGrid(**GRID)
    make = grid.maker(build_tokenizer(str(folder / "model")))
    rows = cells(folder, "alone", STEPS)
    for row, cell in zip(rows, grid.cells(), strict=True):
        assert [row[key] for key in ("language", "length", "depth")] == list(cell[:3])
        ids, ((begin, end),) = make(cell)
        with torch.no_grad():
            logits = llm(torch.tensor([ids])).logits[0, begin - 1 : end - 1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[begin:end])[:, None]).mean()
        assert row["log_probability"] == pytest.approx(expected.item(), abs=1e-5)
        assert row["accuracy"] == float((logits.argmax(-1) == torch.tensor(ids[begin:end])).all())
    last = json.loads((folder / "alone" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["needle_log_probability_en"] == pytest.approx(sum(row["log_probability"] for row in rows) / len(rows))
    assert (folder / "alone" / "needle" / f"step_{EVERY:08d}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_on_two_ranks_too_however_they_hold_the_model_and_they_find_what_one_finds(folder: Path):
    run_on_ranks(2, train_all, folder, RANKS, timeout=600)
    for name in RANKS:
        assert_untouched(folder, name)
        assert_same_figures(folder, name)
