"""Presets for long context: the memory in their headers is what `tuner plan` computes; their lines can be pasted."""

import re

import pytest

from tuner.config import PRESETS, loads, render
from tuner.configs.literals import settings
from tuner.configs.long_context import LENGTHS, PLANS, Plan, default, header
from tuner.plan.gpus import GPUS
from tuner.plan.memory import GIB, memory_of
from tuner.plan.setup import read_setup

EVERY = [(model, plan) for model, plans in PLANS.items() for plan in plans]
QUICK = [("internlm2_1_8b", "8k", 8)]


def named(case: tuple[str, Plan]) -> str:
    model, plan = case
    return f"{model} {plan.context} on {plan.gpus}"


def predicted(model: str, plan: Plan) -> float:
    config = loads(render(f"{model}-sft_long", plan.settings))
    setup, _ = read_setup(config, plan.gpus, min(plan.gpus, 8))
    return memory_of(setup).peak.total / GIB


@pytest.mark.parametrize("case", [c for c in EVERY if (c[0], c[1].context, c[1].gpus) in QUICK], ids=named)
def test_the_memory_in_the_header_is_the_plan_s(case: tuple[str, Plan]):
    assert predicted(*case) == pytest.approx(case[1].gibibytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=named)
def test_every_memory_is_the_plan_s(case: tuple[str, Plan]):
    assert predicted(*case) == pytest.approx(case[1].gibibytes, rel=0.01)


def test_there_is_a_plan_for_each_length_and_number_and_all_leave_room():
    for plans in PLANS.values():
        assert {(length, gpus) for length in LENGTHS for gpus in (8, 16, 32)} <= {(p.context, p.gpus) for p in plans}
    memory = GPUS["H100"].memory / GIB
    assert [named(case) for case in EVERY if case[1].gibibytes > memory - 5] == []
    wanted = [("internlm2_20b", "32k", 8), ("internlm2_20b", "200k", 8), ("internlm2_7b", "200k", 4)]
    wanted.append(("internlm2_1_8b", "200k", 1))
    assert set(wanted) <= {(model, plan.context, plan.gpus) for model, plan in EVERY}


@pytest.mark.parametrize("model", PLANS)
def test_a_pasted_line_makes_the_preset_that_plan(model: str):
    """A line of the header, read as a command reads it, turns the preset's settings into those of its plan."""
    name = f"{model}-sft_long"
    assert PRESETS[name].source.startswith(f'"""{header(model)}')
    lines = [line for line in header(model).splitlines() if re.match(r" +\d+[kM] ", line)]
    assert len(lines) == len(PLANS[model])
    for line, plan in zip(lines, PLANS[model], strict=True):
        words = line.split()
        assert words[:2] == [plan.context, str(plan.gpus)]
        given = dict(word.split("=", 1) for word in words[4:] if "=" in word)
        assert bool(given) == (plan.settings != default(model).settings)
        found = {key: setting.value for key, setting in settings(render(name, given)).items()}
        assert {key: found[key] for key in plan.settings} == plan.settings
