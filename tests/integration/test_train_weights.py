"""Weights through a whole run: where all of them are one half, every number is bit for bit that of a run without."""

import json
import shutil
from pathlib import Path

import pytest

from tuner.config import render
from tuner.demo.files import resolve
from tuner.train import train

SAME = ("loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens", "trained_tokens")


def run(folder: Path, losses: list[float | bool], **settings: object) -> tuple[list[dict], dict]:
    """Metrics and ledger of four steps on 24 conversations, whose answers have these losses in turn."""
    folder.mkdir()
    rows = []
    for number in range(24):
        loss = losses[number % len(losses)]
        answer = {"role": "assistant", "content": f"It is {number + 1}.", "loss": loss}
        rows.append({"messages": [{"role": "user", "content": f"What is {number} plus 1?"}, answer]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shutil.copytree(resolve("demo:model"), folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config.update(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    (folder / "model/config.json").write_text(json.dumps(config))
    paths = {"model_path": str(folder / "model"), "data_path": str(folder / "rows.jsonl")}
    small = {"max_length": 64, "max_steps": 4, "num_accumulation_steps": 2, "precision": "fp32", "sample_interval": 0}
    source = render(
        "internlm2_tiny-sft_full",
        {**paths, **small, "weights": "random", "cache_dir": str(folder / "cache"), **settings},
    )
    work_dir = train(source, work_dir=folder / "run")
    lines = (work_dir / "metrics.jsonl").read_text().splitlines()
    return list(map(json.loads, lines)), json.loads((work_dir / "ledger.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict]:
    return run(tmp_path_factory.mktemp("plain") / "run", [True])


def test_half_everywhere_is_no_weight_at_all(tmp_path: Path, plain: tuple[list[dict], dict]):
    halves, ledger = run(tmp_path / "halves", [0.5])
    assert [[row[key] for key in SAME] for row in halves] == [[row[key] for key in SAME] for row in plain[0]]
    assert ledger["weight_surplus"] == -ledger["trained"] / 2
    assert plain[1]["weight_surplus"] == 0
    assert ledger["trained"] == plain[1]["trained"]


def test_other_weights_train_other_steps_on_the_same_tokens(tmp_path: Path, plain: tuple[list[dict], dict]):
    mixed, _ = run(tmp_path / "mixed", [0.25, True, 3])
    assert [row["num_tokens"] for row in mixed] == [row["num_tokens"] for row in plain[0]]
    assert [row["num_loss_tokens"] for row in mixed] == [row["num_loss_tokens"] for row in plain[0]]
    assert all(row["loss"] != other["loss"] for row, other in zip(mixed, plain[0], strict=True))


def test_the_settings_of_the_loss_reach_the_run(tmp_path: Path, plain: tuple[list[dict], dict]):
    _, ledger = run(tmp_path / "newline", [True], train_newline=True, loss_on="last", max_steps=1)
    assert ledger["trained"] == plain[1]["trained"] + 24, "one newline a conversation"
