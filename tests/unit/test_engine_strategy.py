"""One optimizer step: the same however the documents are packed, and never with a number that is not finite."""

import copy

import pytest
import torch
from stub_training import Documents, SeparateSFT, tiny_llm
from torch.optim import SGD, AdamW

from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import NonFiniteStepError
from tuner.errors import UserError

INFINITE = 10**9  # so many steps that the schedule stays at its peak
NO_SCHEDULE = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)


def prepared(llm, optimizer, *, precision="fp32", max_norm=None, schedule=NO_SCHEDULE, num_steps=INFINITE):
    strategy = Replicated(precision=precision, device="cpu")
    wrapper = {"optimizer": optimizer, "clip_grad": {"max_norm": max_norm}}
    strategy.prepare(SeparateSFT(llm), optim_wrapper=wrapper, param_scheduler=schedule, num_steps=num_steps)
    return strategy


def batches_of(packings, count=12):
    documents = Documents(count)
    total = sum(documents.num_loss_tokens)
    return [documents.batch(pack, total) for pack in packings]


PACKINGS = {
    "one big batch": [list(range(12))],
    "one document each": [[index] for index in range(12)],
    "three micro-batches": [[0, 1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]],
    "another order": [[11, 0, 5], [7, 3], [1, 2, 4, 6, 8, 9, 10]],
}


