"""Stages on two ranks, whatever shares the work: gradients of every step and weights at the end are one process's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_train_zero import build, checkpoint_of, settings_of, write_inputs

from tuner.cli import run
from tuner.config import render
from tuner.engine.tensor_files import WEIGHTS, TensorFiles

NUM_STEPS = 8
EXACT = ("step", "stage", "lr", "num_loss_tokens", "trained_tokens")
FORMS: dict[str, dict[str, Any]] = {
    "ddp": {"num_accumulation_steps": 2},
    "zero3": {"num_accumulation_steps": 2, "deepspeed": "zero3"},
    "fsdp": {"num_accumulation_steps": 2, "fsdp": "full"},
    "cut": {"num_accumulation_steps": 4, "sequence_parallel_size": 2},
}
LINEAR = {"rope_type": "linear", "factor": 16}  # far from the others: on one rank alone it would show
STAGES: list[dict[str, Any]] = [
    {"max_length": 64, "share": 0.4},
    {"max_length": 128, "share": 0.3, "buckets": {64: 0.5, 128: 0.5}, "rope_scaling": LINEAR, "lr_factor": 0.5},
    {"max_length": 128, "share": 0.3, "tokens_per_step": 3 * 128},  # one of four micro-batches of two ranks is empty
]


def settings(directory: Path, **others: Any) -> dict[str, Any]:
    common = {"stages": STAGES, "max_steps": NUM_STEPS, "pack": True, "save_interval": None, "lr": 1e-4}
    return settings_of(directory, **common | others)


def train_all(directory: Path, forms: list[str]) -> None:
    for form in forms:
        build(directory, form, None, **settings(directory, **FORMS[form])).train()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process."""
    directory = tmp_path_factory.mktemp("stages_on_ranks")
    write_inputs(directory)
    rows = [
        [("user", f"What is {place}?"), ("assistant", f"It is {place}, or {place + 1}. " * (1 + place % 7))]
        for place in range(60)
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n")
    config = directory / "alone.py"
    config.write_text(render("internlm2_tiny-sft_full", settings(directory, num_accumulation_steps=4)))
    assert run(["train", str(config), "--work-dir", str(directory / "alone")]) == 0
    return directory


def rows_of(directory: Path, form: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / form / "metrics.jsonl").read_text().splitlines()]


def weights_of(directory: Path, form: str) -> torch.Tensor:
    files = TensorFiles(checkpoint_of(directory, form, NUM_STEPS), WEIGHTS)
    return torch.cat([files[name].double().flatten() for name in sorted(files)])


def begun_with(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(directory / "model").state_dict()
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def assert_as_one(directory: Path, form: str) -> None:
    ours, theirs = rows_of(directory, form), rows_of(directory, "alone")
    assert [row["stage"] for row in theirs] == [1] * 3 + [2] * 2 + [3] * 3
    for our, their in zip(ours, theirs, strict=True):
        assert [our[name] for name in EXACT] == [their[name] for name in EXACT]
        assert our["loss"] == pytest.approx(their["loss"], rel=5e-7)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-5)
    expected = weights_of(directory, "alone")
    moved = (expected - begun_with(directory)).norm()
    assert (weights_of(directory, form) - expected).norm() <= 1e-4 * moved


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(alone: Path) -> None:
    pytest.importorskip("deepspeed")
    run_on_ranks(2, train_all, alone, list(FORMS), timeout=600)
    for form in FORMS:
        assert_as_one(alone, form)
