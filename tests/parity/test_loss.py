"""The chunked loss against torch's cross-entropy on whole logits, gradient by gradient."""

import pytest
import torch
import torch.nn.functional as F

from tuner.constants import IGNORE_INDEX
from tuner.errors import UserError
from tuner.method import loss
from tuner.method.loss import linear_cross_entropy

TOKENS, VOCABULARY, HIDDEN = 37, 53, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 5)


def make_inputs(dtype=torch.float64, share_ignored: float = 0.4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < share_ignored] = IGNORE_INDEX
    return hidden, weight, labels


def make_weights() -> torch.Tensor:
    """(T,) fp32 as a batch brings them: of one token in three 1, of the others from 0.001 to 1000."""
    weights = 10 ** (6 * torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)) - 3)
    weights[::3] = 1
    return weights


def naive(hidden, weight, labels, num_loss_tokens, loss_weights=None) -> torch.Tensor:
    losses = F.cross_entropy(F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)), labels,
                             reduction="none", ignore_index=IGNORE_INDEX)  # fmt: skip
    return (losses if loss_weights is None else losses * loss_weights).sum() / num_loss_tokens


def loss_and_gradients(
    function, hidden, weight, labels, num_loss_tokens=100, scale=1.0, loss_weights=None
) -> list[torch.Tensor]:
    value = function(hidden, weight, labels, num_loss_tokens, loss_weights)
    return [value.detach(), *torch.autograd.grad(value * scale, [t for t in (hidden, weight) if t.requires_grad])]


