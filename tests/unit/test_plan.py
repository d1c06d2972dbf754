"""tuner plan: published runs end as it says, a step that is run here takes what it says, unknown names are told."""

import gc
import json
import shlex
from typing import Any

import pytest
import torch
from transformers import MambaConfig

from tuner.check import check
from tuner.cli import run
from tuner.config import loads, render
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.method.sft import SFT
from tuner.model.build import build_llm
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.memory import Memory
from tuner.parallel.mesh import Degrees
from tuner.plan.gpus import GPUS
from tuner.plan.holding import count
from tuner.plan.known_models import known_model
from tuner.plan.live import LiveBytes
from tuner.plan.memory import memory_of
from tuner.plan.needles import Passes
from tuner.plan.settings import line
from tuner.plan.setup import Setup, read_setup
from tuner.plan.solve import Work, candidates, solve
from tuner.plan.speed import speed_of

A100 = GPUS["A100"].memory
SEED_RECIPE: dict[str, Any] = {"holding": "zero3", "checkpointing": True, "loss": "naive"}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("size", "num_tokens", "num_ranks", "sharing", "fits"),
    [
        pytest.param("20b", 8192, 8, 1, True, marks=pytest.mark.slow),
        ("20b", 32768, 16, 1, False),
        ("20b", 32768, 32, 1, True),
        pytest.param("7b", 262144, 8, 8, True, marks=pytest.mark.slow),
    ],
)
def test_published_full_fine_tuning_with_the_naive_loss(size, num_tokens, num_ranks, sharing, fits):
    setup = Setup(known_model(f"internlm/internlm2-{size}"), num_tokens, num_ranks, degrees=Degrees(sharing))
    assert (memory_of(setup._replace(**SEED_RECIPE)).peak.total <= A100) == fits


@pytest.mark.parametrize(("size", "billions"), [("1_8b", 1.889), ("7b", 7.738), ("20b", 19.861)])
def test_the_table_of_shapes_has_the_published_numbers_of_parameters(size, billions):
    assert count(Setup(known_model(f"internlm/internlm2-{size}"), 8)).total / 1e9 == pytest.approx(billions, abs=1e-3)


def peak_of_a_step(directory: str, num_tokens: int, memory: Memory) -> int:
    """The most bytes of live tensors in a second step that is really taken, weights and optimizer included."""
    method = SFT(build_llm(directory, weights="random", attention="sdpa", memory=memory))
    strategy = Replicated(precision="fp32", device="cpu")
    wrapper = {"optimizer": {"type": torch.optim.AdamW, "lr": 1e-3}, "clip_grad": {"max_norm": 1.0}}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(method, optim_wrapper=wrapper, param_scheduler=schedule, num_steps=9)
    ids = torch.arange(num_tokens)[None] % SMALL["vocab_size"]
    batch = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.arange(num_tokens)[None],
        "cu_seqlens": torch.tensor([0, num_tokens], dtype=torch.int32),
        "max_seqlen": num_tokens,
        "num_loss_tokens": float(num_tokens),
    }
    strategy.train_step([batch])
    gc.collect()
    live = LiveBytes()
    weights = list(method.llm.parameters())
    states = [value for state in strategy.optimizer.state.values() for value in state.values()]
    live.ignore([*weights, *states])
    with live:
        strategy.train_step([batch])
    return live.peak + sum(tensor.nbytes for tensor in (*weights, *states))


@pytest.mark.parametrize(
    "memory", [Memory(), Memory(gradient_checkpointing=True, tile_tokens=256)], ids=["plain", "saving"]
)
def test_a_step_takes_what_was_predicted(tmp_path, memory):
    config = InternLM2Config(**SMALL, architectures=["InternLM2ForCausalLM"])
    config.save_pretrained(tmp_path)
    setup = Setup(config, 1024, precision="fp32", on_cpu=True)
    setup = setup._replace(checkpointing=memory.gradient_checkpointing, tile_tokens=memory.tile_tokens)
    assert memory_of(setup).peak.total == pytest.approx(peak_of_a_step(str(tmp_path), 1024, memory), rel=0.05)


