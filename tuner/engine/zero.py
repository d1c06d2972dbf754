"""ZeRO: optimizer state, gradients and weights are cut over all ranks, by DeepSpeed's engine."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.engine.build_locks import wait_for_builds
from tuner.engine.deepspeed_package import build_engine, join_alone, known_keys, load_deepspeed
from tuner.engine.in_backward import is_wanted, obstacles, refuse
from tuner.engine.optimizer import build_optimizer, is_state
from tuner.engine.precision import PRECISIONS
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import Batch, Strategy, compare_weights, read_max_norm, schedule_rates
from tuner.engine.tensor_files import OPTIMIZER, WEIGHTS, TensorFiles
from tuner.engine.world import World, read_world
from tuner.engine.zero_config import ModelSizes, Settings, check_ranks, zero_config, zero_stage
from tuner.engine.zero_hold import GatheredOnCall, take_weights
from tuner.engine.zero_tensors import STEP, Flat, Partitioned, SpreadTensors
from tuner.errors import UserError
from tuner.model.adapter import kept_parameters, set_compute_dtype
from tuner.model.hollow import Hold


class Zero(Strategy):
    """The model computes in `precision`, without autocast; the optimizer's weights are fp32, a part on each rank.

    Args:
        config: a name of `tuner.engine.zero_config.PRESETS`, or the path of a JSON file for DeepSpeed.
        offload_directory: where "zero3_offload" keeps weights and optimizer state; None is the CPU's memory.
        hpz_partition_size: ranks that share a second copy of the weights under "zero3_hpz"; None is those of a node.
        others: as `Strategy` takes them.
    """

    def __init__(
        self,
        config: str,
        *,
        offload_directory: str | None = None,
        hpz_partition_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.config = config
        self.offload_directory = offload_directory
        self.hpz_partition_size = hpz_partition_size
        self.stage = zero_stage(config)
        self._rounded: dict[str, Tensor] = {}  # this rank's fp32 parts of weights that their dtype rounded
        self._calls: GatheredOnCall | None = None
        check_ranks(config, self.settings(read_world(), None))  # now, before data are prepared
        load_deepspeed()

    def holder(self) -> Hold | None:
        """Under ZeRO-3 no rank builds the model whole."""
        return self.hold if self.stage == 3 else None

    def hold(self, llm: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a model on the meta device one by one; each rank keeps its parts."""
        join_alone(self.world, self.device)
        config = zero_config(self.config, self.settings(self.world, "unknown"), known_keys(), ModelSizes.of(llm))
        wait_for_builds(config)
        dtype = PRECISIONS[self.precision]
        partitioner = load_deepspeed().zero.Init(config_dict_or_path=config, dtype=dtype)
        self._rounded = take_weights(llm, weights, partitioner, dtype, self.world)
        self._calls = GatheredOnCall(llm)

    def prepare(
        self,
        model: nn.Module,
        *,
        optim_wrapper: Mapping[str, Any],
        param_scheduler: WarmupCosine,
        num_steps: int,
    ) -> nn.Module:
        """Hand the model and its optimizer to DeepSpeed; the schedule spans `num_steps`."""
        if is_wanted(optim_wrapper):
            refuse(obstacles(deepspeed=self.config))
        join_alone(self.world, self.device)
        self.model = model.train()
        self.num_steps = num_steps
        self.schedule = param_scheduler
        llm = model.get_submodule("llm")
        if self.stage < 3 and self.precision != "fp32":
            set_compute_dtype(llm, PRECISIONS[self.precision])
        optimizer = build_optimizer(llm, optim_wrapper)
        settings = self.settings(self.world, read_max_norm(optim_wrapper))
        config = zero_config(self.config, settings, known_keys(), ModelSizes.of(llm))
        wait_for_builds(config)
        if self._calls is not None:
            self._calls.remove()
        exact = {} if self._calls is not None else rounded_weights(llm, PRECISIONS[self.precision])
        self.engine = build_engine(model, optimizer, config)
        self.optimizer = self.engine.optimizer
        self.tensors: SpreadTensors = (Flat if self.stage < 3 else Partitioned)(self.optimizer)
        self._restore_rounded(exact)
        # a loss is this rank's part of a sum; stages 1 and 2 can sum gradients, stage 3 divides them by the ranks
        self.loss_factor = 1 if self.stage < 3 else self.world.size
        self._prepared = True
        return self.model

    def settings(self, world: World, max_grad_norm: float | Literal["unknown"] | None) -> Settings:
        """What a JSON file may not contradict."""
        return Settings(
            precision=self.precision,
            max_grad_norm=max_grad_norm,
            world_size=world.size,
            local_size=world.local_size,
            offload_directory=self.offload_directory,
            hpz_partition_size=self.hpz_partition_size,
            has_cuda=self.device.type == "cuda",
        )

    def autocast(self) -> AbstractContextManager:
        """Nothing: the weights that compute have the dtype already."""
        return nullcontext()

    def set_learning_rates(self) -> float:
        """Give every group of parameters the rate of this step; returns that of the first."""
        return schedule_rates(self.optimizer, self.schedule.factor(self.step, self.num_steps))

    def backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Add a micro-batch's gradient; with the last one the ranks' gradients are summed."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        loss = self.engine(**batch)["loss"]
        self.engine.backward(loss * self.loss_factor, scale_wrt_gas=False)
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        """() L2 norm of the whole gradient, infinite where DeepSpeed found a NaN or an infinity in any part of it."""
        groups = [self.optimizer.scaled_global_norm()] if self.stage < 3 else self.optimizer._get_norm_groups()
        norms = torch.stack([torch.as_tensor(norm, device=self.device, dtype=torch.float32) for norm in groups])
        norm = torch.linalg.vector_norm(norms) / self.optimizer.loss_scale
        return torch.where((norms < 0).any(), torch.inf, norm)  # negative is its mark for such a part

    def update(self, norm: float) -> None:
        """Clip by the norm, let the optimizer step, and drop the gradient."""
        self.engine.step()

    def drop_gradient(self) -> None:
        """Forget the gradient of this step."""
        self.optimizer.zero_grad(set_to_none=True)
        for kept in (self.optimizer.averaged_gradients, getattr(self.optimizer, "all_grad_tensors", {})):
            kept.update(dict.fromkeys(kept))  # others refer to the same dict
        if self.tensors.offloaded:
            self.optimizer.reset_cpu_buffers()

    def can_scale_down(self) -> bool:
        """Whether a gradient that overflowed may be the loss scale's doing."""
        scaler = self.optimizer.loss_scaler
        return scaler.dynamic and scaler.cur_scale > scaler.min_scale

    def state_tensors(self) -> dict[str, Iterable[tuple[str, Tensor]]]:
        """What a checkpoint holds, by kind: each tensor whole, gathered when it is asked for."""
        return {WEIGHTS: self._weights(), OPTIMIZER: self._optimizer_tensors()}

    def state_counters(self) -> dict[str, Any]:
        """What else `resume` needs, for JSON."""
        return {"step": self.step, "num_steps": self.num_steps, "scaler": scaler_state(self.optimizer.loss_scaler)}

    def load_checkpoint(self, filename: Path) -> None:
        """Read the weights alone from the directory `filename`."""
        saved, parameters = TensorFiles(filename, WEIGHTS), self._kept()
        compare_weights(saved, {name: self.tensors.shape(weight) for name, weight in parameters.items()}, filename)
        for name, parameter in parameters.items():
            self.tensors.set_part(parameter, None, saved[name])
        self.tensors.publish()

    def resume(self, filename: Path, state: Mapping[str, Any]) -> None:
        """Read what `state_tensors` and `state_counters` gave."""
        self.load_checkpoint(filename)
        saved = TensorFiles(filename, OPTIMIZER)
        parameters = {name: parameter for name, parameter in self._parameters().items() if parameter.requires_grad}
        keys = state_keys(saved, parameters)
        steps = {float(saved[name]) for name in saved if name.rpartition(".")[2] == STEP}
        if len(steps) > 1:
            raise UserError(f"{filename}: parameters are at different steps {sorted(steps)}, which ZeRO cannot hold.")
        self.tensors.make_state(keys, torch.tensor(steps.pop()) if steps else None)
        for name, parameter in parameters.items():
            for key in keys:
                self.tensors.set_part(parameter, key, saved[f"{name}.{key}"])
        self.step = state["step"]
        if self.optimizer.loss_scaler.dynamic and state["scaler"]:
            restore_scaler(self.optimizer.loss_scaler, state["scaler"])

    def _restore_rounded(self, exact: Mapping[str, Tensor]) -> None:
        """Begin from the weights as they were read: DeepSpeed makes its fp32 ones from those that compute."""
        parameters = self._parameters()
        for name, whole in exact.items():
            self.tensors.set_part(parameters[name], None, whole)
        for name, values in self._rounded.items():
            assert isinstance(self.tensors, Partitioned)
            self.tensors.set_own(parameters[name], None, values)
        self._rounded = {}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.get_submodule("llm").named_parameters())

    def _kept(self) -> dict[str, nn.Parameter]:
        return dict(kept_parameters(self.model.get_submodule("llm")))

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensors.whole(parameter)) for name, parameter in self._kept().items())

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        keys, step = self.tensors.keys(), self.tensors.step()
        trained = [(name, parameter) for name, parameter in self._parameters().items() if parameter.requires_grad]
        for name, parameter in trained:
            for key in keys:
                yield f"{name}.{key}", self.tensors.whole(parameter, key)
            if step is not None:
                yield f"{name}.{STEP}", step.clone()


