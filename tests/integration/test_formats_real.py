"""Public files as they come: every row becomes a sample that InternLM2's template renders, or is refused for cause."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.format_choice import find_format
from tuner.dataset.formats import FORMATS, RowError
from tuner.dataset.joining import join_files
from tuner.dataset.read import read_chunks
from tuner.dataset.reading.strict_json import parse_row

TEMPLATE = CHAT_TEMPLATES["internlm2"]
BFCL = {"live_simple": 258, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "simple_python": 400}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [parse_row(row.content) for chunk in read_chunks(path) for row in chunk.rows]


def as_lines(path: Path, out: Path) -> Path:
    """BFCL's files are JSON lines whatever their name says."""
    out.write_bytes(path.read_bytes())
    return out


def convert(name: str, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Samples, each rendered once, and how often which reason was given for a refusal."""
    samples, reasons = [], Counter[str]()
    for row in rows:
        try:
            samples.append(FORMATS[name](row))
            render(samples[-1], TEMPLATE)
        except RowError as error:
            reasons[str(error)] += 1
    return samples, reasons


@pytest.mark.parametrize(("language", "refused"), [("en", 0), ("zh", 2)])
def test_glaive(shared_data, language: str, refused: int):
    rows = rows_of(shared_data / "glaive_toolcall" / f"glaive_toolcall_{language}_demo.json")
    samples, reasons = convert("sharegpt", rows)
    assert (len(samples), reasons.total()) == (300 - refused, refused)
    assert set(reasons) <= {
        "Expected message 2 to be user or system, got 'tool' (a tool result needs a tool call before it)."
    }
    turns = Counter(turn["from"] for row in rows for turn in row["conversations"])
    said = Counter(message["role"] for sample in samples for message in sample["messages"])
    calls = sum(len(message.get("tool_calls", [])) for sample in samples for message in sample["messages"])
    assert calls == turns["function_call"]
    assert said["tool"] == turns["observation"] - refused
    assert sum("tools" in sample for sample in samples) == sum(bool(json.loads(row["tools"])) for row in rows) - refused


@pytest.mark.parametrize(
    ("file", "number"), [("codegen-instruct", 4535), ("roleplay-instruct", 1923), ("toolformer-0.6", 2396)]
)
def test_gpteacher(shared_data, file: str, number: int):
    samples, reasons = convert("alpaca", rows_of(shared_data / "gpteacher" / f"{file}.json"))
    assert (len(samples), reasons.total()) == (number, 0)


@pytest.mark.parametrize(("file", "number"), [("train", 7473), ("test", 1319)])
def test_gsm8k(shared_data, file: str, number: int):
    samples, reasons = convert("qa", rows_of(shared_data / "gsm8k" / f"{file}.jsonl"))
    assert (len(samples), reasons.total()) == (number, 0)


def test_toolbench(shared_data):
    files = sorted((shared_data / "toolbench_example").glob("*_answer_*.json"))
    samples, reasons = convert("toolbench", [row for file in files for row in rows_of(file)])
    assert [len(sample["messages"]) for sample in samples] == [7, 9, 10]
    assert reasons == {
        "Expected a search that found an answer (finish_type 'give_answer', valid_data true), got 'give_up', true.": 1
    }
    for sample in samples:
        assert sample["messages"][-1]["tool_calls"][0]["function"]["name"] == "Finish"


def resolved(allowed: Any, value: Any) -> bool:
    """Whether a value is what BFCL allows: one of the options, by its own rule for objects and their lists."""
    if value in allowed:
        return True
    objects = [option for option in allowed if isinstance(option, dict)]
    lists = [option for option in allowed if isinstance(option, list)]
    if isinstance(value, dict):
        return any(fits(option, value) for option in objects)
    if isinstance(value, list):
        return not allowed or any(
            len(option) == len(value)
            and all(fits(a, b) if isinstance(a, dict) else a == b for a, b in zip(option, value))
            for option in lists
        )
    return False


def fits(allowed: dict[str, Any], arguments: dict[str, Any]) -> bool:
    given = all(key in allowed and resolved(allowed[key], value) for key, value in arguments.items())
    return given and all("" in allowed[key] for key in allowed if key not in arguments)


@pytest.mark.parametrize("part", BFCL)
def test_bfcl_with_its_answers(shared_data, tmp_path: Path, part: str):
    name = f"BFCL_v4_{part}.json"
    questions = as_lines(shared_data / "bfcl" / name, tmp_path / "q.jsonl")
    answers = as_lines(shared_data / "bfcl" / "possible_answer" / name, tmp_path / "a.jsonl")
    assert join_files(questions, answers, tmp_path / "out.jsonl") == (BFCL[part], 0)
    rows = rows_of(tmp_path / "out.jsonl")
    samples, reasons = convert("bfcl", rows)
    assert (len(samples), reasons.total()) == (BFCL[part], 0)
    for row, sample in zip(rows, samples, strict=True):
        calls = [call["function"] for call in sample["messages"][-1]["tool_calls"]]
        assert [call["name"] for call in calls] == [name for truth in row["ground_truth"] for name in truth]
        for call, truth in zip(calls, row["ground_truth"], strict=True):
            assert fits(truth[call["name"]], call["arguments"]), (call, truth)


def test_bfcl_without_answers_or_of_several_turns_is_refused(shared_data, tmp_path: Path):
    nothing_right = rows_of(shared_data / "bfcl" / "BFCL_v4_irrelevance.json")
    samples, reasons = convert("bfcl", nothing_right)
    assert (len(samples), reasons.total(), len(reasons)) == (0, 240, 1)
    assert "has none where no call is right" in next(iter(reasons))
    name = "BFCL_v4_multi_turn_base.json"
    files = [shared_data / "bfcl" / name, shared_data / "bfcl" / "possible_answer" / name]
    parts = [as_lines(file, tmp_path / f"{place}.jsonl") for place, file in enumerate(files)]
    join_files(*parts, tmp_path / "out.jsonl")
    samples, reasons = convert("bfcl", rows_of(tmp_path / "out.jsonl"))
    assert (len(samples), reasons.total()) == (0, 200)
    assert all("to hold one list of messages" in reason or "'function' in the row" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("glaive_toolcall/*.json", "sharegpt"),
        ("gpteacher/*.json", "alpaca"),
        ("gsm8k/*.jsonl", "qa"),
        ("toolbench_example/*_answer_*.json", "toolbench"),
        ("bfcl/*_*.json", "bfcl"),
    ],
)
def test_the_format_of_real_files_is_found(shared_data, capsys, pattern: str, name: str):
    files = sorted(shared_data.glob(pattern))
    assert files
    assert find_format(files) == name
    assert capsys.readouterr().out.startswith(f'{files[0]}: data_format = "{name}", for the first ')
