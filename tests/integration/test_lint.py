"""`tuner lint` on whole files: nothing above a note in clean data, exact places, exit codes."""

import gzip
import json
import re
from pathlib import Path

import pytest
from lint_samples import PROSE, answer, call, function, result, talk
from small_tokenizer import write_directory

from tuner.cli import run
from tuner.demo.dialogues import dialogues
from tuner.lint import command
from tuner.lint.findings import Report
from tuner.lint.rows import RowLinter

CONFIG = """
from tuner.dataset.build import PackedDataset, build_dataloader, build_shards
from tuner.dataset.rendering import Rendering
from tuner.model.tokenizer import build_tokenizer

model_path = {model!r}
data_path = {data!r}
max_length = 40
too_long = "truncate"
loss_on = "assistant"

tokenizer = dict(type=build_tokenizer, path=model_path)
train_dataloader = dict(
    type=build_dataloader,
    num_accumulation_steps=1,
    dataset=dict(
        type=PackedDataset,
        max_length=max_length,
        seed=0,
        shards=dict(
            type=build_shards, path=data_path, data_format="openai", tokenizer=tokenizer, max_length=max_length,
            chat_template=dict(type=Rendering, chat_template="internlm2", loss_on=loss_on), too_long=too_long,
        ),
    ),
)
"""
CLEAN = [talk(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(30)]


def write(path: Path, rows: list, opened=open) -> Path:
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"))


def lint(capsys, *arguments: object) -> tuple[int, str]:
    code = run(["lint", *map(str, arguments)])
    return code, capsys.readouterr().out


def findings(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_five_thousand_clean_rows_raise_no_alarm(tmp_path, capsys):
    rows = dialogues(5000, "train", seed=7)
    assert {bool(row.get("tools")) for row in rows} == {True, False}
    code, shown = lint(capsys, write(tmp_path / "clean.jsonl", rows))
    assert code == 0, shown
    assert "5,000 rows of 1 file checked" in shown


def test_nothing_found_is_said_in_a_line(tmp_path, capsys):
    code, shown = lint(capsys, write(tmp_path / "a.jsonl", CLEAN[:1]), "--format", "openai")
    assert code == 0
    assert shown.splitlines()[0] == "1 row of 1 file checked, nothing found."


def test_each_finding_has_its_file_and_line_and_the_exit_code_is_two(tmp_path, capsys):
    wrong = talk("Weather?", call({"town": "Rome"}), result(), "Fair.", tools=[function()])
    first = write(tmp_path / "a.jsonl", [*CLEAN[:10], "", wrong, '{"messages": 3}', "{"])
    second = write(tmp_path / "b.jsonl.gz", [CLEAN[3], answer("")], gzip.open)
    out = tmp_path / "found.jsonl"
    code, shown = lint(capsys, first, second, "--format", "openai", "--json", out)
    assert code == 2
    assert f"{first}:12: tool-arguments: message 1 calls 'get_weather' against its declared schema: 'city' is" in shown
    placed = {(Path(item["file"]).name, item["line"], item["check"], item["severity"]) for item in findings(out)}
    assert placed == {
        ("a.jsonl", 12, "tool-arguments", "error"),
        ("a.jsonl", 12, "tool-arguments", "warning"),
        ("a.jsonl", 13, "refused", "error"),
        ("a.jsonl", 14, "refused", "error"),
        ("b.jsonl.gz", 1, "duplicate", "note"),
        ("b.jsonl.gz", 2, "refused", "error"),
        ("b.jsonl.gz", 2, "empty-text", "error"),
    }
    duplicate = next(item for item in findings(out) if item["check"] == "duplicate")
    assert f"{first}:4" in duplicate["message"]


def test_rows_of_an_array_in_one_line_are_told_apart(tmp_path, model):
    """A line is then no name for a row: sizes and refusals must not be swapped."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([talk("Hi", "A " * n + ".") for n in (5, 90, 2)] + [{"messages": []}]), encoding="utf-8")
    out = tmp_path / "found.jsonl"
    assert run(
        ["lint", str(path), "--format", "openai", "--model", str(model), "--max-length", "40", "--json", str(out)]
    )
    assert [item["check"] for item in findings(out)] == ["over-length", "refused"]


def test_findings_beyond_the_limit_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [talk(f"Question {n}?", f"Number {n} </s>") for n in range(9)])
    _, shown = lint(capsys, path, "--limit", 2)
    assert shown.count(": special-text:") == 2
    assert "... and 7 more" in shown


def test_files_of_several_formats_are_checked_each_as_its_own(tmp_path, capsys):
    chats = write(tmp_path / "chats.jsonl", [*CLEAN[:5], talk("Why?", "")])
    pairs = write(tmp_path / "pairs.jsonl", [{"question": "Why?", "answer": ""}, {"question": "a", "answer": "b"}])
    more = write(tmp_path / "more.jsonl", [*CLEAN[5:9], CLEAN[0]])
    code, shown = lint(capsys, chats, pairs, more)
    assert code == 2
    assert "13 rows of 3 files checked." in shown
    assert f'{chats}: data_format = "openai"' in shown
    assert f'{pairs}: data_format = "qa"' in shown
    assert f"{pairs}:1: refused:" in shown
    assert f"{more}:5: duplicate:" in shown or f"{chats}:1: duplicate:" in shown


def test_json_is_never_written_over(tmp_path, capsys):
    path, out = write(tmp_path / "a.jsonl", CLEAN), tmp_path / "found.jsonl"
    out.write_text("mine")
    assert run(["lint", str(path), "--json", str(out)]) == 2
    assert out.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_a_config_brings_format_template_length_and_tokenizer(tmp_path, capsys, model):
    long = talk(f"{PROSE}. {PROSE}. Why?", "It rains.")
    data = write(tmp_path / "train.jsonl", [*CLEAN, long])
    config = tmp_path / "mine.py"
    config.write_text(CONFIG.format(model=str(model), data=str(data)), encoding="utf-8")
    code, shown = lint(capsys, config)
    assert code == 2
    assert f"{data}:31: over-length:" in shown
    assert f"{data}:31: zero-loss:" in shown
    code, shown = lint(capsys, config, "too_long=split")
    assert code == 0
    assert f"{data}:31: over-length:" in shown
    assert "split into" in shown
    assert lint(capsys, config, "max_length=4000")[0] == 0
    assert lint(capsys, config, "--max-length", 4000)[0] == 0
    code, shown = lint(capsys, config, "max_length=4000", "loss_on='calls'")
    assert code == 2
    assert f"zero-loss: {len(CLEAN) + 1} warnings" in shown
    assert run(["lint", str(config), "maxlength=4000"]) == 2
    assert "max_length" in capsys.readouterr().err


def test_a_template_that_has_no_place_for_a_row_refuses_it(tmp_path, capsys, model):
    """Known with a tokenizer only, for it is the template that has no place."""
    named = talk({"role": "user", "content": "Hi", "name": "a\ud83d"}, "Hello.")
    path = write(tmp_path / "a.jsonl", [json.dumps(named)])
    assert lint(capsys, path, "--model", model, "--format", "openai")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{data}", "--max-length", "64"], "--model DIR"),
        (["{data}", "--format", "opanai"], "openai"),
        (["missing.jsonl"], "There is no data file missing.jsonl"),
        (["internlm2_tiny-sft_full", "lr"], "name=value"),
    ],
)
def test_a_mistake_in_the_command_is_one_message(tmp_path, capsys, arguments, words):
    data = str(write(tmp_path / "a.jsonl", CLEAN))
    assert run(["lint", *(argument.format(data=data) for argument in arguments)]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_a_file_that_breaks_off_is_a_finding_and_the_others_are_checked(tmp_path, capsys):
    whole = write(tmp_path / "b.jsonl", [*CLEAN, answer(" ")])
    packed = write(tmp_path / "a.jsonl.gz", [talk(f"What is {n}?", f"It is {n}.") for n in range(500)], gzip.open)
    packed.write_bytes(packed.read_bytes()[:-20])
    code, shown = lint(capsys, packed, whole, "--format", "openai")
    assert code == 2
    assert f"{packed}: unreadable: " in shown
    assert f"{whole}:31: " in shown


def test_ctrl_c_shows_what_was_found_until_then(tmp_path, capsys, monkeypatch):
    rows = [answer(""), *[talk(f"Number {n}?", f"{'long ' * 300}{n}.") for n in range(600)]]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "found.jsonl"
    whole_chunk = RowLinter.__call__

    def interrupted(linter, chunk):
        if chunk.rows[0].line > 1:
            raise KeyboardInterrupt
        return whole_chunk(linter, chunk)

    monkeypatch.setattr(RowLinter, "__call__", interrupted)
    code, shown = lint(capsys, path, "--format", "openai", "--json", out)
    assert code == 130
    assert f"{path}:1: empty-text:" in shown
    assert 1 < int(re.search(r"(\d+) rows of 1 file checked", shown)[1]) < len(rows)
    assert "Stopped by Ctrl-C" in shown
    assert "not complete" in shown
    assert (1, "empty-text") in {(item["line"], item["check"]) for item in findings(out)}


def test_workers_find_the_same(tmp_path, monkeypatch):
    """Many chunks on two processes: the same findings in the same order as on one."""
    rows = [*CLEAN, *[talk(f"Number {n}?", f"{'long ' * 300}{n} </s>") for n in range(600)], CLEAN[0]]
    path = write(tmp_path / "a.jsonl", rows)
    linter = RowLinter(command.FORMATS["openai"])
    shown = []
    for small in (1 << 40, 0):
        monkeypatch.setattr(command, "SMALL_BYTES", small)
        report = Report(10_000)
        assert command.check_files([(linter, [path])], report) == (len(rows), True)
        shown.append(list(report.lines()))
    assert shown[0] == shown[1]
    assert len(shown[0]) > 600


def test_real_files_report_what_is_really_wrong_with_them(shared_data, tmp_path, capsys):
    """Each judged by eye: rows that twin others, calls against their schemas, an answer cut off in its code."""
    source = shared_data / "glaive_toolcall"
    out = tmp_path / "found.jsonl"
    lint(capsys, source / "glaive_toolcall_zh_demo.json", "--json", out)
    serious = {(item["line"], item["check"]) for item in findings(out) if item["severity"] != "note"}
    duplicates = {line for line, check in serious if check == "duplicate"}
    rows = json.loads((source / "glaive_toolcall_zh_demo.json").read_text(encoding="utf-8"))
    assert len(duplicates) == len(rows) - len({json.dumps(row, sort_keys=True) for row in rows})
    assert {(line, check) for line, check in serious if check != "duplicate"} == {
        *((line, "tool-arguments") for line in (163, 619, 3064, 3198, 4322, 7109)),
        *((line, "refused") for line in (5819, 8763)),
        (7009, "cut-off"),
    }
    assert lint(capsys, shared_data / "gsm8k" / "train.jsonl")[0] == 0
