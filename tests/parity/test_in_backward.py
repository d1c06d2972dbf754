"""The optimizer in backward makes the step that it makes behind it, bit for bit, and holds one gradient at a time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_frugal_step import MODELS, make_llm, save, with_lora
from test_one_gradient import StepOfDocuments, mesh_of
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel

from tuner.dataset.sampler import StepSampler
from tuner.engine.fsdp import FullyShard
from tuner.engine.optimizer import adamw
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.stepping import Stepping
from tuner.engine.world import World
from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.plan.live import LiveBytes

NUM_STEPS = 3
ADAMW = {"type": AdamW, "lr": 1e-2, "weight_decay": 0.1}
SCHEDULE = WarmupCosine(warmup_ratio=0.3, min_lr_ratio=0.1)
Found = dict[str, torch.Tensor]


def all_at_once(llm: PreTrainedModel) -> PreTrainedModel:
    """Whatever computes parts of a layer again, in backward, from weights that others have moved by then."""
    save(llm, checkpointing="attention", tiles=150, offload=True)
    return llm


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    **{model: (partial(make_llm, model, torch.float32), ADAMW, "fp32") for model in MODELS},  # tied ones, too
    "bf16": (partial(make_llm, "llama, tied", torch.float32), ADAMW, "bf16"),
    "layers again, tiles": (lambda: all_at_once(make_llm("internlm2, tied", torch.float32)), ADAMW, "fp32"),
    "the same in bf16": (lambda: all_at_once(make_llm("internlm2", torch.float32)), ADAMW, "bf16"),
    "momentum": (partial(make_llm, "llama", torch.float32), {"type": SGD, "lr": 0.1, "momentum": 0.9}, "fp32"),
    "adapter": (lambda: all_at_once(with_lora(0.1)), ADAMW, "fp32"),
}


def prepared(strategy: Stepping, llm: PreTrainedModel, in_backward: bool, optimizer: dict[str, Any]) -> Stepping:
    wrapper = {"optimizer": optimizer, "in_backward": in_backward}
    strategy.prepare(SFT(llm), optim_wrapper=wrapper, param_scheduler=SCHEDULE, num_steps=NUM_STEPS)
    return strategy


def take_steps(strategy: Stepping, steps: range) -> Found:
    """Each over documents of its own, one pack a rank; losses, norms, weights and the optimizer's state."""
    found: Found = {}
    world = strategy.world
    for step in steps:
        dataset = StepOfDocuments("every token", world.size)
        dataset.documents = [*dataset.documents[step:], *dataset.documents[:step]]
        sampler = StepSampler(dataset, num_accumulation_steps=1, rank=world.rank, num_ranks=world.size)
        torch.manual_seed(step)
        result = strategy.train_step(dataset.batches(sampler.plan(0), 1))
        found |= {f"loss {step}": torch.tensor(result.loss), f"norm {step}": torch.tensor(result.grad_norm)}
    for kind, tensors in strategy.state_tensors().items():
        found |= {f"{kind} {name}": tensor.detach().clone() for name, tensor in tensors}
    return found


def differing(one: Found, other: Found) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_are_those_of_an_optimizer_behind_backward(case: str) -> None:
    make, optimizer, precision = CASES[case]
    plain, within = (
        prepared(Replicated(precision=precision, device="cpu"), make(), in_backward, optimizer)
        for in_backward in (False, True)
    )
    expected, got = take_steps(plain, range(NUM_STEPS)), take_steps(within, range(NUM_STEPS))
    assert differing(got, expected) == []
    assert all(parameter.grad is None for parameter in within.parameters())


def test_moments_of_eight_bits_are_the_same_too() -> None:
    pytest.importorskip("bitsandbytes")
    runs = [
        prepared(Replicated(precision="fp32", device="cpu"), make_llm("llama", torch.float32), in_backward,
                 {"type": adamw, "kind": "adamw8bit", "lr": 1e-2})
        for in_backward in (False, True)
    ]  # fmt: skip
    plain, within = (take_steps(strategy, range(NUM_STEPS)) for strategy in runs)
    assert differing(within, plain) == []