def assert_same(got, expected, tolerance) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("share_ignored", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_loss_and_gradients_equal_cross_entropy(dtype, tolerance, share_ignored, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    inputs = make_inputs(dtype, share_ignored)
    assert_same(loss_and_gradients(linear_cross_entropy, *inputs), loss_and_gradients(naive, *inputs), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("share_ignored", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("chunk", [1, 5, 37])
def test_weighted_loss_and_gradients_equal_cross_entropy(dtype, tolerance, share_ignored, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    inputs, weights = make_inputs(dtype, share_ignored), make_weights()
    got, expected = (
        loss_and_gradients(function, *inputs, 321.5, loss_weights=weights) for function in (linear_cross_entropy, naive)
    )
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_of_one_are_bit_for_bit_no_weights(autocast):
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = loss_and_gradients(linear_cross_entropy, *inputs)
        ones = loss_and_gradients(linear_cross_entropy, *inputs, loss_weights=torch.ones(TOKENS))
    assert all(torch.equal(one, other) for one, other in zip(ones, plain, strict=True))


def test_a_weight_of_two_is_the_token_twice_and_of_zero_the_token_ignored():
    hidden, weight, labels = make_inputs(share_ignored=0.0)
    weights = torch.ones(TOKENS)
    weights[3], weights[7] = 2, 0
    got = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, loss_weights=weights)
    twice, masked = torch.cat([hidden, hidden[3:4]]), torch.cat([labels, labels[3:4]])
    masked[7] = IGNORE_INDEX
    value = linear_cross_entropy(twice, weight, masked, 100)
    assert_same(got, [value.detach(), *torch.autograd.grad(value, [hidden, weight])], 1e-12)


def test_a_sum_of_weights_below_one_divides_as_it_is():
    hidden, weight, labels = make_inputs()
    weights = torch.full((TOKENS,), 1e-3)
    got = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, 0.022, loss_weights=weights)
    assert_same(got, loss_and_gradients(naive, hidden, weight, labels, 22), 1e-7)  # 0.001 is not exact in fp32


def test_autocast_multiplies_weights_in_fp32():
    """Weights that bf16 cannot hold: rounded to it, each would be off by up to 1 in 256."""
    inputs, weights = make_inputs(torch.float32, 0.0), make_weights()
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = (loss_and_gradients(linear_cross_entropy, *inputs, loss_weights=w) for w in (None, weights))
        alone = [linear_cross_entropy(h, inputs[1], y, 1) for h, y in zip(inputs[0].split(1), inputs[2].split(1))]
    expected = sum(w * one.double() for w, one in zip(weights.double(), alone)) / 100
    torch.testing.assert_close(got[0].double(), expected.detach(), rtol=1e-6, atol=0)
    ratio = (got[1].norm(dim=1) / plain[1].norm(dim=1)) / weights  # of one token: scaled, and rounded to bf16 once
    assert (ratio - 1).abs().max() < 5e-3
    assert [tensor.dtype for tensor in got] == [torch.float32] * 3


@pytest.mark.parametrize("scale", [1000.0, 1e-3])
def test_confident_and_hopeless_predictions_stay_exact(scale):
    """A probability that underflows to 0 must not turn the loss into infinity."""
    hidden, weight, labels = make_inputs()
    hidden = (hidden.detach() * scale).requires_grad_()
    expected = loss_and_gradients(naive, hidden, weight, labels)
    assert expected[0].isfinite()
    assert_same(loss_and_gradients(linear_cross_entropy, hidden, weight, labels), expected, 1e-12)


def test_the_divisor_is_the_steps_count_so_that_pieces_add_up_to_the_whole():
    hidden, weight, labels = make_inputs()
    whole = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, 22)
    pieces = [
        linear_cross_entropy(h, weight, y, 22) for h, y in zip(hidden.split([1, 20, 16]), labels.split([1, 20, 16]))
    ]
    total = sum(pieces)
    assert_same([total.detach(), *torch.autograd.grad(total, [hidden, weight])], whole, 1e-12)


def test_weighted_pieces_add_up_to_the_whole():
    hidden, weight, labels = make_inputs()
    weights = make_weights()
    whole = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, 22.25, loss_weights=weights)
    parts = zip(*(tensor.split([1, 20, 16]) for tensor in (hidden, labels, weights)))
    total = sum(linear_cross_entropy(h, weight, y, 22.25, w) for h, y, w in parts)
    assert_same([total.detach(), *torch.autograd.grad(total, [hidden, weight])], whole, 1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen, monkeypatch):
    hidden, weight, labels = make_inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    monkeypatch.setattr(loss, "_add_product", None if frozen == "weight" else loss._add_product)  # not even computed
    got = loss_and_gradients(linear_cross_entropy, hidden, weight, labels)
    assert len(got) == 2
    assert_same(got, loss_and_gradients(naive, hidden, weight, labels), 1e-12)


def test_without_gradients_none_are_computed(monkeypatch):
    monkeypatch.setattr(loss, "_add_product", None)
    inputs = make_inputs()
    with torch.no_grad():
        value = linear_cross_entropy(*inputs, 100)
    assert not value.requires_grad
    torch.testing.assert_close(value, naive(*inputs, 100).detach())


@pytest.mark.parametrize("num_loss_tokens", [0, 12])
def test_no_trained_token_gives_loss_zero_and_zero_gradients(num_loss_tokens):
    hidden, weight, labels = make_inputs()
    labels.fill_(IGNORE_INDEX)
    value, *grads = loss_and_gradients(linear_cross_entropy, hidden, weight, labels, num_loss_tokens)
    assert value == 0
    assert [grad.count_nonzero() for grad in grads] == [0, 0]
    assert [grad.shape for grad in grads] == [hidden.shape, weight.shape]


def test_trained_tokens_without_a_count_are_refused():
    with pytest.raises(UserError, match=r"num_loss_tokens=0.*labels are trained"):
        linear_cross_entropy(*make_inputs(), 0)


def test_tied_embeddings_get_the_sum_of_both_gradients():
    _, weight, labels = make_inputs()
    ids = torch.arange(TOKENS) % VOCABULARY
    grads = [
        torch.autograd.grad(function(F.embedding(ids, weight).tanh(), weight, labels, 9), weight)[0]
        for function in (linear_cross_entropy, naive)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    """Chunks of 5 of 37 tokens: their bf16 products, added in fp32, are as near to the truth as one product is."""
    inputs = make_inputs(torch.float32, 0.0)
    exact = loss_and_gradients(naive, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = loss_and_gradients(linear_cross_entropy, *inputs), loss_and_gradients(naive, *inputs)
    assert [tensor.dtype for tensor in got] == [torch.float32] * 3
    for ours, reference, truth in zip(got, plain, exact, strict=True):
        error, allowed = (ours - truth).norm(), (reference - truth).norm()
        assert 0 < error <= 1.2 * allowed + 1e-3 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_get_gradients_of_their_own_dtype(dtype):
    hidden, weight, labels = (tensor.detach() for tensor in make_inputs(torch.float32))
    half = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels]
    got = loss_and_gradients(linear_cross_entropy, *half)
    assert [tensor.dtype for tensor in got] == [torch.float32, dtype, dtype]
    truth = loss_and_gradients(
        naive, half[0].detach().double().requires_grad_(), half[1].detach().double().requires_grad_(), labels
    )
    for one, other in zip(got, truth, strict=True):
        assert (one.double() - other).norm() <= 2e-2 * other.norm()


def test_a_loss_scale_saves_fp16_gradients_from_underflow():
    """Divided by a large count before the fp16 products, all would be 0; a GradScaler multiplies only in backward."""
    inputs = make_inputs(torch.float32)
    count, scale = 10_000_000, 65536.0
    with torch.autocast("cpu", torch.float16):
        _, *got = loss_and_gradients(linear_cross_entropy, *inputs, count, scale)
    _, *truth = loss_and_gradients(naive, *inputs, count, scale)
    for one, other in zip(got, truth, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_a_second_backward_is_refused_rather_than_wrong():
    hidden, weight, labels = make_inputs()
    value = linear_cross_entropy(hidden, weight, labels, 100)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward works once"):
        value.backward()


def test_no_tensor_as_large_as_all_logits_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.numel = max(Largest.numel, result.numel())
            return result

    with Largest():
        linear_cross_entropy(*make_inputs(), 100).backward()
    assert Largest.numel == max(VOCABULARY * HIDDEN, TOKENS * HIDDEN, 5 * VOCABULARY)
