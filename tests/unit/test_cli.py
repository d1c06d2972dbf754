"""The command line: instant where nothing is trained, exact exit codes, one message for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuner import __version__
from tuner.arguments import bind_resume, repeat_cfg_options
from tuner.cli import run
from tuner.config import PRESETS, RECIPES, add_options, render
from tuner.errors import UserError
from tuner.launch.command import ask_plan, explain_shortage

PRESET = "internlm2_tiny-sft_full"
HEAVY = ("torch", "mmengine", "transformers", "numpy", "peft", "tokenizers", "tuner.train", "tuner.check")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple, dict]]:
    """What the commands hand over; the heavy modules behind them are replaced."""
    made: list[tuple[str, tuple, dict]] = []

    def stand_in(module: str, function: str) -> None:
        fake: Any = ModuleType(module)
        setattr(fake, function, lambda *args, **kwargs: made.append((function, args, kwargs)))
        monkeypatch.setitem(sys.modules, module, fake)

    stand_in("tuner.train", "train")
    stand_in("tuner.chat.command", "chat")
    stand_in("tuner.convert.to_hf", "convert")
    return made


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `tuner chat` raise."""
    fake: Any = ModuleType("tuner.chat.command")

    def chat(*args: Any, **kwargs: Any) -> None:
        raise error

    fake.chat = chat
    monkeypatch.setitem(sys.modules, "tuner.chat.command", fake)


def trained(calls: list[tuple[str, tuple, dict]]) -> tuple[str, dict]:
    """Source and keyword arguments that reached `train`."""
    [(args, kwargs)] = [(args, kwargs) for name, args, kwargs in calls if name == "train"]
    return args[0], kwargs


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list-cfg"],
        ["list-formats"],
        ["train", "--help"],
        ["preview", "--help"],
        ["check", "sp", "--help"],
        ["copy-cfg", PRESET, "."],
        ["completion", "fish"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_for(arguments: list[str], tmp_path: Path):
    code = (
        "import sys, json; from tuner.cli import run; code = run(sys.argv[1:]); "
        f"print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout.splitlines()[-1]) == [0, []]


def test_list_cfg_gives_each_preset_a_line_whose_columns_are_aligned(capsys: pytest.CaptureFixture):
    assert run(["list-cfg"]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table] == ["PRESET", *PRESETS]
    column = table[0].index("MODEL")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)
    [line] = [line for line in table if line.startswith("internlm2_20b-sft_full")]
    for part in ("Full fine-tuning", "InternLM2-20B", "32768", "16 x 80 GB", "317.8 GB"):
        assert part in line


def test_list_cfg_filters_and_says_when_nothing_is_left(capsys: pytest.CaptureFixture):
    assert run(["list-cfg", "-p", "qwen"]) == 0
    assert capsys.readouterr().out.split("\n\n")[0].count("\n") == len(RECIPES)
    assert run(["list-cfg", "-p", "nothing"]) == 2
    assert "No preset matches 'nothing'" in capsys.readouterr().err


def test_copy_cfg_writes_what_render_gives_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "new" / f"{PRESET}.py"
    assert run(["copy-cfg", PRESET, str(tmp_path / "new"), "lr=1e-5"]) == 0
    assert path.read_text(encoding="utf-8") == render(PRESET, {"lr": 1e-5})
    path.write_text("mine", encoding="utf-8")
    assert run(["copy-cfg", PRESET, str(tmp_path / "new")]) == 2
    assert "exists already; nothing was written" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"


def test_copy_cfg_takes_no_files_and_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "mine.py").write_text("lr = 1\n", encoding="utf-8")
    assert run(["copy-cfg", str(tmp_path / "mine.py"), str(tmp_path / "new")]) == 2
    assert run(["copy-cfg", PRESET, str(tmp_path / "mine.py")]) == 2
    assert run(["copy-cfg", PRESET, str(tmp_path / "mine.py" / "below")]) == 2
    assert run(["copy-cfg", "internlm2_tiny-sft", str(tmp_path)]) == 2
    assert "Did you mean internlm2_tiny-sft_lora or internlm2_tiny-sft_full" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.py"]


def test_train_hands_over_the_resolved_text(calls: list, tmp_path: Path):
    arguments = ["train", PRESET, "lr=1e-5", "--work-dir", str(tmp_path), "--seed", "3", "max_steps=7"]
    assert run(arguments) == 0
    source, kwargs = trained(calls)
    assert source == render(PRESET, {"lr": 1e-5, "seed": 3, "max_steps": 7})
    assert (kwargs.pop("before").func, kwargs.pop("explain")) == (ask_plan, explain_shortage)
    assert kwargs == {"work_dir": tmp_path, "resume": None, "name": PRESET}