@pytest.mark.slow
def test_offloading_and_cutting_need_less():
    setup = Setup(InternLM2Config(**SMALL), 4096, 4, checkpointing=True, holding="zero3")
    needed = memory_of(setup).peak.total
    assert memory_of(setup._replace(offload_activations=True)).peak.total < needed
    assert memory_of(setup._replace(degrees=Degrees(2))).peak.total < needed
    assert memory_of(setup._replace(holding="zero3_offload")).peak.total < needed
    assert memory_of(setup._replace(num_ranks=8)).peak.total < needed


@pytest.mark.slow
def test_the_command_says_parts_with_their_sources_and_solves(capsys, tmp_path):
    InternLM2Config(**SMALL, architectures=["InternLM2ForCausalLM"]).save_pretrained(tmp_path)
    command = ["plan", "internlm2_tiny-sft_full", f"model_path={tmp_path}", "max_length=256", "--gpus", "2"]
    assert run([*command, "--solve", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert sum(part["bytes"] for part in told["parts"].values()) == pytest.approx(told["peak_bytes"], abs=10)
    assert {part["by"] for part in told["parts"].values()} == {"traced", "formula"}
    memories, seconds = zip(*((choice["bytes"], choice["seconds"]) for choice in told["solve"]))
    assert list(memories) == sorted(memories, reverse=True)
    assert list(seconds) == sorted(seconds)
    for choice in told["solve"]:
        settings = shlex.split(choice["settings"])
        names = [word.partition("=")[0] for word in settings]
        kept = [word for word in command if word.partition("=")[0] not in names]
        assert run([*kept, *settings, "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["peak_bytes"], again["step"]["seconds"]) == (choice["bytes"], choice["seconds"])
    assert any("offload" in choice["settings"] for choice in told["solve"])
    assert run([*command, "--gpu", "100e12,1e12", "--gpu-memory", "1GiB"]) == 2  # what CUDA itself takes does not fit
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "H10"], ["H10", "H100, H200, A100", "400e12,2e12"]),
        (["--gpu", "4e12,2e12"], ["--gpu-memory"]),
        (["--gpu-memory", "80 apples"], ["80 apples", "80GiB"]),
        (["--link", "string"], ["string", "nvlink4"]),
        (["--gpu", "989,3.35", "--gpu-memory", "80GiB"], ["989,3.35", "not TFLOP/s", "400e12,2e12"]),
        (["--gpu", "nan,2e12", "--gpu-memory", "80GiB"], ["nan,2e12"]),
        (["--gpu-memory", "80"], ["--gpu-memory 80:", "80GiB"]),
        (["--gpu-memory", "8.0.0GB"], ["8.0.0GB", "80GiB"]),
        (["--gpu-memory", "0GB"], ["0GB", "above 0"]),
        (["--link", "400"], ["--link 400", "not GB/s"]),
        (["--link", "inf"], ["--link inf"]),
        (["--price", "-3"], ["--price -3", "2.5"]),
        (["--price", "nan"], ["--price nan"]),
        (["--nodes", "100000000"], ["--nodes 100000000", "100,000"]),
        (["max_length=0", "num_accumulation_steps=0"], ["2 mistakes", "max_length = 0", "num_accumulation_steps = 0"]),
        (["--gpus", "0"], ["--gpus 0"]),
        (["--gpus", "6", "sequence_parallel_size=4"], ["4 ranks"]),
    ],
)
def test_what_is_unknown_is_one_message(capsys, options, words):
    assert run(["plan", "internlm2_7b-sft_full", *options]) == 2
    told = capsys.readouterr().err
    assert told.count("Error") == 1
    assert [word for word in words if word not in told] == []


