"""Settings are replaced in the source itself, so that comments stay and what is derived follows."""

import ast
from pathlib import Path

import pytest

from tuner.config import OPTIONS_HEADING, PRESETS, RECIPES, add_options, list_presets, load, loads, read_source, render
from tuner.configs import literals
from tuner.configs.long_context import PLANS
from tuner.configs.models import MODELS
from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

SOURCE = '''"""测试：一个配方。"""

from torch.optim import AdamW

问候 = "你好，世界"; lr = 2e-5  # 学习率 stays
steps: int | None = None  # how many
data_path: str | list[str] = "数据.jsonl"  # 数据
prompts = [
    "你是谁？",  # inside
    "Who are you?",
]  # after
betas = (0.9, 0.95)
flag = True

# assembly
doubled = lr * 2
optimizer = dict(type=AdamW, lr=lr, betas=betas)
train = dict(optimizer=optimizer, steps=steps, parts=[dict(data=data_path), dict(prompts=prompts)], flag=flag)
again = dict(optimizer=optimizer, greeting=问候)
'''


def spans_of(source: str, names: set[str]) -> list[tuple[int, int]]:
    return [(setting.start, setting.end) for name, setting in literals.settings(source).items() if name in names]


def executed(source: str) -> dict[str, object]:
    """What Python itself makes of the text: the independent reference."""
    scope: dict[str, object] = {}
    exec(source, scope)
    return scope


def test_every_byte_outside_the_replaced_literals_stays():
    values = {"lr": 1e-4, "steps": 7, "prompts": ["再见"], "data_path": ["甲", "乙"], "问候": "hi"}
    changed = literals.replace(SOURCE, values)

    def outside(source: str) -> list[bytes]:
        data, pieces, position = source.encode(), [], 0
        for start, end in sorted(spans_of(source, set(values))):
            pieces.append(data[position:start])
            position = end
        return [*pieces, data[position:]]

    assert outside(changed) == outside(SOURCE)
    scope = executed(changed)
    assert {name: scope[name] for name in values} == values


def test_what_is_derived_from_a_setting_follows_it():
    scope = executed(literals.replace(SOURCE, {"lr": "3e-4"}))
    assert scope["doubled"] == 6e-4
    assert scope["train"]["optimizer"]["lr"] == scope["again"]["optimizer"]["lr"] == 3e-4


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_spans_hold_with_other_line_ends_and_with_form_feeds_and_separators_in_text(newline: str):
    source = f'a = "x\u2028y\x0cz"{newline}b = 1  # 中{newline}'.replace("\r\n", newline)
    assert literals.replace(source, {"b": 22}) == source.replace("b = 1", "b = 22")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("1e-5", "lr", 1e-5),
        ("1", "lr", 1.0),
        ("1e4", "steps", 10000),
        ("None", "steps", None),
        ("数据/a b.jsonl", "data_path", "数据/a b.jsonl"),
        ("2024", "data_path", "2024"),
        ("'quoted'", "data_path", "quoted"),
        ('["a", "b"]', "data_path", ["a", "b"]),
        ("0.9,0.98", "betas", (0.9, 0.98)),
        ("[0, 0.98]", "betas", (0, 0.98)),
        ("false", "flag", False),
        ("True", "flag", True),
    ],
)
def test_values_are_python_literals_or_bare_text_of_the_settings_type(text: str, name: str, value: object):
    changed = executed(literals.replace(SOURCE, {name: text}))[name]
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lr", "fast"),
        ("lr", "None"),
        ("lr", "True"),
        ("steps", "1.5"),
        ("steps", "many"),
        ("flag", "1"),
        ("flag", "maybe"),
        ("betas", "0.9"),
        ("betas", "('a', 'b')"),
        ("prompts", "hello"),
        ("prompts", "[1, 2]"),
        ("lr", "1e999"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, text: str):
    with pytest.raises(UserError) as error:
        literals.replace(SOURCE, {name: text})
    assert text in str(error.value) or "inf" in str(error.value)


def test_text_with_quotes_backslashes_and_newlines_comes_back_the_same():
    for text in ['say "hi"', "it's", "C:\\new", "two\nlines", "tab\t", "雪\u200b", "\\", "\udcff.jsonl", "😀"]:
        assert executed(literals.replace(SOURCE, {"问候": repr(text)}))["问候"] == text


def test_unknown_derived_and_doubled_names_are_told_apart():
    with pytest.raises(UserError, match="Did you mean prompts"):
        literals.replace(SOURCE, {"promts": "x"})
    with pytest.raises(UserError, match="doubled is computed"):
        literals.replace(SOURCE, {"doubled": "1"})
    with pytest.raises(UserError, match="assigned 2 times"):
        literals.replace(SOURCE + "lr = 3\n", {"lr": "1"})