def test_train_takes_a_file_and_names_the_work_dir_after_it(calls: list, tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("lr = 1  # 学习率\nseed = 0\noptimizer = dict(lr=lr)\n", encoding="utf-8")
    assert run(["train", str(path), "lr=2"]) == 0
    source, kwargs = trained(calls)
    assert source.startswith("lr = 2  # 学习率\n")
    assert kwargs["work_dir"] == Path("work_dirs/mine")


def test_cfg_options_takes_several_values_and_may_be_repeated(calls: list, tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("lr = 1\na = dict(b=dict(c=lr), d=[dict(e='x')])\n", encoding="utf-8")
    options = ["--cfg-options", "a.b.c=2", "a.d.0.e=y z", "--work-dir", "w", "--cfg-options", "lr=5"]
    assert run(["train", *options, str(path)]) == 0
    source, _ = trained(calls)
    assert source == add_options(path.read_text("utf-8"), {"a.b.c": "2", "a.d.0.e": "y z", "lr": "5"})
    assert source.startswith("lr = 5\n")


@pytest.mark.parametrize(
    ("given", "resume"),
    [
        ([], None),
        (["--resume"], "auto"),
        (["--resume", "work/checkpoints/step_00000100"], "work/checkpoints/step_00000100"),
        (["--resume=auto"], "auto"),
        (["--resume", "lr=1e-5"], "auto"),
        (["--resume", "--seed", "1"], "auto"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_resume_takes_a_checkpoint_or_nothing(given: list[str], resume: str | None, before: bool, calls: list):
    first_setting = next((i for i, word in enumerate(given) if word.startswith("lr=")), len(given))
    if before:  # settings follow the config
        given = [*given[:first_setting], PRESET, *given[first_setting:]]
    assert run(["train", *given] if before else ["train", PRESET, *given]) == 0
    assert trained(calls)[1]["resume"] == resume


def test_words_after_the_flags_are_bound_as_written():
    assert bind_resume(["--resume", "mine.py"]) == ["--resume=auto", "mine.py"]
    assert repeat_cfg_options(["--cfg-options", "a.b=1", "c=2", "x", "d=3"]) == [
        "--cfg-options=a.b=1",
        "--cfg-options=c=2",
        "x",
        "d=3",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PRESET, "lrr=1"], "Did you mean lr?"),
        ([PRESET, "lr=fast"], "allowed is a number"),
        ([PRESET, "--lr=1e-5"], "Settings have no dashes"),
        ([PRESET, "lr"], "not of the form name=value"),
        ([PRESET, "lr=1", "lr=2"], "lr is given twice"),
        ([PRESET, "seed=1", "--seed", "2"], "seed is given twice"),
        ([PRESET, "--cfg-options"], "requires an argument"),
        ([PRESET, "--cfg-options", "optim_wraper.x=1"], "Did you mean optim_wrapper or optimizer?"),
        ([PRESET, "--launcher", "slurm"], "--launcher slurm needs --nproc"),
        ([PRESET, "--nproc", "0"], "--nproc 0: give 1 or more"),
        ([PRESET, "--nproc", "2", "--nnodes", "2"], "needs --node-rank, --master too"),
        ([PRESET, "--launcher", "pytorch"], "RANK and WORLD_SIZE are not set"),
        ([PRESET, "--sbatch", "x.sh"], "Add --launcher slurm"),
        ([PRESET, "--launcher", "mpi"], "is not one of"),
        ([PRESET, "--seed", "x"], "not a valid integer"),
        (["no_such-preset"], "Unknown preset"),
        (["no_such.py"], "There is no config file"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, calls: list, capsys: pytest.CaptureFixture
):
    assert run(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("Error: ") == 1
    assert "Traceback" not in printed.err + printed.out
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("mend it"), 2, "Error: mend it\n"),
        (RuntimeError("broke\nand more"), 1, "RuntimeError: broke (run with --debug for the traceback)\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    fails_with(monkeypatch, error)
    assert run(["chat", "model"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arguments", [["--debug", "chat", "model"], ["chat", "model", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    fails_with(monkeypatch, UserError("mend it"))
    assert run(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_convert_and_chat_hand_over_what_was_asked(calls: list):
    assert run(["convert", "work", "out", "--dtype", "bf16"]) == 0
    assert run(["chat", "model", "--system", "你好", "--temperature", "0.5", "--seed", "2"]) == 0
    options = {"dtype": "bfloat16", "max_shard_size": 5 * 10**9, "verify": True}
    assert calls[0] == ("convert", (Path("work"), Path("out")), options)
    name, arguments, asked = calls[1]
    assert (name, arguments) == ("chat", ("model",))
    given = {"system": "你好", "max_new_tokens": 512, "temperature": 0.5, "seed": 2, "allow_code": False}
    others = dict.fromkeys(("adapter", "template", "tools", "tools_file"))
    assert asked == {**given, **others}


def test_version_and_help(capsys: pytest.CaptureFixture):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tuner, version {__version__}"
    assert run(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("list-cfg", "copy-cfg", "train", "convert", "chat", "completion", "--debug"))
    assert run(["trian"]) == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_that_of_the_shell(shell: str, capsys: pytest.CaptureFixture):
    assert run(["completion", shell]) == 0
    assert f"_TUNER_COMPLETE={shell}_complete" in capsys.readouterr().out


def complete(line: str, tmp_path: Path) -> list[str]:
    """What bash would be offered for the last word of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_TUNER_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from tuner.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    return [entry.partition(",")[2] for entry in result.stdout.splitlines()]


def test_shells_complete_presets_and_settings(tmp_path: Path):
    for model, words in {"internlm2_tiny": "tuner train internlm2_tiny", "qwen2_5_7b": "tuner copy-cfg qwen"}.items():
        assert complete(words, tmp_path) == sorted(f"{model}-{recipe}" for recipe in RECIPES)
    assert complete(f"tuner train {PRESET} warm", tmp_path) == ["warmup_ratio="]
    assert complete("tuner li", tmp_path) == ["lint", "list-cfg", "list-formats"]
