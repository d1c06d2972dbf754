"""Packing and accumulation change nothing: InternLM2 in float64, through the real batches, loss and strategy."""

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW

from tuner.dataset.collate import collate
from tuner.dataset.tokenize import Document
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.method.sft import SFT
from tuner.model.build import AutoModelForCausalLM
from tuner.model.internlm2.configuration import InternLM2Config

LENGTHS = (2, 9, 31, 5, 17, 3, 12, 8)
PACKINGS = {
    "one pack": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "each alone": [[index] for index in range(8)],
    "three packs, another order": [[7, 2], [0], [5, 1, 3, 6, 4]],
}


def documents() -> list[Document]:
    """Only the ends of the documents are trained, in the second all of it, in the third one token."""
    generator = np.random.default_rng(0)
    made = []
    for index, length in enumerate(LENGTHS):
        trained = np.zeros(length, np.bool_)
        trained[{1: 0, 2: -1}.get(index, length // 2) :] = True
        made.append(Document(generator.integers(0, 64, length).astype(np.uint32), trained))
    return made


def weighted() -> list[Document]:
    """The same documents; their labels' weights differ from token to token, but for two documents without any."""
    generator = np.random.default_rng(1)
    given = [generator.uniform(0.1, 3, length).astype(np.float32) for length in LENGTHS]
    return [d if i in (0, 5) else d._replace(weights=given[i]) for i, d in enumerate(documents())]


def sum_of_weights(document: Document) -> float:
    weights = np.ones(len(document.ids)) if document.weights is None else document.weights.astype(np.float64)
    return float(weights[1:][document.trained[1:]].sum())


def step(
    packing: str, optimizer: dict, num_steps: int = 1, made: list[Document] | None = None
) -> tuple[dict, dict, object]:
    """Weights before and after, and the last step's numbers."""
    config = InternLM2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="tuner_sdpa").double()
    before = {name: weight.detach().clone() for name, weight in llm.named_parameters()}
    strategy = Replicated(precision="fp32", device="cpu")
    wrapper = {"optimizer": optimizer, "clip_grad": {"max_norm": 0.5 if optimizer["type"] is AdamW else None}}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(SFT(llm), optim_wrapper=wrapper, param_scheduler=schedule, num_steps=100)
    plain = sum(int(document.trained[1:].sum()) for document in documents())
    total = plain if made is None else sum(map(sum_of_weights, made))
    made = made or documents()
    batches = [collate([made[index] for index in pack], total) for pack in PACKINGS[packing]]
    results = [strategy.train_step(batches) for _ in range(num_steps)]
    return before, {name: weight.detach() for name, weight in llm.named_parameters()}, results[-1]


@pytest.mark.parametrize("packing", list(PACKINGS)[:2])
def test_every_parameters_gradient_is_the_same_in_float64(packing):
    """SGD with a learning rate of 1 and no clipping: the change of the weights is the gradient."""
    before, after, result = step(packing, {"type": SGD, "lr": 1.0})
    _, other, expected = step("three packs, another order", {"type": SGD, "lr": 1.0})
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
    for name, weight in after.items():
        gradient, reference = before[name] - weight, before[name] - other[name]
        assert reference.norm() > 1e-8, name
        assert (gradient - reference).norm() < 1e-12 * reference.norm() + 1e-15, name


@pytest.mark.parametrize("packing", list(PACKINGS)[:2])
def test_with_loss_weights_too_every_gradient_is_the_same_and_not_the_plain_one(packing):
    before, after, result = step(packing, {"type": SGD, "lr": 1.0}, made=weighted())
    _, other, expected = step("three packs, another order", {"type": SGD, "lr": 1.0}, made=weighted())
    _, plain, unweighted = step(packing, {"type": SGD, "lr": 1.0})
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    assert result.loss != pytest.approx(unweighted.loss, rel=1e-3)
    assert result.num_loss_tokens == unweighted.num_loss_tokens, "the number of labels, which is what the step costs"
    for name, weight in after.items():
        gradient, reference = before[name] - weight, before[name] - other[name]
        assert (gradient - reference).norm() < 1e-12 * reference.norm() + 1e-15, name
        assert (gradient - (before[name] - plain[name])).norm() > 1e-3 * reference.norm(), name


@pytest.mark.parametrize("packing", list(PACKINGS)[:2])
def test_the_weights_after_three_clipped_adamw_steps_are_the_same_in_float64(packing):
    optimizer = {"type": AdamW, "lr": 1e-2, "weight_decay": 0.1}
    _, after, _ = step(packing, optimizer, 3)
    before, other, result = step("three packs, another order", optimizer, 3)
    assert result.grad_norm > 0.5
    for name, weight in after.items():
        assert (other[name] - before[name]).norm() > 1e-4, name
        torch.testing.assert_close(weight, other[name], rtol=1e-9, atol=1e-10, msg=name)