def test_a_config_without_its_parts_and_a_model_without_attention_are_one_message(capsys, tmp_path):
    (tmp_path / "lacking.py").write_text("x = 1\n")
    assert run(["plan", str(tmp_path / "lacking.py")]) == 2
    assert "The config has no model." in capsys.readouterr().err
    MambaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert run(["plan", "internlm2_7b-sft_full", f"model_path={tmp_path}"]) == 2
    assert "is a mamba" in capsys.readouterr().err


def test_needle_passes_are_a_phase_of_memory_and_a_share_of_the_seconds(tmp_path):
    InternLM2Config(**SMALL, architectures=["InternLM2ForCausalLM"]).save_pretrained(tmp_path)
    given: dict[str, Any] = {
        "model_path": str(tmp_path),
        "max_length": 256,
        "needle_lengths": "100,8k",
        "needle_depths": "0,50,100",
    }
    given |= {"needle_languages": "en", "needle_interval": 7, "gradient_checkpointing": True}
    setup, _ = read_setup(loads(render("internlm2_tiny-sft_full", given)), 2, 2)
    assert setup.needles == Passes(7, ((100, 100), (100,), (8192,), (8192,), (8192,)))
    memory = memory_of(setup)
    without = memory_of(setup._replace(needles=None))
    assert memory.peak_phase == "needles", "far beyond what is trained"
    assert {name: parts for name, parts in memory.phases.items() if name != "needles"} == without.phases
    work = Work(GPUS["A100"], 1e8, 256.0, 0.5)
    speed, plain = speed_of(setup, memory.sizes, *work), speed_of(setup._replace(needles=None), memory.sizes, *work)
    linear = count(setup).matmuls.layers
    width = SMALL["hidden_size"] * SMALL["num_hidden_layers"]
    # two ranks take two packs a turn: 100 and 200 tokens, two of 8,192, one of 8,192
    flops = 2 * linear * (200 + 2 * 8192) + 4 * width * (2 * 100**2 + 2 * 8192**2) / 2
    assert speed.needle_seconds == pytest.approx(flops / (0.5 * GPUS["A100"].flops))
    assert speed.seconds == plain.seconds == plain.seconds_with_needles
    assert speed.seconds_with_needles == pytest.approx(plain.seconds + speed.needle_seconds / 7)


def test_every_line_to_paste_is_taken_by_train(tmp_path):
    setup = Setup(InternLM2Config(**SMALL), 4096, 16, num_accumulation_steps=8, hybrid=True, holding="fsdp")
    lines = {line(each, setup) for each in candidates(setup)}
    assert len(lines) == len(list(candidates(setup))) > 100
    parts: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for words in map(shlex.split, sorted(lines)):
        if not seen.issuperset(words):  # each setting with each of its values, once
            seen.update(words)
            settings = dict(word.split("=", 1) for word in words)
            render("internlm2_7b-sft_full", settings)
            parts |= {f"{settings.get('fsdp')} {settings.get('deepspeed')}": settings}
    InternLM2Config(**SMALL, architectures=["InternLM2ForCausalLM"]).save_pretrained(tmp_path)
    for settings in parts.values():
        given = {**settings, "model_path": str(tmp_path), "weights": "random", "data_path": "demo:chat"}
        check(loads(render("internlm2_7b-sft_full", given)))


@pytest.mark.slow
def test_the_cheap_order_of_solving_leaves_out_nothing():
    setup = Setup(InternLM2Config(**SMALL), 1024, 2, num_accumulation_steps=2)
    work = Work(GPUS["A100"]._replace(memory=1.06 * 2**30), 1e8, 1024.0, 0.5)
    sizes, everything = count(setup), []
    for each in candidates(setup):
        everything.append((speed_of(each, sizes, *work).seconds, memory_of(each, sizes).peak.total))
    fitting = [point for point in everything if point[1] < work.gpu.memory]
    front = {one for one in fitting if not any(other != one and (other[0] <= one[0] and other[1] <= one[1])
                                               for other in fitting)}  # fmt: skip
    assert [(choice.seconds, choice.memory.peak.total) for choice in solve(setup, work)] == sorted(front)
    assert 1 < len(front) < len(fitting) < len(everything)
