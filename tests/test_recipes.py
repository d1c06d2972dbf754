"""Every preset loads, uses each of its settings, and names types that take what it gives them."""

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tuner.cli import run
from tuner.config import PRESETS, RECIPES, load, loads, render
from tuner.configs import literals
from tuner.engine.assemble import is_node
from tuner.model.tokenizer import build_tokenizer

ASSEMBLY = "# assembly"
GIVEN_BY_THE_ENGINE = {"optimizer": ["params"], "train_cfg": ["runner", "dataloader"]}


def split(source: str) -> tuple[str, str]:
    """Settings and assembly of a recipe."""
    settings, marker, assembly = source.partition(f"\n{ASSEMBLY}\n")
    assert marker, f"a recipe has a line {ASSEMBLY!r}"
    return settings, assembly


def unused(source: str) -> set[str]:
    """Settings that the assembly never reads."""
    settings, assembly = split(source)
    names = {node.id for node in ast.walk(ast.parse(assembly)) if isinstance(node, ast.Name)}
    return set(literals.settings(settings)) - names


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Path and dict of everything in the assembly that has a `type`."""
    if isinstance(value, Mapping):
        if "type" in value:
            yield path, value
        entries = list(value.items())
    elif isinstance(value, (list, tuple)):
        entries = list(enumerate(value))
    else:
        return
    for key, part in entries:
        yield from nodes(part, f"{path}.{key}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_assembly_uses_every_setting(recipe: str):
    assert unused(RECIPES[recipe].read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_are_literals_with_a_comment_and_the_assembly_has_none(recipe: str):
    settings, assembly = split(RECIPES[recipe].read_text(encoding="utf-8"))
    known = literals.settings(settings)
    lines = settings.splitlines()
    assert len(known) == len(literals.assignments(ast.parse(settings))) > 20
    assert [name for name, setting in known.items() if "  # " not in lines[setting.line - 1]] == []
    assert literals.settings(assembly) == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_number_hides_in_the_assembly(recipe: str):
    _, assembly = split(RECIPES[recipe].read_text(encoding="utf-8"))
    constants = [node.value for node in ast.walk(ast.parse(assembly)) if isinstance(node, ast.Constant)]
    assert constants == []


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_each_type_takes_its_arguments(name: str):
    config = loads(render(name, {}), name)
    found = list(nodes({key: config[key] for key in config}))
    assert len(found) >= 10
    for path, node in found:
        assert is_node(node), path
        arguments = {key: value for key, value in node.items() if key != "type"}
        given = dict.fromkeys(GIVEN_BY_THE_ENGINE.get(path.rpartition(".")[2], []))
        inspect.signature(node["type"]).bind(**given, **arguments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_python_that_runs_by_itself(recipe: str):
    """mmengine's lazy imports and Python's real ones agree."""
    scope: dict[str, Any] = {}
    exec(compile(RECIPES[recipe].read_text(encoding="utf-8"), recipe, "exec"), scope)
    config = load(RECIPES[recipe])
    assert scope["tokenizer"]["type"] is config.tokenizer.type is build_tokenizer
    assert scope["optim_wrapper"] == config.optim_wrapper
    assert scope["train_dataloader"] == config.train_dataloader


def test_copy_cfg_gives_the_rendered_preset_which_trains_as_the_preset_does(tmp_path: Path):
    for name in PRESETS:
        assert run(["copy-cfg", name, str(tmp_path)]) == 0
        path = tmp_path / f"{name}.py"
        assert path.read_text(encoding="utf-8") == render(name, {})
        assert render(path, {"lr": 1e-4}) == render(name, {"lr": 1e-4})


def test_a_setting_reaches_every_place_that_uses_it():
    config = loads(render("internlm2_7b-sft_full", {"max_length": 99, "model_path": "甲", "seed": 5, "lr": 3e-3}))
    assert config.train_dataloader.dataset.max_length == config.train_dataset.shards.max_length == 99
    assert config.tokenizer.path == config.train_dataset.shards.tokenizer.path == config.model.llm.path == "甲"
    assert config.train_dataset.seed == config.model.llm.seed == config.seed == 5
    assert config.optim_wrapper.optimizer.lr == 3e-3


def test_an_unused_setting_is_found():
    source = f"lr = 1\nforgotten = 2\n{ASSEMBLY}\noptimizer = dict(lr=lr)\n"
    assert unused(source) == {"forgotten"}


def test_presets_are_named_model_recipe_and_the_issued_ones_are_there():
    models = [
        *("internlm2_tiny", "internlm2_1_8b", "internlm2_7b", "internlm2_20b", "internlm2_5_7b"),
        *("internlm2_chat_1_8b", "internlm2_chat_7b", "internlm2_chat_20b", "internlm2_5_chat_7b"),
        *("llama3_8b", "qwen2_5_7b"),
    ]
    assert {f"{model}-{recipe}" for model in models for recipe in ("sft_full", "pretrain")} <= set(PRESETS)