def test_a_syntax_error_is_told_with_file_line_and_what(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("lr = 1e-5\nmodel = dict(\nlr2 = = 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.py:[23]: .*"):
        render(path, {})


def test_an_error_while_the_config_runs_is_told_with_file_and_line(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("lr = 1e-5\n\nmodel = dict(lr=lrr)\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.py:3: NameError: name 'lrr'"):
        load(path)


@pytest.mark.parametrize("line", ["from .base import lr", "from mmengine.config import read_base", "_base_ = 'a.py'"])
def test_inheritance_is_refused_since_derived_values_would_not_follow(line: str):
    source = f"a = 1\n{line}\n" + ("with read_base():\n    pass\n" if "read_base" in line else "")
    with pytest.raises(UserError, match=r"mine:\d: .*self-contained"):
        loads(source, "mine")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("internlm2_7b-sft_ful", "Did you mean internlm2_7b-sft_full"),
        ("no_such_file.py", "There is no config file"),
        (".", "is a directory"),
    ],
)
def test_what_is_no_config_is_told_with_the_nearest(name: str, expected: str):
    with pytest.raises(UserError, match=expected):
        read_source(name)


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path):
    (tmp_path / "gbk.py").write_bytes("# 中文\n".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_source(tmp_path / "gbk.py")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbflr = 1\n")
    assert render(tmp_path / "bom.py", {"lr": 2}) == "lr = 2\n"


def test_an_option_reaches_everything_that_shares_the_part():
    changed = add_options(SOURCE, {"train.optimizer.lr": "1e-3", "train.parts.0.data": "x.jsonl"})
    scope = executed(changed)
    assert scope["train"]["optimizer"]["lr"] == scope["again"]["optimizer"]["lr"] == 1e-3
    assert scope["train"]["parts"][0]["data"] == "x.jsonl"
    assert scope["lr"] == 2e-5
    config = loads(changed)
    assert config.again.optimizer.lr == 1e-3


def test_an_option_named_like_a_setting_is_that_setting():
    changed = add_options(SOURCE, {"lr": "1e-3"})
    assert OPTIONS_HEADING not in changed
    assert executed(changed)["doubled"] == 2e-3


def test_an_option_may_be_an_argument_that_the_config_leaves_out():
    assert executed(add_options(SOURCE, {"optimizer.eps": "1e-6"}))["optimizer"]["eps"] == 1e-6


def test_options_can_be_added_to_what_has_options():
    twice = add_options(add_options(SOURCE, {"optimizer.lr": "1"}), {"optimizer.lr": "2"})
    assert executed(twice)["optimizer"]["lr"] == 2.0
    assert twice.count(OPTIONS_HEADING) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("trian.optimizer.lr", "Did you mean train"),
        ("train.optimiser.lr", "Did you mean optimizer"),
        ("train.optimizer.beta", "Did you mean betas"),
        ("train.parts.2.data", "2 is none of its 2 places"),
        ("train.parts.first", "first is none"),
        ("train.optimizer.lr.x", "nothing below it"),
        ("train.optimizer", "part of the assembly"),
        ("train.optimizer.type", "part of the assembly"),
        ("train.optimizer.lr", "allowed is a number"),
        ("doubled", "is computed"),
        ("AdamW", "Unknown setting AdamW"),
    ],
)
def test_an_option_that_leads_nowhere_is_told_with_the_nearest_names(path: str, expected: str):
    with pytest.raises(UserError, match=expected):
        add_options(SOURCE, {path: "text"})


def test_a_pattern_picks_presets_by_anything_in_their_line():
    assert len(list_presets()) == len(PRESETS) == 4 * len(MODELS) + len(PLANS)
    assert {row.name for row in list_presets("TINY")} == {f"internlm2_tiny-{recipe}" for recipe in RECIPES}
    assert {row.name for row in list_presets("sft*llama")} == {
        f"llama3_8b-sft_{tuning}" for tuning in ("full", "lora", "qlora")
    }
    assert list_presets("nothing like it") == []


def test_a_model_row_may_override_a_setting_for_one_recipe_only():
    sft, pretrain = (literals.settings(render(f"internlm2_tiny-{name}", {})) for name in ("sft_full", "pretrain"))
    assert sft["data_path"].value == "demo:train.jsonl"
    assert pretrain["data_path"].value == "demo:text.jsonl"
    assert sft["model_path"].value == pretrain["model_path"].value == "demo:model"


def test_every_literal_of_a_rendered_preset_is_what_the_row_says():
    for name, preset in PRESETS.items():
        values = {name: setting.value for name, setting in literals.settings(render(name, {})).items()}
        assert {key: values[key] for key in preset.settings} == preset.settings


def test_names_that_resemble_nothing_get_the_whole_list():
    assert did_you_mean_or_all("zzz", ["lr", "seed"]) == " Allowed: lr, seed."
    assert did_you_mean_or_all("sed", ["lr", "seed"]) == " Did you mean seed?"


def test_the_resolved_text_resolves_to_itself(tmp_path: Path):
    text = render("internlm2_tiny-sft_full", {"lr": "1e-3", "data_path": "数据.jsonl"})
    (tmp_path / "config.py").write_text(text, encoding="utf-8")
    assert render(tmp_path / "config.py", {}) == text
    assert ast.parse(text)


def test_a_script_that_is_no_config_is_called_so(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("import json\nvalue = json.loads('{}')['a']\n")
    with pytest.raises(UserError, match=r"script.py is no config: it assigns none of model, .*copy-cfg"):
        load(script)
