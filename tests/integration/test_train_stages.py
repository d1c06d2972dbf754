"""`tuner train`, `prepare` and `preview` with stages: shares, borders, bases, resumption, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from transformers import AutoConfig

from tuner.cli import run
from tuner.config import load
from tuner.convert.to_hf import convert
from tuner.demo.files import resolve
from tuner.engine.assemble import Assembly
from tuner.engine.curves import draw_shares, shares
from tuner.engine.schedule import warmup_cosine

NUM_STEPS, BORDERS = 10, (6, 9)  # steps after which a stage begins
PACKS = (4, 2, 2)  # in a step
TOKENS = 512
SAME = ("step", "epoch", "loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens", "trained_tokens", "stage")


def row(number: int, words: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"It is {number}. " * words}
    return {"messages": [{"role": "user", "content": f"What is {number}?"}, answer]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and two files: conversations of some 30 tokens, and of some 110."""
    folder = tmp_path_factory.mktemp("staged")
    shutil.copytree(resolve("demo:model"), folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000}
    (folder / "model/config.json").write_text(json.dumps(config))
    for name, number, words in (("short", 120, 3), ("long", 30, 16)):
        lines = [json.dumps(row(place, words + place % 4)) for place in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def stages(folder: Path) -> list[dict[str, Any]]:
    both = [{"path": str(folder / "short.jsonl"), "weight": 3}, {"path": str(folder / "long.jsonl"), "weight": 1}]
    return [
        {"max_length": 128, "share": 0.6, "data_path": both},
        {"max_length": 256, "share": 0.3, "buckets": {60: 0.5, 256: 0.5}, "rope_theta": 5e5, "lr_factor": 0.5},
        {"max_length": 256, "share": 0.1, "data_path": str(folder / "long.jsonl"), "rope_theta": 1e6},
    ]


def words(command: str, folder: Path, *arguments: str, **changes: Any) -> list[str]:
    settings = {
        "model_path": folder / "model", "data_path": [str(folder / "short.jsonl"), str(folder / "long.jsonl")],
        "cache_dir": folder / "cache", "weights": "random", "stages": stages(folder), "max_steps": NUM_STEPS,
        "num_accumulation_steps": 2, "max_length": 256, "save_interval": 3, "keep_checkpoints": None,
        "sample_interval": 0, "precision": "fp32", "lr": 1e-3, **changes,
    }  # fmt: skip
    return [command, "internlm2_tiny-sft_full", *(f"{k}={v}" for k, v in settings.items()), *arguments]


def metrics(work_dir: Path) -> list[dict[str, Any]]:
    lines = (work_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: line[key] for key in SAME} for line in map(json.loads, lines)]


def checkpoint(work_dir: Path, step: int) -> Path:
    return work_dir / "checkpoints" / f"step_{step:08}"


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    assert run(words("train", folder, "--work-dir", str(folder / "straight"))) == 0
    return folder / "straight"


def test_steps_have_the_lengths_and_rates_of_their_stage_and_as_many_tokens_in_all(straight: Path) -> None:
    rows = metrics(straight)
    assert [row["stage"] for row in rows] == [1] * 6 + [2] * 3 + [3]
    for row in rows:
        assert 0.5 * TOKENS < row["num_tokens"] <= TOKENS
        factor = 0.5 if row["stage"] == 2 else 1
        assert row["lr"] == pytest.approx(1e-3 * factor * warmup_cosine(row["step"] - 1, NUM_STEPS, 0.03, 0.1))
    assert (straight / "curves.png").stat().st_size > 0


def test_the_ledger_says_what_each_stage_was_asked_for_and_what_it_took(folder: Path, straight: Path) -> None:
    ledger = json.loads((straight / "ledger.json").read_text())
    told, rows = ledger["stages"], metrics(straight)
    for place, stage in enumerate(told, 1):
        trained = sum(row["num_tokens"] for row in rows if row["stage"] == place)
        assert stage["tokens"] == trained, "what was trained, counted by the loop"
        assert stage["share"] == pytest.approx(stage["asked"], abs=0.05)
    config = load(straight / "config.py")
    data = Assembly(config).build(config.train_dataloader)
    for place, step in ((0, 2), (1, 7), (2, 9)):
        numbers = [number for pack in data.sampler.of_all_ranks(step).packs for number in pack]
        lengths = data.dataset.shards.lengths[numbers]
        assert all(lengths <= told[place]["max_length"])
        if place == 2:
            assert all("long.jsonl" in name for name in data.dataset.document_ids(data.sampler.plan(step)))
    of_stage = [number for step in range(6, 9) for pack in data.sampler.of_all_ranks(step).packs for number in pack]
    lengths = np.array([data.dataset.shards.lengths[number] for number in of_stage])
    names, asked, came = zip(*shares(ledger))
    heads = [name for name in names if not name.startswith("of it ")]
    assert heads == ["stage 1, 6 x 128", "stage 2, 3 x 256", "stage 3, 1 x 256"]
    axes = Figure().add_subplot()
    draw_shares(axes, shares(ledger))
    assert [bar.get_width() for bars in axes.containers for bar in bars] == [*came, *asked]
    assert set(came) >= {stage["share"] for stage in told}
    assert set(asked) >= {stage["asked"] for stage in told}
    by_length = [part["share"] for part in told[1]["parts"]]
    parts = [lengths[lengths <= 60].sum(), lengths[lengths > 60].sum()]
    assert by_length == pytest.approx([part / lengths.sum() for part in parts])


