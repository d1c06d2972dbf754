"""mmengine's FlexibleRunner, reduced to its frame: model, strategy, loop and hooks; ours decide everything else."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tuner.engine.checkpoint import list_steps
from tuner.engine.frame import FlexibleRunner, Hook
from tuner.engine.loop import TrainLoop
from tuner.engine.schedule import WarmupCosine
from tuner.engine.snapshot import hf_files, load_snapshot
from tuner.engine.stages import StagedRope
from tuner.engine.strategy import Strategy
from tuner.engine.together import from_first
from tuner.engine.work_dir import first_whole

DEFAULT_HOOKS = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint keeps of the run besides tensors."""

    config_text: str
    settings: dict[str, Any]  # the config's literals, as JSON has them
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None


@dataclass(frozen=True)
class Parts:
    """The objects that a config was assembled to."""

    model: nn.Module
    dataloader: DataLoader
    optim_wrapper: Mapping[str, Any]
    schedule: WarmupCosine
    strategy: Strategy
    train_cfg: dict[str, Any]
    hooks: Sequence[Hook]
    rope: StagedRope | None = None


class Runner(FlexibleRunner):
    """Runs built parts in a work dir; resumes only from our own checkpoints."""

    def __init__(
        self, parts: Parts, record: RunRecord, *, work_dir: Path, checkpoints: Sequence[Path] = ()
    ) -> None:  # fmt: skip
        """`checkpoints`: to go on from, in the order to try them; where there are any, one must be whole."""
        self.record = record
        self.checkpoints = checkpoints
        self.run = uuid.uuid4().hex  # a resumed run is the one that it goes on with
        self.loop_node = parts.train_cfg
        self.figures: dict[str, float] = {}  # what hooks measured after the step, for metrics.jsonl and TensorBoard
        self._rope = parts.rope
        strategy = parts.strategy
        # the names under which FlexibleRunner asks a strategy for its own fields
        strategy._experiment_name = strategy._timestamp = work_dir.name
        strategy._log_dir = strategy._work_dir = str(work_dir)
        strategy._launcher, strategy._distributed = "none", strategy.world.size > 1
        strategy._rank, strategy._world_size = strategy.world.rank, strategy.world.size
        strategy.logger = logging.getLogger("tuner.mmengine")
        super().__init__(
            parts.model,
            work_dir=str(work_dir),
            train_dataloader=parts.dataloader,
            optim_wrapper=parts.optim_wrapper,
            param_scheduler=parts.schedule,
            train_cfg=parts.train_cfg,
            strategy=strategy,
            default_hooks=dict.fromkeys(DEFAULT_HOOKS),
            custom_hooks=list(parts.hooks),
            launcher="none",
            default_scope=None,
        )

    def train(self) -> nn.Module:
        """Prepare, resume where asked, then run the loop between the hooks."""
        loop: TrainLoop = self.build_train_loop(self.loop_node)
        self._train_loop = loop
        self.model: nn.Module = self.strategy.prepare(
            self.model,
            optim_wrapper=self.optim_wrapper,
            param_scheduler=self.param_schedulers,
            num_steps=loop.num_steps,
        )
        self.load_or_resume()
        self.call_hook("before_run")
        try:
            loop.run()
        except Exception:
            self.call_hook("after_failure")
            raise
        self.call_hook("after_run")
        return self.model

    def load_or_resume(self) -> None:
        """Continue from the first whole one of `checkpoints`; mmengine's own resume executes pickles and configs."""
        if self.checkpoints:
            load_snapshot(self, first_whole(self.checkpoints, Path(self.work_dir), self.strategy.world))

    def enter_stage(self, step: int) -> None:
        """Turn as the stage of a step, counted from 0, says; what is saved from then on says so, too."""
        if self._rope is not None and self._rope.enter(step):
            self.__dict__.pop("hf_files", None)

    @property
    def rope_base(self) -> float | None:
        """Of the stage under way; None where the run leaves it to the model."""
        return None if self._rope is None else self._rope.base()

    def go_back(self) -> bool:
        """Be again where the newest whole checkpoint is; False, and nothing changes, where there is none."""
        self.call_hook("before_rollback")
        work_dir, world = Path(self.work_dir), self.strategy.world
        own = list_steps(work_dir)[::-1] if world.is_first else []
        candidates = from_first([*own, *(path for path in self.checkpoints if path not in own)], world)
        if not candidates:
            return False
        load_snapshot(self, first_whole(candidates, work_dir, world))
        self.call_hook("after_rollback")
        return True

    @cached_property
    def hf_files(self) -> dict[str, bytes]:
        """What a checkpoint has of a Hugging Face directory, by name; the same in all of them of a stage."""
        return hf_files(self.model.get_submodule("llm"), self.record)

    def build_visualizer(self, visualizer: None = None) -> None:
        """None: curves and TensorBoard are hooks of ours."""

    def dump_config(self) -> None:
        """Nothing: train.py has written the config as its author wrote it."""

    def _log_env(self) -> None:
        """Nothing: collecting it calls compilers and takes seconds."""
