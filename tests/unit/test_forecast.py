"""tuner train asks the plan: what cannot fit is refused, what ran out of memory is told beside what was planned."""

import json
import logging
import shlex

import pytest
import torch

from tuner.cli import run
from tuner.config import loads, render
from tuner.engine.shortage import Shortage, is_shortage
from tuner.errors import UserError
from tuner.method import loss
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.plan import forecast
from tuner.plan.forecast import NO_REMEDY, Ranks, Room, explain, planned_setup, refuse
from tuner.plan.memory import GIB, memory_of
from tuner.plan.remedy import find_remedy

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS = {"max_length": "2048", "gradient_checkpointing": "False", "weights": "random", "data_path": "none.jsonl"}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    InternLM2Config(**SMALL, architectures=["InternLM2ForCausalLM"]).save_pretrained(directory)

    def read(settings):
        return loads(render("internlm2_7b-sft_full", {**SETTINGS, "model_path": str(directory), **settings}))

    return read


def test_what_cannot_fit_is_refused_with_a_change_that_makes_it_fit(config_of, caplog):
    gpu, ranks = Room("GPU", None), Ranks(2, 2)
    config = config_of({})
    refuse(config, gpu, ranks, force=False)  # of unknown memory
    needed = memory_of(planned_setup(config, gpu, ranks)[0]).peak.total
    refuse(config, gpu._replace(memory=needed), ranks, force=False)
    assert caplog.records == []
    small = gpu._replace(memory=0.98 * needed)
    with pytest.raises(UserError) as raised:
        refuse(config, small, ranks, force=False)
    told = str(raised.value)
    assert [word for word in ("GPU has", "activations kept", "--force", "tuner plan") if word not in told] == []
    line = told.partition("change that helps: ")[2].partition(", which needs")[0]
    changed = dict(word.split("=", 1) for word in shlex.split(line))
    assert len(set(changed) - {"num_accumulation_steps"}) == 1, "beside what keeps a step the same"
    refuse(config_of(changed), small, ranks, force=False)
    with pytest.raises(UserError, match=NO_REMEDY):
        refuse(config, gpu._replace(memory=GIB), ranks, force=False)  # what CUDA itself takes
    with caplog.at_level(logging.WARNING):
        refuse(config, small, ranks, force=True)
    assert "started all the same" in caplog.text


def test_no_plan_stops_no_run(config_of, caplog, monkeypatch):
    config = config_of({})
    monkeypatch.setattr(forecast, "memory_of", lambda setup: 1 / 0)
    with caplog.at_level(logging.WARNING):
        refuse(config, Room("GPU", 1.0), Ranks(), force=False)
    assert [record.getMessage() for record in caplog.records] == [
        "no plan of this run's memory was made (ZeroDivisionError: division by zero)"
    ]
    told = explain(config, Room("GPU", 1.0), Ranks(), Shortage("in step 3 (data)", "MemoryError", "1 GiB"))
    assert "in step 3 (data)" in told
    assert "no plan" in told


@pytest.mark.slow
def test_on_a_cpu_nothing_is_offloaded_to_it(config_of):
    setup, mean = planned_setup(config_of({}), Room("host", None, is_cpu=True), Ranks(2, 2))
    work = forecast.work_of(setup, Room("host", None), mean)
    remedy = find_remedy(setup, work, 0.5 * memory_of(setup).peak.total)
    assert remedy is not None
    assert "offload" not in remedy.line()


def test_train_refuses_and_a_run_out_of_memory_says_what_was_planned(tmp_path, monkeypatch, capsys):
    row = {"messages": [{"role": "user", "content": "What is near?"}, {"role": "assistant", "content": "The sea."}]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 40, encoding="utf-8")
    settings = [f"data_path={tmp_path / 'data.jsonl'}", "data_format=openai", "max_length=128"]
    command = ["train", "internlm2_tiny-sft_full", *settings, "--work-dir", str(tmp_path / "run")]
    assert run([*command, "--gpu-memory", "80 apples"]) == 2
    assert "80 apples" in capsys.readouterr().err
    assert run([*command, "--gpu-memory", "1MiB"]) == 2
    told = capsys.readouterr().err
    assert told.count("Error") == 1
    assert "--gpu-memory has 1.0 MiB" in told
    assert not (tmp_path / "run").exists()

    calls, inner = [], loss._softmax_error

    def greedy(*arguments):
        calls.append(1)
        return inner(*arguments) if len(calls) != 2 else torch.empty(1 << 50)  # the allocator's own words

    monkeypatch.setattr(loss, "_softmax_error", greedy)
    assert run([*command, "--gpu-memory", "1MiB", "--force"]) == 2
    told = capsys.readouterr().err
    assert told.count("Error: Out of memory") == 1
    words = [
        "in step ",
        "(forward and backward)",
        "can't allocate memory",
        "GiB resident",
        "planned: ",
        "optimizer states",
    ]
    assert [word for word in words if word not in told] == []


def test_which_errors_are_shortages():
    shortages = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")]
    assert all(map(is_shortage, shortages))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert is_shortage(raised.value)
    assert not is_shortage(RuntimeError("shape mismatch"))
