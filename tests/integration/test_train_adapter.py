"""Runs of adapters as `tuner train` does them: what is saved, resumed bit for bit, on other ranks, on another base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from test_train_zero import END, HALF, assert_equal, build, checkpoint_of, settings_of, tensors_in, write_inputs

from tuner.cli import run
from tuner.config import render
from tuner.failures import EXIT_SAVED

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.3, "lora_plus_ratio": 4.0, "num_accumulation_steps": 2}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft_lora", LORA | {"modules_to_save": ["output"]}),
    "qlora": ("sft_qlora", LORA | {"lora_variant": "dora", "optimizer": "adamw8bit"}),
}
ON_TWO: dict[str, dict[str, Any]] = {
    "zero2": {"deepspeed": "zero2"},
    "zero2 dry": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "ddp": {},
    "fsdp": {"fsdp": "full"},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def train(directory: Path, kind: str, work_dir: str, *options: str, **others: Any) -> int:
    recipe, settings = RECIPES[kind]
    config = directory / f"{work_dir}.py"
    config.write_text(render(f"internlm2_tiny-{recipe}", settings_of(directory, **settings | others)))
    return run(["train", str(config), "--work-dir", str(directory / work_dir), *options])


def losses(directory: Path, work_dir: str) -> list[tuple[int, str]]:
    rows = map(json.loads, (directory / work_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], float(row["loss"]).hex()) for row in rows]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    write_inputs(directory)
    return directory


@pytest.fixture(scope="module", params=["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def whole(inputs: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """An uninterrupted run, with dropout."""
    assert train(inputs, request.param, request.param) == 0
    return request.param, inputs


def test_only_what_trains_is_saved(whole: tuple[str, Path]):
    kind, directory = whole
    checkpoint = checkpoint_of(directory, kind, HALF)
    weights = {name for file in checkpoint.glob("model*.safetensors") for name in load_file(file)}
    assert {name.rpartition(".lora_")[2].partition(".")[0] for name in weights} == (
        {"A", "B", "output"} if kind == "lora" else {"A", "B", "magnitude_vector"}
    )
    assert list(directory.glob("model/*.safetensors"))
    assert json.loads((checkpoint / "hf" / "adapter_config.json").read_text())["r"] == LORA["lora_rank"]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole: tuple[str, Path]):
    """Dropout draws the masks that it would have drawn, and moments of 8 bits come back as they were."""
    kind, directory = whole
    name = f"{kind}_stopped"
    (directory / name).mkdir()
    (directory / name / "stop").touch()
    assert train(directory, kind, name) == EXIT_SAVED
    assert losses(directory, name) == losses(directory, kind)[:1]
    assert train(directory, kind, name, "--resume", "auto") == 0
    assert losses(directory, name) == losses(directory, kind)
    assert_equal(checkpoint_of(directory, name, END), checkpoint_of(directory, kind, END))


@pytest.mark.slow
def test_the_masks_of_dropout_are_part_of_that(whole: tuple[str, Path]):
    """Else the comparison above would not tell whether they come back."""
    kind, directory = whole
    assert train(directory, kind, f"{kind}_plain", lora_dropout=0.0) == 0
    plain, masked = losses(directory, f"{kind}_plain"), losses(directory, kind)
    assert plain[0] == masked[0]  # B is zero
    assert all(one != other for one, other in zip(plain[1:], masked[1:]))


def test_another_adapter_or_base_is_refused_with_what_differs(whole: tuple[str, Path], capfd: pytest.CaptureFixture):
    kind, directory = whole
    checkpoint = checkpoint_of(directory, kind, HALF)
    other = shutil.copytree(directory / "model", directory / f"{kind}_base")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for changed, message in (
        ({"model_path": str(other)}, "base"),
        ({"lora_rank": 8}, "rank"),
        ({"lora_variant": "rslora"}, "variant"),
        ({"lora_targets": ["wqkv"]}, "targets"),
    ):
        assert train(directory, kind, f"{kind}_refused", "--resume", str(checkpoint), **changed) == 2
        errors = capfd.readouterr().err
        assert message in errors
        assert "Traceback" not in errors
        assert not list(directory.glob(f"{kind}_refused/checkpoints/*"))


def settings_on_two(way: str) -> dict[str, Any]:
    """With dropout, which other ranks would draw otherwise, by ZeRO-2 only."""
    return RECIPES["lora"][1] | ON_TWO[way] | {"lora_dropout": 0.3 if way == "zero2" else 0.0}


def train_on_two(directory: Path) -> None:
    for way in ON_TWO:
        own = settings_on_two(way)
        build(directory, way, None, "sft_lora", **own).train()
        build(directory, f"{way}_again", checkpoint_of(directory, way, HALF), "sft_lora", **own).train()


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit_and_one_goes_on_from_there(inputs: Path):
    run_on_ranks(2, train_on_two, inputs, timeout=600)
    for way in ON_TWO:
        half, end = checkpoint_of(inputs, way, HALF), checkpoint_of(inputs, way, END)
        assert_equal(end, checkpoint_of(inputs, f"{way}_again", END))
        if way == "zero2":
            continue
        own = {"num_accumulation_steps": 4, "lora_dropout": 0.0}
        assert train(inputs, "lora", f"{way}_one", "--resume", str(half), **own) == 0
        for (step, ours), (_, theirs) in zip(losses(inputs, f"{way}_one"), losses(inputs, way)[HALF:], strict=True):
            assert float.fromhex(ours) == pytest.approx(float.fromhex(theirs), rel=1e-6), f"{way}, step {step}"
        found, expected = tensors_in(checkpoint_of(inputs, f"{way}_one", END)), tensors_in(end)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=f"{way} {name}")
