"""Training under ZeRO on two ranks as `tuner train` does it: resumed bit for bit, by any other strategy, converted."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tuner.cli import run
from tuner.config import loads, render
from tuner.configs import literals
from tuner.demo.files import resolve
from tuner.engine.pending_save import PendingSave
from tuner.engine.runner import Runner
from tuner.engine.snapshot import take_snapshot
from tuner.engine.world import read_world
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.parallel.mesh import build_mesh
from tuner.train import build_runner, prepare

if find_spec("deepspeed") is None:  # not imported: that takes seconds, and only the ranks need it
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

HALF, END = 2, 4  # steps
RUNS = {"zero1": "fp32", "zero2": "bf16", "zero3": "fp32"}  # and the precision of each
OFFLOADED = {"zero2_offload": "fp32", "zero3_offload": "bf16"}
SIZES = InternLM2Config(
    vocab_size=8192, hidden_size=36, intermediate_size=71, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip


def write_inputs(directory: Path, sizes: InternLM2Config = SIZES) -> None:
    """A model with weights in files, and 16 rows."""
    model = directory / "model"
    shutil.copytree(resolve("demo:model"), model)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(InternLM2Config(**sizes.to_dict() | {"vocab_size": vocabulary})).save_pretrained(
        model
    )
    turns = [[("user", f"What is {number} plus 1?"), ("assistant", f"It is {number + 1}.")] for number in range(16)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def settings_of(directory: Path, **others: Any) -> dict[str, Any]:
    return {
        "model_path": str(directory / "model"), "weights": "pretrained", "data_path": str(directory / "rows.jsonl"),
        "data_format": "openai", "cache_dir": str(directory / "cache"), "max_length": 128, "pack": False,
        "num_accumulation_steps": 2, "num_epochs": 1, "max_steps": END, "precision": "fp32", "lr": 1e-3,
        "gradient_checkpointing": True, "save_interval": HALF, "sample_interval": 0, "keep_checkpoints": None,
        "sample_prompts": ["What is 1 plus 1?"],
    } | others  # fmt: skip


def build(directory: Path, name: str, checkpoint: Path | None, recipe: str = "sft_full", **settings: Any) -> Runner:
    """What `train` builds in a process of a group."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
    source, world = render(f"internlm2_tiny-{recipe}", settings_of(directory, **settings)), read_world()
    source = source.replace("prompts=sample_prompts)", "prompts=sample_prompts, max_new_tokens=6)")
    source = source.replace("    dict(type=CurvesHook),\n", "")  # a second for each picture
    config = loads(source, name)
    work_dir = directory / name
    work_dir.mkdir(exist_ok=True)
    prepared = prepare(config, world)
    prepared.strategy.place(world, build_mesh(prepared.strategy.degrees))
    values = {key: setting.value for key, setting in literals.settings(source, name).items()}
    checkpoints = [checkpoint] if checkpoint else []
    return build_runner(config, prepared, source, values, work_dir=work_dir, checkpoints=checkpoints)


def checkpoint_of(directory: Path, name: str, step: int) -> Path:
    return directory / name / "checkpoints" / f"step_{step:08d}"


def save_what_was_read(directory: Path, name: str, checkpoint: Path, deepspeed: str | None, **settings: Any) -> None:
    """A checkpoint of what another strategy, on other ranks or as many, has taken from a checkpoint."""
    runner = build(directory, name, checkpoint, deepspeed=deepspeed, **settings)
    loop = runner._train_loop = runner.build_train_loop(runner.loop_node)
    runner.model = runner.strategy.prepare(
        runner.model,
        optim_wrapper=runner.optim_wrapper,
        param_scheduler=runner.param_schedulers,
        num_steps=loop.num_steps,
    )
    runner.load_or_resume()
    PendingSave(take_snapshot(runner), directory / name, runner.strategy.world, published=lambda _: None).settle()


def train_and_resume(directory: Path, runs: dict[str, str]) -> None:
    for deepspeed, precision in runs.items():
        sampling = {"sample_interval": END if deepspeed == "zero3" else 0}  # slow: weights come for every token
        build(directory, deepspeed, None, deepspeed=deepspeed, precision=precision, **sampling).train()
        half = checkpoint_of(directory, deepspeed, HALF)
        build(directory, f"{deepspeed}_again", half, deepspeed=deepspeed, precision=precision).train()


def train_all(directory: Path) -> None:
    train_and_resume(directory, RUNS)
    build(directory, "crossed", checkpoint_of(directory, "zero3", HALF), deepspeed="zero1").train()
    save_what_was_read(directory, "from_3_to_2", checkpoint_of(directory, "zero3", HALF), "zero2")
    save_what_was_read(directory, "from_1_to_3", checkpoint_of(directory, "zero1", HALF), "zero3")


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(one: Path, other: Path) -> None:
    first, second = tensors_in(one), tensors_in(other)
    assert first.keys() == second.keys()
    assert len(first) > 40
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zero")
    write_inputs(directory)
    run_on_ranks(2, train_all, directory, timeout=300)
    return directory


@pytest.mark.parametrize("deepspeed", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained: Path, deepspeed: str):
    end = checkpoint_of(trained, deepspeed, END)
    assert_equal(end, checkpoint_of(trained, f"{deepspeed}_again", END))
    assert len(list(end.glob("model-*.safetensors"))) == 2, "each rank writes its share"
    assert {tensor.dtype for tensor in tensors_in(end).values()} == {torch.float32}


