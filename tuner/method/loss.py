"""LM head and cross-entropy in one, chunk by chunk: the logits of a batch never exist at once."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from tuner.constants import IGNORE_INDEX
from tuner.errors import UserError

# Tokens whose logits exist at once. Measured at 8,192 x 92,544, hidden 256, one core (benchmarks/loss.py): 512 tokens
# take 0.58 to 0.63 of the naive time and 0.02 of its memory, 1,024 take 0.54 to 0.59 and 0.04, more are no faster.
CHUNK_TOKENS = 1024


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_loss_tokens: float,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T`, summed over the trained tokens and divided by `num_loss_tokens`.

    Only trained tokens are multiplied. The gradients are made in the forward, while a chunk's softmax is at hand, so
    a chunk is computed once; backward scales them, and works once.

    Args:
        hidden: (T, H).
        weight: (V, H), the output embedding.
        labels: (T,) int64, already shifted, `IGNORE_INDEX` where there is no loss.
        num_loss_tokens: the divisor: trained tokens of the whole optimizer step, not of this call; with weights,
            the sum of theirs.
        loss_weights: (T,) float, what the cross-entropy of each trained token is multiplied with; None is 1 for each.

    Returns:
        Scalar, fp32 (fp64 for fp64 input); 0 with zero gradients if no token is trained. Under autocast the matrix
        products run in its dtype; softmax, loss weights, sum and the weight's gradient are in fp32.

    Raises:
        UserError: tokens are trained, but num_loss_tokens is not positive.
    """
    trained = (labels != IGNORE_INDEX).nonzero().flatten()
    if len(trained) < len(labels):
        hidden, labels = hidden.index_select(0, trained), labels[trained]
        loss_weights = None if loss_weights is None else loss_weights[trained]
    if num_loss_tokens <= 0 and len(trained):
        raise UserError(f"num_loss_tokens={num_loss_tokens}, but {len(trained)} labels are trained; count them.")
    return trained_cross_entropy(hidden, weight, labels, loss_weights) / divisor(num_loss_tokens)


def trained_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum, where each of the (T,) labels is trained; looks at no label's value."""
    wants = torch.is_grad_enabled()
    return _ChunkedLoss.apply(
        hidden, weight, labels, loss_weights, wants and hidden.requires_grad, wants and weight.requires_grad
    )


def divisor(num_loss_tokens: float) -> float:
    """What a sum of losses is divided by; a step that trains nothing has the loss 0."""
    return num_loss_tokens if num_loss_tokens > 0 else 1


class _Gradients(NamedTuple):
    """Of the summed loss, filled chunk by chunk; None where not wanted."""

    hidden: torch.Tensor | None  # (T, H), in the dtype of hidden
    weight: torch.Tensor | None  # (V, H), fp32 or fp64


class _Targets(NamedTuple):
    """What T tokens shall predict, and what each of them weighs; None where all weigh 1."""

    labels: torch.Tensor  # (T,) int64
    weights: torch.Tensor | None  # (T,) fp32 or fp64

    def of(self, rows: slice) -> "_Targets":
        """Those of some of the tokens."""
        return _Targets(self.labels[rows], None if self.weights is None else self.weights[rows])


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies; num_loss_tokens and a loss scale reach the gradients in backward, in fp32.

    Dividing before the half-precision products would push small probabilities under fp16's range.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_weights: torch.Tensor | None,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> torch.Tensor:
        """(T, H), (V, H), (T,), (T,) or None -> scalar."""
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        kind = hidden.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        gradients = _Gradients(
            torch.empty_like(hidden) if wants_hidden else None,
            torch.zeros_like(weight, dtype=exact) if wants_weight else None,
        )
        with torch.autocast(kind, enabled=False):
            targets = _Targets(labels, None if loss_weights is None else loss_weights.to(exact))
            loss_sum = _accumulate(hidden.to(compute), weight.to(compute), targets, gradients, exact)
        ctx.gradients, ctx.weight_dtype = gradients, weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale what forward made, in place; the buffers are given away."""
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy gave its gradients away: backward works once, call it again.")
        (hidden, weight), ctx.gradients = ctx.gradients, None
        hidden = None if hidden is None else hidden.mul_(grad_output)
        weight = None if weight is None else weight.mul_(grad_output).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None


def _accumulate(
    hidden: torch.Tensor, weight: torch.Tensor, targets: _Targets, gradients: _Gradients, exact: torch.dtype
) -> torch.Tensor:
    """Sum of the losses; adds to `gradients` as it goes. T tokens, V entries of the vocabulary, C tokens of a chunk."""
    total = torch.zeros((), dtype=exact, device=hidden.device)
    num_tokens = len(targets.labels)
    num_chunks = max(1, -(-num_tokens // CHUNK_TOKENS))
    size = max(1, -(-num_tokens // num_chunks))  # even, since a short last chunk multiplies slowly
    logits = torch.empty(size, weight.shape[0], dtype=weight.dtype, device=weight.device)  # reused: no new pages
    for start in range(0, num_tokens, size):
        rows = slice(start, start + size)
        chunk = targets.of(rows)
        scores = torch.mm(hidden[rows], weight.t(), out=logits[: len(chunk.labels)])  # (C, V)
        error, loss_sum = _softmax_error(scores, chunk, exact)
        total += loss_sum
        if gradients.hidden is not None:
            gradients.hidden[rows] = error @ weight
        if gradients.weight is not None:
            _add_product(gradients.weight, error, hidden[rows])
        del error  # before the next chunk makes its own
    return total


def _softmax_error(scores: torch.Tensor, chunk: _Targets, exact: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax - one-hot of a chunk (C, V) in the dtype of `scores`, which may be overwritten, and the chunk's loss.

    Both are multiplied with the loss weights of the tokens, in `exact`.
    """
    label = chunk.labels[:, None]  # (C, 1)
    log_probability = _log_softmax(scores, exact)
    losses = log_probability.gather(1, label)
    probability = log_probability.exp_()
    error = probability.scatter_add_(1, label, probability.new_full((), -1).expand_as(label))
    if chunk.weights is not None:
        losses = losses * chunk.weights[:, None]
        error *= chunk.weights[:, None]
    return error.to(scores.dtype), -losses.sum()


def _log_softmax(scores: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """Over the vocabulary, in `exact`; on the CPU in place, where its kernel writes a row after it has read it."""
    if scores.dtype == exact and scores.device.type == "cpu":
        return torch.log_softmax(scores, dim=1, out=scores)
    return torch.log_softmax(scores, dim=1, dtype=exact)


def _add_product(total: torch.Tensor, error: torch.Tensor, chunk: torch.Tensor) -> None:
    """total (V, H) += error.T (V, C) @ chunk (C, H), added in the dtype of total."""
    if error.dtype == total.dtype:
        total.addmm_(error.t(), chunk)
    else:
        total += error.t() @ chunk
