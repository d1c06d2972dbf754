"""Steps that must not change the weights: not finite, or a spike of the loss; which they were, and what is done."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from tuner.errors import UserError

ON_NONFINITE = ("skip", "rollback", "stop")
SPIKE_WINDOW = 50  # losses whose median a spike is told from
SPIKE_START = 20  # fewer of them tell nothing
Action = Literal["skip", "rollback", "stop"]


class BadSteps:
    """Steps count from 0. All ranks come to the same, for a step's loss and norm are the same on all."""

    def __init__(
        self,
        *,
        on_nonfinite: Action = "skip",
        max_nonfinite_steps: int = 3,
        spike_factor: float | None = None,
        rollback_steps: int = 1,
    ) -> None:
        """What to do about a bad step.

        Args:
            on_nonfinite: "skip" leaves weights and optimizer as they are and goes on; "rollback" goes back to the last
                checkpoint first and steps over the bad step when it comes again; "stop" ends the run.
            max_nonfinite_steps: so many in a row end the run whatever `on_nonfinite` says.
            spike_factor: a loss above so many times the median of the last 50 is as bad as one that is not finite.
            rollback_steps: how many steps, the bad one and those before it, a rollback steps over.
        """
        if on_nonfinite not in ON_NONFINITE:
            raise UserError(f"on_nonfinite={on_nonfinite!r} is unknown. Choose one of {', '.join(ON_NONFINITE)}.")
        for name, value in (("max_nonfinite_steps", max_nonfinite_steps), ("rollback_steps", rollback_steps)):
            if value < 1:
                raise UserError(f"{name}={value}: choose 1 or more.")
        if spike_factor is not None and not spike_factor > 1:
            raise UserError(f"spike_factor={spike_factor}: choose a number above 1, or None for no such rule.")
        self.on_nonfinite, self.max_in_a_row = on_nonfinite, max_nonfinite_steps
        self.spike_factor, self.rollback_steps = spike_factor, rollback_steps
        self.refused: set[int] = set()
        self.passed: set[int] = set()
        """those that a rollback has left to be stepped over"""
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    @property
    def loss_limit(self) -> float:
        """Above which the next step's loss is a spike."""
        if self.spike_factor is None or len(self._losses) < SPIKE_START:
            return math.inf
        return self.spike_factor * statistics.median(self._losses)

    def keep(self, loss: float) -> None:
        """Count a step that has trained."""
        if self.spike_factor is not None:
            self._losses.append(loss)

    def refuse(self, step: int) -> Action:
        """Count a bad step; what to do now."""
        self.refused.add(step)
        if self.num_in_a_row(step) >= self.max_in_a_row:
            return "stop"
        return self.on_nonfinite

    def num_in_a_row(self, step: int) -> int:
        """How many bad steps end with this one; also where a rollback lies between them."""
        return next(number for number in range(len(self.refused) + 1) if step - number not in self.refused)

    def step_over(self, step: int) -> list[int]:
        """After a rollback because of `step`: the steps not to take."""
        steps = list(range(max(0, step - self.rollback_steps + 1), step + 1))
        self.passed.update(steps)
        return steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        return {"refused": sorted(self.refused), "passed": sorted(self.passed), "losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a step known to be bad by now stays so, also where an older checkpoint is read."""
        self.refused.update(state["refused"])
        self.passed.update(state["passed"])
        self._losses = deque(state["losses"], maxlen=SPIKE_WINDOW)