def test_all_ranks_gather_the_weights_for_a_sampled_reply(trained: Path):
    assert (trained / "zero3" / "samples.jsonl").read_text().count("\n") == 1


@pytest.mark.slow
def test_so_is_one_whose_optimizer_is_on_the_cpu(tmp_path: Path):
    write_inputs(tmp_path)
    run_on_ranks(2, train_and_resume, tmp_path, OFFLOADED)
    for deepspeed in OFFLOADED:
        assert_equal(checkpoint_of(tmp_path, deepspeed, END), checkpoint_of(tmp_path, f"{deepspeed}_again", END))


@pytest.mark.parametrize(("name", "source"), [("from_3_to_2", "zero3"), ("from_1_to_3", "zero1")])
def test_another_stage_reads_a_checkpoint_bit_for_bit(trained: Path, name: str, source: str):
    assert_equal(checkpoint_of(trained, name, HALF), checkpoint_of(trained, source, HALF))


def test_from_stage_3_to_1_to_one_process_and_to_transformers(trained: Path, monkeypatch: pytest.MonkeyPatch):
    """Against one process all the way; fp32, so that only the order of sums differs."""
    monkeypatch.chdir(trained)
    settings = settings_of(trained, num_accumulation_steps=4, sample_interval=0)
    (trained / "alone.py").write_text(render("internlm2_tiny-sft_full", settings))
    assert run(["train", "alone.py", "--work-dir", "alone"]) == 0
    resumed = ["train", "alone.py", "--work-dir", "resumed", "--resume", str(checkpoint_of(trained, "zero3", HALF))]
    assert run(resumed) == 0
    expected = tensors_in(checkpoint_of(trained, "alone", END))
    for work_dir in ("zero3", "crossed", "resumed"):
        found = tensors_in(checkpoint_of(trained, work_dir, END))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=f"{work_dir} {name}")
    assert run(["convert", "crossed", "hf", "--no-verify"]) == 0
    weights = AutoModelForCausalLM.from_pretrained("hf", dtype="auto").state_dict()
    saved = tensors_in(checkpoint_of(trained, "crossed", END))
    assert [name for name in weights if not torch.equal(weights[name], saved[name])] == []


def train_on_three(directory: Path) -> None:
    for name, checkpoint in (("three", None), ("three_again", checkpoint_of(directory, "three", HALF))):
        build(directory, name, checkpoint, deepspeed="zero3", num_epochs=2).train()


@pytest.mark.slow
def test_three_ranks_whose_shares_are_uneven_resume_and_hand_over_to_zero1_and_to_one_process(tmp_path: Path):
    sizes = InternLM2Config(**SIZES.to_dict() | {"hidden_size": 40})
    write_inputs(tmp_path, sizes)
    run_on_ranks(3, train_on_three, tmp_path, timeout=300)
    end = checkpoint_of(tmp_path, "three", END)
    assert [name for name, tensor in tensors_in(end).items() if tensor.numel() % 3 == 0] == []
    assert_equal(end, checkpoint_of(tmp_path, "three_again", END))

    other = {"num_epochs": 2}
    run_on_ranks(2, save_chain_link, tmp_path, "two", end, "zero1", other | {"num_accumulation_steps": 3})
    two = checkpoint_of(tmp_path, "two", END)
    run_on_ranks(1, save_chain_link, tmp_path, "one", two, None, other | {"num_accumulation_steps": 6})
    for name in ("two", "one"):
        assert_equal(end, checkpoint_of(tmp_path, name, END))


def save_chain_link(directory: Path, name: str, checkpoint: Path, deepspeed: str | None, other: dict[str, int]) -> None:
    save_what_was_read(directory, name, checkpoint, deepspeed, **other)


MISTAKES = {
    "no preset": (["--deepspeed", "zero4"], None, "deepspeed='zero4' is no preset. Did you mean zero3"),
    "no file": (["--deepspeed", "ds.jsn"], None, "deepspeed='ds.jsn' is no preset"),
    "two optimizers": (
        ["--deepspeed", "ds.json"],
        {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}, "gradient_clipping": 3.0},
        "'gradient_clipping' is 3.0, the config's max_grad_norm 1.0. The config decides",
    ),
    "a key of old": (
        ["--deepspeed", "ds.json"],
        {"zero_optimization": {"stage": 3, "mics_shard_size": 4}},
        "'zero_optimization.mics_shard_size' is no key of the installed DeepSpeed. Set \"zero_hpz_partition_size\"",
    ),
    "a disk for nothing": (["--deepspeed", "zero2", "offload_directory=/disk"], None, "needs ZeRO-3 with offloading"),
    "three of one": (["--deepspeed", "zero3_hpz", "hpz_partition_size=3"], None, "does not divide the 1 ranks"),
    "a size alone": (["hpz_partition_size=2"], None, "hpz_partition_size=2 says how deepspeed holds a model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_data_are_prepared(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    arguments, file, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    if file is not None:
        Path("ds.json").write_text(json.dumps(file))
    assert run(["train", "internlm2_tiny-sft_full", f"cache_dir={tmp_path}", "--work-dir", "work", *arguments]) == 2
    out, errors = capfd.readouterr()
    assert message in errors
    assert "token ledger" not in out
