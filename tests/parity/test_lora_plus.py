"""LoRA+ moves B so many times as fast as A, and what an adapter lies on does not move at all."""

from typing import Any

import pytest
import torch
from test_one_gradient import SIZES, StepOfDocuments
from torch.optim import SGD, AdamW
from transformers import LlamaConfig

from tuner.dataset.sampler import StepSampler
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.method.sft import SFT
from tuner.model.adapter import LoRA
from tuner.model.build import build_llm

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(place)
    return str(place)


def steps(model_path: str, number: int, **optim_wrapper: Any) -> tuple[Weights, Weights, Weights]:
    """All weights before and after so many steps, and the gradients of the first."""
    llm = build_llm(model_path, weights="random", attention="sdpa", adapter=LoRA(rank=4, alpha=8))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)  # where it is zero, A has no gradient
    before = {name: weight.detach().clone() for name, weight in llm.named_parameters()}
    strategy, gradients = Replicated(precision="fp32", device="cpu"), {}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(SFT(llm), optim_wrapper=optim_wrapper, param_scheduler=schedule, num_steps=number)

    def note(*_: Any) -> None:
        for name, weight in llm.named_parameters():
            if weight.grad is not None:
                gradients.setdefault(name, weight.grad.clone())

    strategy.optimizer.register_step_pre_hook(note)
    dataset = StepOfDocuments("every token", 2)
    plan = StepSampler(dataset, num_accumulation_steps=2).plan(0)
    for _ in range(number):
        strategy.train_step(dataset.batches(plan, 1))
    return before, {name: weight.detach().clone() for name, weight in llm.named_parameters()}, gradients


def test_b_learns_so_many_times_as_fast(model_path: str):
    before, after, gradients = steps(model_path, 1, optimizer={"type": SGD, "lr": 0.25}, lora_plus_ratio=16)
    assert {"lora_A" in name for name in gradients} == {True, False}
    for name, gradient in gradients.items():
        rate = 4.0 if "lora_B" in name else 0.25
        torch.testing.assert_close(before[name] - after[name], rate * gradient, rtol=1e-4, atol=1e-6)


def test_the_base_keeps_every_bit(model_path: str):
    before, after, gradients = steps(model_path, 3, optimizer={"type": AdamW, "lr": 0.1, "weight_decay": 0.5})
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == set(gradients) == {name for name in before if "lora_" in name}
