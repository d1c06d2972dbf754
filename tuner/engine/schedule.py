"""The learning rate as a closed formula of the step: linear warm-up, then a cosine."""

import math

from tuner.errors import UserError


def warmup_cosine(step: int, num_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Share of the peak learning rate that step `step` (counted from 0) of `num_steps` uses.

    The first `ceil(warmup_ratio * num_steps)` steps climb in equal parts and never start at 0; the peak is the last of
    them (or step 0 without a warm-up). The rest follows half a cosine (Loshchilov and Hutter 2017, SGDR, equation 5,
    one cycle) whose last step, `num_steps - 1`, uses exactly `min_lr_ratio`.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    peak = max(num_warmup - 1, 0)
    num_falling = num_steps - 1 - peak
    if num_falling <= 0:
        return 1.0
    progress = min((step - peak) / num_falling, 1.0)
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


class WarmupCosine:
    """`warmup_cosine` with its two ratios; it holds no state, so a resumed run needs nothing but the step."""

    def __init__(self, *, warmup_ratio: float = 0.03, min_lr_ratio: float = 0.1) -> None:
        for name, ratio in (("warmup_ratio", warmup_ratio), ("min_lr_ratio", min_lr_ratio)):
            if not 0 <= ratio <= 1:
                raise UserError(f"{name}={ratio} is not a share. Choose a number from 0 to 1.")
        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio

    def factor(self, step: int, num_steps: int) -> float:
        """Share of the peak learning rate at `step`, counted from 0."""
        return warmup_cosine(step, num_steps, self.warmup_ratio, self.min_lr_ratio)
