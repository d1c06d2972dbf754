"""A hook that writes down the CPU time at the end of each step, for benchmarks/step.py."""

import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook


class StepClock(Hook):
    """CPU seconds of the process after every optimizer step, a line each in `path`."""

    priority = "LOWEST"  # after all others, so that their cost is in the figure

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.times: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.times.append(time.process_time())

    def after_train(self, runner: Any) -> None:
        self.path.write_text("\n".join(map(str, self.times)))
