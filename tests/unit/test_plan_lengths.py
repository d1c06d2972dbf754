"""`tuner plan` counts FLOPs by the documents that are tokenised, and by this machine's rates where it is asked to."""

import json

import pytest

from tuner.cli import run
from tuner.config import loads, render
from tuner.dataset import sources
from tuner.demo.dialogues import dialogues
from tuner.demo.files import resolve
from tuner.engine.assemble import Assembly
from tuner.plan.lengths import lengths_of

PRESET = "internlm2_tiny-sft_full"


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict[str, object]:
    monkeypatch.setattr(sources, "SETTLED_SECONDS", 0.0)  # a younger file's stamp is not trusted, and none is kept
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dialogues(40, "train", 3))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    model = resolve("demo:model")
    return {"model_path": model, "data_path": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "shards")}


def command(settings: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def test_flops_are_those_of_the_documents_that_prepare_made_and_rates_those_of_this_machine(settings, capsys, tmp_path):
    config = loads(render(PRESET, settings))
    assert (lengths_of(config, 512).mean, lengths_of(config, 512).longest_pack) == (512, 512)
    assert run(["prepare", PRESET, *command(settings)]) == 0
    lengths = Assembly(config).build(config.train_dataloader["dataset"]).sizes[0].tolist()
    found = lengths_of(config, 512)
    assert found.mean == pytest.approx(sum(n * n for n in lengths) / sum(lengths))
    assert found.source == f"from the {len(lengths)} documents that are tokenised in the cache"
    capsys.readouterr()
    assert run(["plan", PRESET, *command(settings), "--gpus", "1", "--measure", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    step, gpu = told["step"], told["gpu"]
    assert step["compute_seconds"] == pytest.approx(step["hardware_flops"] / gpu["flops"])
    assert gpu["flops"] < 500e12
    assert gpu["bandwidth"] not in (3.35e12, 0)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    assert lengths_of(config, 512).mean == 512  # of the file as it is now, nothing is tokenised
