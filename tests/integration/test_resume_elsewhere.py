"""A run goes on in another form, on other ranks, by another strategy, sequences cut or whole: tensors, data, losses."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_train_zero import assert_equal, build, checkpoint_of, settings_of, write_inputs

from tuner.cli import run
from tuner.config import render

pytest.importorskip("deepspeed")

HALF, END = 2, 22  # steps
PACKS = 4  # in a step, whatever reads them
FORMS: dict[str, dict[str, Any]] = {
    "one": {"num_accumulation_steps": PACKS},
    "two": {},
    "zero1": {"deepspeed": "zero1"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "fsdp": {"fsdp": "full"},
    "cut": {"sequence_parallel_size": 2, "num_accumulation_steps": PACKS},
}
ON_TWO = [name for name in FORMS if name != "one"]
PAIRS = [
    *(("one", name) for name in ON_TWO),
    *(("zero1", "zero2"), ("zero2", "zero3"), ("zero3", "zero1"), ("zero3", "two"), ("two", "zero2")),
    *(("cut", "two"), ("two", "cut"), ("zero3", "fsdp"), ("fsdp", "zero1")),
]
TO_ONE = [(name, "one") for name in ON_TWO]
COMMON = {"num_accumulation_steps": PACKS // 2, "num_epochs": 6, "max_steps": END, "lr": 1e-4, "log_interval": 99}


def settings(directory: Path, form: str) -> dict[str, Any]:
    return settings_of(directory, **COMMON | {"save_interval": HALF, "keep_every": 20} | FORMS[form])


def name_of(source: str, target: str) -> str:
    return f"{source}_to_{target}"


def go_on(directory: Path, source: str, target: str) -> None:
    """Train from the source's checkpoint; what is read is saved again at once."""
    name = name_of(source, target)
    own = {key: value for key, value in settings(directory, target).items() if key != "save_interval"}
    runner = build(directory, name, checkpoint_of(directory, source, HALF), save_interval=None, **own)
    load = runner.load_or_resume

    def load_and_save() -> None:
        load()
        runner.strategy.save_checkpoint(directory / name)

    runner.load_or_resume = load_and_save
    runner.train()


def run_all_on_two(directory: Path) -> None:
    for name in ON_TWO:
        build(directory, name, None, **settings(directory, name)).train()
    for source, target in PAIRS:
        go_on(directory, source, target)


def alone(directory: Path, name: str, *resume: str) -> None:
    config = directory / f"{name}.py"
    config.write_text(render("internlm2_tiny-sft_full", settings(directory, "one")))
    assert run(["train", str(config), "--work-dir", str(directory / name), *resume]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elsewhere")
    write_inputs(directory)
    alone(directory, "one")
    run_on_ranks(2, run_all_on_two, directory, timeout=1200)
    for source, target in TO_ONE:
        alone(directory, name_of(source, target), "--resume", str(checkpoint_of(directory, source, HALF)))
    return directory


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_tensor_is_read_bit_for_bit(trained: Path, source: str, target: str):
    assert_equal(trained / name_of(source, target), checkpoint_of(trained, source, HALF))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [*PAIRS, *TO_ONE])
def test_the_same_documents_follow_with_the_same_losses(trained: Path, source: str, target: str):
    ours = [row for row in rows(trained, name_of(source, target)) if row["step"] > HALF]
    theirs = [row for row in rows(trained, source) if row["step"] > HALF]
    assert [row["step"] for row in ours] == list(range(HALF + 1, END + 1))
    for name in ("num_loss_tokens", "trained_tokens", "lr", "epoch"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    differences = torch.tensor([abs(our["loss"] - their["loss"]) for our, their in zip(ours, theirs)])
    assert differences[0] <= 1e-6 * ours[0]["loss"] + 1e-7
    assert differences.max() <= 1e-4


@pytest.mark.slow
def test_the_losses_tell_one_step_from_the_next(trained: Path):
    """Else the comparison above would not see other documents."""
    losses = [row["loss"] for row in rows(trained, "one")]
    assert min(abs(one - other) for one, other in pairwise(losses)) > 1e-4
