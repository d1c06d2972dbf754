"""The closed formula of the learning rate, against a loop that walks through the steps."""

import math

import pytest

from tuner.engine.schedule import WarmupCosine, warmup_cosine
from tuner.errors import UserError


def walk(num_steps: int, warmup_ratio: float, min_lr_ratio: float) -> list[float]:
    """Climb by equal additions to 1, then turn a pointer by equal angles from 0 to pi and read its height."""
    num_warmup = 0
    while num_warmup < warmup_ratio * num_steps:
        num_warmup += 1
    values = []
    for number in range(num_warmup):
        values.append(values[-1] + 1 / num_warmup if number else 1 / num_warmup)
    if not values:
        values.append(1.0)
    num_falling = num_steps - len(values)
    pointer, turn = (
        complex(1, 0),
        complex(math.cos(math.pi / max(num_falling, 1)), math.sin(math.pi / max(num_falling, 1))),
    )
    for _ in range(num_falling):
        pointer *= turn
        values.append(min_lr_ratio + (1 - min_lr_ratio) * (pointer.real + 1) / 2)
    return values


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 997])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_the_formula_is_the_walk(num_steps, warmup_ratio, min_lr_ratio):
    formula = [warmup_cosine(step, num_steps, warmup_ratio, min_lr_ratio) for step in range(num_steps)]
    assert formula == pytest.approx(walk(num_steps, warmup_ratio, min_lr_ratio), abs=1e-11)


def test_the_last_step_uses_exactly_the_minimum_and_the_peak_is_reached():
    factors = [WarmupCosine(warmup_ratio=0.1, min_lr_ratio=0.1).factor(step, 100) for step in range(100)]
    assert factors[-1] == pytest.approx(0.1, abs=1e-15)
    assert max(factors) == factors[9] == 1.0
    assert factors[0] == 0.1  # the first step learns something


@pytest.mark.parametrize("ratio", [-0.1, 1.5, 5])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(UserError, match=r"warmup_ratio=.* 0 to 1"):
        WarmupCosine(warmup_ratio=ratio)
    with pytest.raises(UserError, match="min_lr_ratio"):
        WarmupCosine(min_lr_ratio=ratio)
