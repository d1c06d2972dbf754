"""`tuner train` and `tuner preview` with streaming = True: a small model trains while windows are made, and resumes."""

import json
import shutil
from pathlib import Path

import pytest

from tuner.cli import run
from tuner.dataset import read
from tuner.demo.files import resolve

SAME = ("step", "epoch", "loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens", "trained_tokens")
NUM_STEPS, NUM_ROWS = 14, 60


def row(number: int) -> dict:
    answer = {"role": "assistant", "content": f"It is {number + 1}. " * (1 + number % 5)}
    return {"messages": [{"role": "user", "content": f"What is {number} plus 1?"}, answer]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model directory with a small network, and rows for several windows."""
    folder = tmp_path_factory.mktemp("streamed")
    shutil.copytree(resolve("demo:model"), folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config.update(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    (folder / "model/config.json").write_text(json.dumps(config))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(NUM_ROWS)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", 1000)


def words(command: str, folder: Path, *arguments: str, data: str = "rows.jsonl", cache: str = "cache") -> list[str]:
    """A command line on the tiny preset, with windows of a few packs."""
    settings = {
        "model_path": folder / "model", "data_path": folder / data, "cache_dir": folder / cache, "weights": "random",
        "streaming": True, "max_steps": NUM_STEPS, "num_accumulation_steps": 2, "max_length": 128, "save_interval": 5,
        "keep_checkpoints": None, "sample_interval": 0,
    }  # fmt: skip
    options = ["--cfg-options", "train_dataset.packs_per_window=2"]
    return [command, "internlm2_tiny-sft_full", *(f"{k}={v}" for k, v in settings.items()), *options, *arguments]


def metrics(work_dir: Path) -> list[list]:
    return [
        [line[key] for key in SAME] for line in map(json.loads, (work_dir / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "CHUNK_BYTES", 1000)
        assert run(words("train", folder, "--work-dir", str(folder / "straight"))) == 0
    return folder / "straight"


def test_a_run_goes_through_windows_and_epochs_and_its_ledger_counts_them(folder, straight):
    lines = metrics(straight)
    assert [step for step, *_ in lines] == list(range(1, NUM_STEPS + 1))
    assert {line[1] for line in lines} == {0, 1}
    ledger = json.loads((straight / "ledger.json").read_text())
    assert ledger["rows"] == NUM_ROWS
    assert [(source["source"], source["documents"]) for source in ledger["sources"]] == [
        (str(folder / "rows.jsonl"), NUM_ROWS)
    ]
    assert len(list(folder.glob("cache/stream-*/0*/meta.json"))) > 3
    first_epoch = [line for line in lines if line[1] == 0]
    assert sum(line[6] for line in first_epoch[:-1]) < ledger["trained"] < sum(line[6] for line in lines)


@pytest.mark.parametrize("cache", ["cache", "another"])
def test_from_a_checkpoint_it_goes_on_bit_for_bit_with_the_windows_there_or_made_anew(folder, straight, cache):
    resumed = folder / f"resumed with {cache}"
    checkpoint = straight / "checkpoints" / "step_00000005"
    assert run(words("train", folder, "--work-dir", str(resumed), "--resume", str(checkpoint), cache=cache)) == 0
    assert metrics(resumed)[-9:] == metrics(straight)[5:]
    ends = [path / "checkpoints" / f"step_{NUM_STEPS:08}" for path in (resumed, straight)]
    files = list(ends[1].glob("*.safetensors"))
    assert files
    for file in files:
        assert (ends[0] / file.name).read_bytes() == file.read_bytes()


def test_other_rows_than_before_are_not_resumed(folder, straight, capsys):
    rows = [row(n) for n in range(NUM_ROWS)]
    rows[0]["messages"][1]["content"] = "Nobody knows."
    (folder / "other.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    checkpoint = straight / "checkpoints" / "step_00000005"
    where = ["--work-dir", str(folder / "refused"), "--resume", str(checkpoint)]
    assert run(words("train", folder, *where, data="other.jsonl")) == 2
    assert "step 5 would now read other documents" in capsys.readouterr().err


def test_a_bad_row_ends_the_run_with_its_place_once_training_gets_there(folder, straight, capsys):
    lines = [json.dumps(row(n)) for n in range(NUM_ROWS)]
    lines[40] = '{"messages": []}'
    (folder / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert run(words("train", folder, "--work-dir", str(folder / "bad"), data="bad.jsonl")) == 2
    assert f"Error: {folder / 'bad.jsonl'}:41: bad row: " in capsys.readouterr().err
    done = metrics(folder / "bad")
    assert 0 < len(done) < NUM_STEPS
    assert done[:2] == metrics(straight)[:2]


def test_preview_shows_the_documents_of_a_step(folder, straight, capsys):
    assert run(words("preview", folder, "--step", "3", "--no-color")) == 0
    shown = capsys.readouterr().out
    assert "━━ step 3 · epoch 0 · micro-batch 2 of 2" in shown
    assert shown.count("document ") >= 2
    assert f"{folder / 'rows.jsonl'}:" in shown
    assert "tokens by source" in shown


def test_what_is_missing_or_not_allowed_is_told_at_once(folder, capsys):
    weighted = f'data_path=[{{"path": "{folder / "rows.jsonl"}", "weight": 2}}]'
    line = words("train", folder, "--work-dir", str(folder / "never"))
    line = [weighted if word.startswith("data_path=") else word for word in line if not word.startswith("max_steps")]
    assert run(line) == 2
    error = capsys.readouterr().err
    assert "The config has 2 mistakes" in error
    assert "Give max_steps" in error
    assert "Leave the weights out" in error
    assert not (folder / "never").exists()