def test_checkpoints_are_the_same_and_either_way_goes_on_from_them_bit_for_bit(tmp_path: Path) -> None:
    make = partial(make_llm, "llama, tied", torch.float32)
    start, *others = (
        prepared(Replicated(precision="fp32", device="cpu"), make(), in_backward, ADAMW)
        for in_backward in (True, True, False, True)
    )
    take_steps(start, range(2))
    state = start.save_checkpoint(tmp_path)
    whole_run = take_steps(others.pop(), range(NUM_STEPS))
    for strategy in others:
        strategy.resume(tmp_path, state)
        resumed = take_steps(strategy, range(2, NUM_STEPS))
        assert differing(resumed, {name: whole_run[name] for name in resumed}) == []


def peak_of_a_step(in_backward: bool) -> int:
    """Bytes of living tensors beside weights and moments."""
    llm = make_llm("internlm2", torch.float32)
    strategy = prepared(Replicated(precision="fp32", device="cpu"), llm, in_backward, ADAMW)
    take_steps(strategy, range(1))
    counter = LiveBytes()
    moments = [value for state in strategy.optimizer.state.values() for value in state.values()]
    counter.ignore([*llm.parameters(), *moments])
    dataset = StepOfDocuments("every token", 1)
    dataset.documents = dataset.documents[2:3]  # one token: what there is are gradients
    dataset.num_loss_tokens[:] = 1
    batches = dataset.batches(StepSampler(dataset, num_accumulation_steps=1).plan(0), 1)
    with counter:
        strategy.train_step(batches)
    return counter.peak


def test_no_more_than_a_gradient_is_alive_at_a_time() -> None:
    sizes = [parameter.nbytes for parameter in make_llm("internlm2", torch.float32).parameters()]
    behind, within = (peak_of_a_step(in_backward) for in_backward in (False, True))
    assert behind > sum(sizes)
    # the head's is made with the loss, and the largest of a layer while backward is there
    assert behind - within > sum(sizes) - 2 * max(sizes)
    assert within < 3 * max(sizes)


def test_an_optimizer_that_may_look_at_several_tensors_and_several_packs_are_refused() -> None:
    llm = make_llm("llama", torch.float32)
    with pytest.raises(UserError, match="Adafactor is not known to make the same step"):
        prepared(Replicated(precision="fp32", device="cpu"), llm, True, {"type": torch.optim.Adafactor, "lr": 1.0})
    strategy = prepared(Replicated(precision="fp32", device="cpu"), make_llm("llama", torch.float32), True, ADAMW)
    before = [parameter.detach().clone() for parameter in strategy.parameters()]
    dataset = StepOfDocuments("every token", 2)
    with pytest.raises(UserError, match="A step has 2 packs on a rank"):
        strategy.train_step(dataset.batches(StepSampler(dataset, num_accumulation_steps=2).plan(0), 1))
    assert all(torch.equal(*pair) for pair in zip(before, strategy.parameters()))


def spread(kind: str, in_backward: bool) -> Found:
    """Steps of two ranks."""
    rank = dist.get_rank()
    strategy: Stepping = Replicated(precision="fp32", device="cpu")
    if kind == "fsdp":
        strategy = FullyShard(precision="fp32", device="cpu")
    strategy.place(World(rank, 2, rank, 2), mesh_of(strategy.degrees))
    llm = all_at_once(make_llm("llama, tied", torch.float32))
    return take_steps(prepared(strategy, llm, in_backward, ADAMW), range(NUM_STEPS))


def without_a_gradient() -> str:
    """What a rank says of a weight that nothing uses: others may have a gradient of it to sum."""
    rank = dist.get_rank()
    strategy = Replicated(precision="fp32", device="cpu")
    strategy.place(World(rank, 2, rank, 2), mesh_of(strategy.degrees))
    llm = make_llm("llama", torch.float32)
    llm.unused = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError) as caught:
        take_steps(prepared(strategy, llm, True, ADAMW), range(1))
    return str(caught.value)


def look_at_two() -> dict[str, Any]:
    runs = {kind: [spread(kind, choice) for choice in (False, True)] for kind in ("ddp", "fsdp")}
    return {"unused": without_a_gradient(), **{kind: differing(*both) for kind, both in runs.items()}}


def test_two_ranks_that_hold_all_or_rows_make_their_steps_bit_for_bit() -> None:
    for rank in run_on_ranks(2, look_at_two):
        assert rank["ddp"] == rank["fsdp"] == []
        assert "unused.weight got no gradient in this step" in rank["unused"]