@pytest.mark.parametrize(
    "step", [BORDERS[0], *(pytest.param(step, marks=pytest.mark.slow) for step in (3, BORDERS[1]))]
)
def test_from_any_checkpoint_it_goes_on_bit_for_bit(folder: Path, straight: Path, step: int) -> None:
    work_dir = folder / f"resumed {step}"
    assert run(words("train", folder, "--work-dir", str(work_dir), "--resume", str(checkpoint(straight, step)))) == 0
    assert metrics(work_dir) == metrics(straight)[step:]
    files = list(checkpoint(straight, NUM_STEPS).glob("*.safetensors"))
    assert files
    for file in files:
        assert (checkpoint(work_dir, NUM_STEPS) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_files_that_have_moved_go_on_too_and_other_weights_do_not(
    folder: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("short", "long"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    moved = stages(tmp_path)
    start = ["--work-dir", str(tmp_path / "run"), "--resume", str(checkpoint(straight, 6))]
    assert run(words("train", folder, *start, stages=moved)) == 0
    assert metrics(tmp_path / "run") == metrics(straight)[6:]
    moved[0]["data_path"][0]["weight"] = 2
    start[1] = str(tmp_path / "other")
    assert run(words("train", folder, *start, stages=moved)) == 2
    assert "cannot be continued with other data: stages was" in capsys.readouterr().err


def test_each_checkpoint_says_the_base_of_its_stage_and_the_converted_model_the_last(
    folder: Path, straight: Path
) -> None:
    bases = {step: AutoConfig.from_pretrained(checkpoint(straight, step) / "hf").rope_theta for step in (6, 9, 10)}
    assert bases == {6: 10000, 9: 5e5, 10: 1e6}
    convert(straight, folder / "hf", verify=False)
    config = AutoConfig.from_pretrained(folder / "hf")
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 256)


@pytest.mark.slow
def test_other_stages_are_no_continuation(folder: Path, straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = stages(folder)
    other[0] |= {"lr_factor": 2}
    start = ["--work-dir", str(folder / "other"), "--resume", str(checkpoint(straight, 3))]
    assert run(words("train", folder, *start, stages=other)) == 2
    assert "cannot be continued with other data: stages was" in capsys.readouterr().err
    assert run(words("train", folder, *start, max_steps=20)) == 2
    assert "would now read other documents" in capsys.readouterr().err


def test_books_and_repositories_have_their_shares_of_the_tokens(folder: Path, tmp_path: Path) -> None:
    books = [
        json.dumps({"text": f"Chapter {number}. " + "It was a dark night. " * (9 + number)}) for number in range(40)
    ]
    (tmp_path / "books.jsonl").write_text("\n".join(books), encoding="utf-8")
    for number in range(12):
        module = f"import part{number - 1}\n\n\ndef answer{number}():\n" + "    print('so')\n" * (5 + number)
        (tmp_path / "tree").mkdir(exist_ok=True)
        (tmp_path / f"tree/part{number}.py").write_text(module, encoding="utf-8")
    (tmp_path / "tree/photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    weights = {1: (1, 3), 2: (4, 1)}  # of books and of the tree, in each stage
    asked = [
        {"max_length": length, "share": 0.5, "data_path": [
            {"path": str(tmp_path / "books.jsonl"), "weight": books, "data_format": "text"},
            {"path": str(tmp_path / "tree"), "weight": tree, "data_format": "repository"},
        ]}
        for length, (books, tree) in zip((128, 256), weights.values())
    ]  # fmt: skip
    start = ["--work-dir", str(tmp_path / "run")]
    assert run(words("train", folder, *start, stages=asked, max_steps=60, too_long="split", save_interval=60)) == 0
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert (ledger["tree_files"], ledger["left_out"]) == (24, 2), "the tree is read for each stage"
    config = load(tmp_path / "run/config.py")
    data = Assembly(config).build(config.train_dataloader)
    tokens = {(stage, name): 0 for stage in weights for name in ("books.jsonl", "tree")}
    for step in range(60):
        stage = data.dataset.place(step) + 1
        for pack in data.sampler.of_all_ranks(step).packs:
            for number in pack.tolist():
                name = Path(data.dataset.shards.source(number).rpartition(":")[0]).name
                tokens[stage, name] += len(data.dataset.shards.document(number)[0])
    for stage, (of_books, of_tree) in weights.items():
        share = tokens[stage, "tree"] / (tokens[stage, "tree"] + tokens[stage, "books.jsonl"])
        assert share == pytest.approx(of_tree / (of_books + of_tree), abs=0.02)
        told = {Path(part["name"]).name: part["share"] for part in ledger["stages"][stage - 1]["parts"]}
        assert told["tree"] == pytest.approx(share)


@pytest.mark.slow
def test_prepare_and_preview_know_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("prepare", folder)) == 0
    out = capsys.readouterr().out
    assert "stage 2 of 3: steps 7 to 9 of 2 packs of 256 tokens, 0.3 of all, lr x 0.5" in out
    assert "share of tokens" in out
    steps = {}
    for rank in ("0", "1"):
        arguments = ["--step", "9", "--rank", rank, "--num-ranks", "2", "--no-color"]
        assert run(words("preview", folder, *arguments, num_accumulation_steps=1)) == 0
        steps[rank] = capsys.readouterr().out
        assert "long.jsonl:" in steps[rank]
    assert steps["0"] != steps["1"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stages": [{"max_length": 256, "share": 0.9}]}, "are 0.9 = 0.9 of the tokens. They must add up to 1"),
        ({"stages": [{"max_length": 256, "shares": 1}]}, "unknown key 'shares'. Did you mean share?"),
        ({"stages": [{"max_length": 128, "share": 1}]}, "max_length = 256, but the longest stage has 128"),
        ({"stages": [{"max_length": 256, "share": 1, "short_source": "loop"}]}, "allowed is repeat or stop"),
        ({"stages": [{"max_length": 256, "share": 1, "buckets": {256: 0.5}}]}, "add up to 0.5, not to 1"),
        ({"stages": [{"max_length": 256, "share": 1, "buckets": {5: 0.5, 256: 0.5}}]}, "No document has 1 to 5 tokens"),
        (
            {"stages": [{"max_length": 256, "share": 1, "buckets": {0: 0.5, 256: 0.5}}]},
            "whole numbers of tokens from 1",
        ),
        ({"stages": [{"max_length": 256, "share": 1, "tokens_per_step": 100}]}, "fewer than a pack"),
        ({"stages": [{"max_length": 256, "share": 1, "data_path": 3}]}, "data_path = 3. Expected: a path"),
        ({"stages": [{"max_length": 256, "share": 1, "data_path": ["demo:chats", None]}]}, "data_path holds None"),
        ({"stages": [{"max_length": 256, "share": 1, "rope_theta": -1}]}, "rope_theta = -1"),
        ({"stages": [{"max_length": 256, "share": 1, "data_path": "nowhere.jsonl"}]}, "no data file nowhere.jsonl"),
        ({"stages": [{"max_length": 256, "share": 1, "data_path": []}]}, "data_path is an empty list"),
        ({"stages": [{"max_length": 1, "share": 1}]}, "Error: stages[0]: max_length = 1: allowed is a whole number"),
        ({"stages": [{"max_length": 256, "share": 1, "short_source": "stop"}], "max_steps": 999}, "its share takes"),
        ({"max_steps": None}, "max_steps must say how many"),
        ({"max_steps": 2}, "one has none"),
        ({"streaming": True}, "do not go together"),
    ],
    ids=str,
)
def test_stages_that_make_no_run_are_one_message(
    folder: Path, change: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words("train", folder, "--work-dir", str(folder / "refused"), **change)) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
    assert error.count("Error:") == 1


@pytest.mark.slow
def test_a_source_that_is_too_short_is_repeated_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("prepare", folder, max_steps=100)) == 0
    out = capsys.readouterr().out
    assert "it is repeated" in out
    [line] = [line for line in out.splitlines() if "short.jsonl" in line and "75.00%" in line][-1:]
    assert float(line.split()[-1]) > 1