def rounded_weights(llm: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The trained weights that `dtype` cannot hold as they are, by name; the tensors themselves, not copies."""
    trained = {name: weight.data for name, weight in llm.named_parameters() if weight.requires_grad}
    return {name: data for name, data in trained.items() if not torch.equal(data, data.to(dtype).to(data.dtype))}


def state_keys(saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of an optimizer's states besides `step`, which all parameters must have.

    Raises:
        UserError: the checkpoint knows other parameters than the model, or other states of some.
    """
    keys = {key.removeprefix(f"{name}.") for name in parameters for key in saved if is_state(key, f"{name}.")}
    expected = {f"{name}.{key}" for name in parameters for key in keys}
    if different := sorted(expected ^ set(saved)):
        raise UserError(
            f"The checkpoint's optimizer has other parameters or states than this model's: {', '.join(different[:3])}."
        )
    return sorted(keys - {STEP})


def scaler_state(scaler: Any) -> dict[str, Any]:
    """A loss scale as torch's GradScaler writes it, so that other strategies can go on from it; {} where none is."""
    if not scaler.dynamic:
        return {}
    return {
        "scale": float(scaler.cur_scale),
        "growth_factor": scaler.scale_factor,
        "backoff_factor": 1 / scaler.scale_factor,
        "growth_interval": scaler.scale_window,
        "_growth_tracker": scaler.cur_iter - scaler.last_overflow_iter - 1,
    }


def restore_scaler(scaler: Any, state: Mapping[str, Any]) -> None:
    """The inverse of `scaler_state`."""
    scaler.cur_scale = state["scale"]
    scaler.last_overflow_iter = -1
    scaler.cur_iter = state["_growth_tracker"]
