"""`tuner train --nproc 2 --fsdp full` as a user runs it: resumed bit for bit, resumed by one process, converted."""

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

import tuner.model  # noqa: F401  InternLM2 for transformers
from tuner.cli import run
from tuner.config import loads, render
from tuner.configs import literals
from tuner.demo.files import resolve
from tuner.engine.world import read_world
from tuner.parallel.mesh import build_mesh
from tuner.train import build_runner, prepare

NUM_STEPS = 6


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model whose sizes no two ranks divide, and 24 rows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("demo:model"), tmp_path / "model")
    sizes = json.loads((tmp_path / "model" / "config.json").read_text())
    sizes |= {"hidden_size": 36, "intermediate_size": 71, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    turns = [[("user", f"What is {number} plus 1?"), ("assistant", f"It is {number + 1}.")] for number in range(24)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings: dict[str, Any] = {
        "model_path": str(tmp_path / "model"), "weights": "random", "data_path": str(tmp_path / "rows.jsonl"),
        "data_format": "openai", "cache_dir": str(tmp_path / "cache"), "max_length": 128, "pack": False,
        "num_accumulation_steps": 2, "num_epochs": 1, "max_steps": None, "precision": "fp32", "lr": 1e-3,
        "gradient_checkpointing": True, "log_interval": 1, "save_interval": 3, "sample_interval": 2,
        "sample_prompts": ["What is 1 plus 1?"], "keep_checkpoints": None,
    }  # fmt: skip
    path = tmp_path / "tiny.py"
    path.write_text(render("internlm2_tiny-sft_full", settings))
    return path


def read(checkpoint: Path, kind: str) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob(f"{kind}-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def checkpoint_of(work_dir: Path, step: int) -> Path:
    return next(path for path in (work_dir / "checkpoints").glob("step_*") if int(path.name.split("_")[1]) == step)


def train_as_a_rank(path: Path, work_dir: Path) -> None:
    """What `train` does in a process of a group."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
    source, world = path.read_text(), read_world()
    config = loads(source, path.name)
    work_dir.mkdir(exist_ok=True)
    prepared = prepare(config, world)
    prepared.strategy.place(world, build_mesh(prepared.strategy.degrees))
    settings = {key: setting.value for key, setting in literals.settings(source, path.name).items()}
    build_runner(config, prepared, source, settings, work_dir=work_dir).train()


@pytest.mark.slow
def test_a_run_over_two_ranks_goes_on_as_if_never_stopped_also_on_one_and_is_converted(config: Path):
    whole = Path("whole").resolve()
    spread = config.with_name("spread.py")
    spread.write_text(config.read_text().replace("\nfsdp: str | None = None", '\nfsdp: str | None = "full"'))
    run_on_ranks(2, train_as_a_rank, spread, whole)
    half, end = checkpoint_of(whole, 3), checkpoint_of(whole, NUM_STEPS)
    assert len(list(end.glob("model-*.safetensors"))) == 2, "each rank writes its share"
    assert len((whole / "samples.jsonl").read_text().splitlines()) == 3

    arguments = ["train", str(config), "--nproc", "2", "--fsdp", "full", "--work-dir", "again"]
    assert run([*arguments, "--resume", str(half)]) == 0
    for kind in ("model", "optimizer"):
        first, second = read(end, kind), read(checkpoint_of(Path("again"), NUM_STEPS), kind)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    alone = ["train", str(config), "num_accumulation_steps=4", "--work-dir", "alone", "--resume", str(half)]
    assert run(alone) == 0
    for kind in ("model", "optimizer"):
        first, second = read(end, kind), read(checkpoint_of(Path("alone"), NUM_STEPS), kind)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6, msg=name)

    assert run(["convert", "whole", "hf", "--no-verify"]) == 0
    weights = AutoModelForCausalLM.from_pretrained("hf", dtype="auto").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in read(end, "model").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fsdp", "half"], "strategy.fsdp = 'half': allowed is one of full, hybrid, or None."),
        (["--fsdp", "full", "deepspeed=zero3"], "deepspeed='zero3' and fsdp='full' both cut the model over the ranks."),
        (["--fsdp", "full"], "fsdp='full' cuts weights over processes: start several (--nproc 8), or set it to None."),
        (["--cfg-options", "strategy.accumulate=rows"], "accumulate='rows' says how fsdp holds a model, but fsdp is"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_prepared(
    config: Path, capfd: pytest.CaptureFixture, arguments: list[str], message: str
):
    assert run(["train", str(config), "--work-dir", "work", *arguments]) == 2
    out, errors = capfd.readouterr()
    assert message in errors
    assert "documents in" not in out