@pytest.mark.parametrize("packing", list(PACKINGS)[1:])
def test_any_packing_and_accumulation_has_the_gradients_of_one_big_batch(packing):
    """SGD with a learning rate of 1 and no clipping writes the gradient itself into the weights."""

    def gradients(name):
        llm = tiny_llm().double()
        before = {key: value.clone() for key, value in llm.state_dict().items()}
        result = prepared(llm, {"type": SGD, "lr": 1.0}).train_step(batches_of(PACKINGS[name]))
        return result, {key: before[key] - value for key, value in llm.named_parameters()}

    reference, expected = gradients("one big batch")
    result, actual = gradients(packing)
    assert result.loss == pytest.approx(reference.loss, rel=1e-12)
    assert result.num_loss_tokens == reference.num_loss_tokens
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(actual[key], gradient, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("packing", list(PACKINGS)[1:])
def test_any_packing_has_the_weights_of_one_big_batch_after_clipped_adamw_steps(packing):
    def train(name):
        strategy = prepared(tiny_llm().double(), {"type": AdamW, "lr": 1e-2}, max_norm=0.1)
        for _ in range(3):
            result = strategy.train_step(batches_of(PACKINGS[name]))
        return result, strategy.model.state_dict()

    reference, expected = train("one big batch")
    result, actual = train(packing)
    assert result.grad_norm == pytest.approx(reference.grad_norm, rel=1e-12)
    assert reference.grad_norm > 0.1  # clipping was at work
    for key, weight in expected.items():
        torch.testing.assert_close(actual[key], weight, rtol=1e-9, atol=1e-10, msg=key)


def test_the_gradient_is_divided_by_the_tokens_of_the_step_not_by_micro_batches():
    """Independent of the strategy: the definition of the loss, differentiated by hand-made accumulation."""
    llm = tiny_llm().double()
    reference = copy.deepcopy(llm)
    SeparateSFT(reference)(**batches_of(PACKINGS["one big batch"])[0])["loss"].backward()
    before = {key: value.clone() for key, value in llm.named_parameters()}
    prepared(llm, {"type": SGD, "lr": 1.0}).train_step(batches_of(PACKINGS["three micro-batches"]))
    for key, parameter in reference.named_parameters():
        change = before[key] - dict(llm.named_parameters())[key]
        torch.testing.assert_close(change, parameter.grad, rtol=1e-12, atol=1e-14, msg=key)


def test_norms_and_biases_are_not_decayed_and_everything_else_is():
    llm = tiny_llm()
    strategy = prepared(llm, {"type": AdamW, "lr": 1e-3, "weight_decay": 0.1})
    decay = {name: group["weight_decay"] for group in strategy.optimizer.param_groups for name in group["names"]}
    assert set(decay) == {name for name, _ in llm.named_parameters()}
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


def test_the_update_is_clipped_and_the_reported_norm_is_that_before_clipping():
    llm = tiny_llm()
    before = [parameter.detach().clone() for parameter in llm.parameters()]
    result = prepared(llm, {"type": SGD, "lr": 1.0}, max_norm=0.01).train_step(batches_of([[0, 1, 2]]))
    change = torch.stack([(old - new).norm() for old, new in zip(before, llm.parameters())]).norm()
    assert change.item() == pytest.approx(0.01, rel=1e-3)
    assert result.grad_norm > 0.1


def test_the_reported_learning_rate_is_the_one_that_the_step_used():
    schedule = WarmupCosine(warmup_ratio=0.5, min_lr_ratio=0.1)
    strategy = prepared(tiny_llm(), {"type": SGD, "lr": 0.5}, schedule=schedule, num_steps=8)
    used = []
    strategy.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    reported = [strategy.train_step(batches_of([[0]])).lr for _ in range(8)]
    assert reported == used == [0.5 * schedule.factor(step, 8) for step in range(8)]
    assert len(set(used)) > 4


def test_a_step_counts_its_tokens():
    result = prepared(tiny_llm(), {"type": SGD, "lr": 0.1}).train_step(batches_of(PACKINGS["three micro-batches"]))
    lengths = [len(tokens) for tokens in Documents(12).tokens]
    assert result.num_tokens == sum(lengths)
    assert result.sum_squared_lengths == sum(length**2 for length in lengths)
    assert result.num_loss_tokens == sum((length) // 2 for length in lengths)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(poison):
    llm = tiny_llm()
    strategy = prepared(llm, {"type": AdamW, "lr": 1e-2})
    strategy.train_step(batches_of([[0]]))
    with torch.no_grad():
        llm.model.norm.weight[0] = poison
    before = {key: value.clone() for key, value in llm.state_dict().items()}
    with pytest.raises(NonFiniteStepError, match="loss"):
        strategy.train_step(batches_of([[0], [1]]))
    assert strategy.step == 1
    for key, value in llm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_forward_runs_in_the_precision_and_the_weights_stay_fp32(precision, dtype):
    llm, seen = tiny_llm(), []
    llm.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    strategy = prepared(llm, {"type": AdamW, "lr": 1e-2}, precision=precision)
    losses = [strategy.train_step(batches_of([[0, 1, 2]])).loss for _ in range(40)]
    assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.float32}
    assert losses[-1] < 0.7 * losses[0]


def test_fp16_skips_a_step_whose_gradient_overflows_and_halves_the_loss_scale():
    llm = tiny_llm()
    strategy = prepared(llm, {"type": AdamW, "lr": 1e-2}, precision="fp16")
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=True)
    before = {key: value.clone() for key, value in llm.state_dict().items()}
    result = strategy.train_step(batches_of([[0, 1]]))
    assert result.skipped
    assert strategy.scaler.get_scale() == 2.0**39
    for key, value in llm.state_dict().items():
        assert torch.equal(value, before[key])
    while result.skipped:
        result = strategy.train_step(batches_of([[0, 1]]))
    assert not torch.equal(llm.state_dict()["model.norm.weight"], before["model.norm.weight"])


def test_mistakes_in_the_settings_are_named():
    with pytest.raises(UserError, match=r"precision='bf8' is unknown.*fp32, bf16, fp16"):
        Replicated(precision="bf8")
    with pytest.raises(UserError, match="AdamW has no argument 'momentum'"):
        prepared(tiny_llm(), {"type": AdamW, "lr": 1.0, "momentum": 0.9})
    with pytest.raises(UserError, match="max_norm=-1"):
        prepared(tiny_llm(), {"type": SGD, "lr": 1.0}, max_norm=-1)
    with pytest.raises(UserError, match="no parameter to train"):
        prepared(tiny_llm().requires_grad_(False), {"type": SGD, "lr": 1.0})
