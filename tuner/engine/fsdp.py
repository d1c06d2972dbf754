"""Every rank holds some rows of each weight: torch's FSDP2 makes a layer whole only while it computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from tuner.engine.fsdp_hold import LentWeights
from tuner.engine.precision import PRECISIONS
from tuner.engine.stepping import Stepping
from tuner.engine.strategy import Batch
from tuner.engine.world import World
from tuner.errors import UserError
from tuner.model.hollow import Hold
from tuner.model.tiles import decoder_layers

SHARDINGS = ("full", "hybrid")
ACCUMULATE = ("whole", "rows")
GATHER = "gather_what_no_layer_has"
"""a method of the root that only FSDP2's hooks around it do anything in: unlike `unshard`, it may come first of all"""
REPLICATE, SHARD = "replicate", "shard"  # dimensions of the device mesh


class FullyShard(Stepping):
    """Weights, gradients and optimizer state in rows over ranks: fp32 as in `Replicated`, computed in `precision`.

    A decoder layer is whole during its own forward and backward, the rest (embedding, last norm, head) during those
    of the method.
    """

    def __init__(
        self,
        *,
        fsdp: Literal["full", "hybrid"] = "full",
        precision: Literal["bf16", "fp16", "fp32"] = "bf16",
        sequence_parallel_size: int | Mapping[str, int] = 1,
        accumulate: Literal["whole", "rows"] = "rows",
        device: str = "auto",
    ) -> None:
        """How weights and gradients are spread; the rest as `Strategy` takes it.

        Args:
            fsdp: "full" cuts weights over all ranks; "hybrid" over those of a node, and nodes hold copies.
            accumulate: how a step's micro-batches add up. "rows": each is exchanged at once, and ranks hold their rows
                of the sum; in "hybrid" only within a node, nodes exchange once. "whole": each rank adds its own up and
                they are exchanged once, for which it holds a whole gradient in fp32 (28 GB of a 7B).
        """
        super().__init__(precision=precision, sequence_parallel_size=sequence_parallel_size, device=device)
        for name, value, known in (("fsdp", fsdp, SHARDINGS), ("accumulate", accumulate, ACCUMULATE)):
            if value not in known:
                raise UserError(f"{name}={value!r} is unknown. Choose one of {', '.join(known)}.")
        self.fsdp = fsdp
        self.accumulate = accumulate
        self._lent: LentWeights | None = None

    def holder(self) -> Hold:
        """No rank builds the model whole."""
        return self.hold

    def hold(self, llm: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
        """Lend a model on the meta device its weights, layer by layer, until `spread` reads each rank's rows."""
        self._lent = LentWeights(llm, decoder_layers(llm), weights, device=self.device, world=self.world)

    def spread(self, model: nn.Module) -> nn.Module:
        """Cut every weight by rows: of a model that was lent its weights, no rank holds more than one of them whole."""
        self._shards = build_shards(self.fsdp, self.world, self.device)
        policy = MixedPrecisionPolicy()
        if self.precision != "fp32":  # inputs stay: the residual stream is fp32 under autocast, as in Replicated
            policy = MixedPrecisionPolicy(PRECISIONS[self.precision], torch.float32, cast_forward_inputs=False)
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.end()
        for layer in decoder_layers(model.get_submodule("llm")):
            fully_shard(layer, mesh=self._shards, mp_policy=policy)
        # The root is the method, not its llm: what it does with the head's weight beside the llm's forward lies
        # between the root's hooks, where that weight is whole and its gradient is waited for.
        self._root: FSDPModule = fully_shard(model, mesh=self._shards)
        if lent is not None:
            lent.fill()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum: losses of ranks are parts of one
                module.set_force_sum_reduction_for_comms(True)
        setattr(model, GATHER, do_nothing)
        register_fsdp_forward_method(model, GATHER)
        return model

    def backward(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Add a micro-batch's gradient; with the last one those of all ranks are summed and cut by rows."""
        self._root.set_requires_gradient_sync(is_last or self.accumulate == "rows")
        self._root.set_requires_all_reduce(is_last)
        with self.autocast():
            loss = self.model(**batch)["loss"]
        self.run_backward(loss)
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        """() fp64, the L2 norm of the whole gradient, from the rows of all ranks in one exchange."""
        square = self.own_norm().to(self.device, torch.float64) ** 2
        dist.all_reduce(square, group=self._shards.get_group(SHARD))
        return square.sqrt()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Where the llm may generate: all ranks at once, with what belongs to no layer whole all the time."""
        try:
            with torch.no_grad():
                getattr(self.model, GATHER)()
            with super().generation():
                yield
        finally:
            self._root.reshard()


def do_nothing() -> None:
    """For the sake of the hooks around it."""


def build_shards(fsdp: str, world: World, device: torch.device) -> DeviceMesh:
    """Which ranks hold the rows of one copy (the mesh's last dimension), and which the same rows of other copies.

    Raises:
        UserError: one process, or nodes whose processes cannot hold a copy each.
    """
    refuse_one_process(fsdp, world)
    if fsdp == "full":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=(SHARD,))
    num_nodes, rest = divmod(world.size, world.local_size)
    if rest or world.rank % world.local_size != world.local_rank:
        raise UserError(
            f"fsdp='hybrid' keeps a copy on each node, but {world.size} ranks are not equally many on each "
            f"({world.local_size} on that of rank {world.rank}). Start as many on every node, or use fsdp='full'."
        )
    if world.local_size == 1:
        raise UserError("fsdp='hybrid' cuts the weights over the processes of a node, which has only one. Use 'full'.")
    if num_nodes == 1 and world.is_first:
        print("fsdp='hybrid' on one node is the same as 'full': there is no second node for a copy.", flush=True)
    return init_device_mesh(device.type, (num_nodes, world.local_size), mesh_dim_names=(REPLICATE, SHARD))


def refuse_one_process(fsdp: str, world: World) -> None:
    """UserError where there is nobody to cut weights with."""
    if world.size == 1:
        raise UserError(f"fsdp={fsdp!r} cuts weights over processes: start several (--nproc 8), or set it to None.")
