"""Attention of a block of a ring with the log-sum-exp of its scores, and its gradients: what merging blocks needs."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from tuner.parallel.zigzag import Block

# Shapes: Q queries and K keys of a block, H query heads, G kv heads, D head size
QUERIES_AT_ONCE = 1024  # of plain arithmetic, whose scores are in memory: (H, 1024, K) of them
HALF = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


class Inputs(NamedTuple):
    """The tensors of a block, its rows chosen."""

    query: torch.Tensor  # (1, H, Q, D)
    key: torch.Tensor  # (1, G, K, D)
    value: torch.Tensor  # (1, G, K, D)
    scale: float
    window: int | None  # None where no document is longer


class Outcome(NamedTuple):
    """What queries have seen: of one block in its forward, of all keys in its backward."""

    output: torch.Tensor  # (1, H, Q, D)
    lse: torch.Tensor  # (1, H, Q) fp32 or fp64: log of the sum of the exponentials of the scores


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of query, key and value


def attend_block(inputs: Inputs, block: Block) -> Outcome:
    """The attention of a block: torch's flash kernel of the device, plain arithmetic where it has none."""
    if not uses_kernel(inputs):
        parts = [_plain(part, *positions) for part, positions in _documents(inputs, block)]
    elif inputs.query.device.type == "cuda":
        return _flash_cuda(inputs, block)
    else:
        parts = [
            Outcome(
                *aten._scaled_dot_product_flash_attention_for_cpu(
                    part.query, part.key, part.value, 0.0, block.causal, scale=part.scale
                )
            )
            for part, _ in _documents(inputs, block)
        ]
    return Outcome(*(torch.cat(tensors, dim=2) for tensors in zip(*parts)))


def attend_block_backward(grad: torch.Tensor, inputs: Inputs, total: Outcome, block: Block) -> Gradients:
    """A block's share of the gradients, in the dtype of the inputs or a wider one.

    Args:
        grad: (1, H, Q, D), of the output of all blocks together.
        total: output and log-sum-exp of all blocks together, for these queries.
    """
    if uses_kernel(inputs) and inputs.query.device.type == "cuda":
        return _flash_cuda_backward(grad, inputs, total, block)
    lengths = [end - start for start, end in pairwise(block.query_edges)]
    totals = zip(*(tensor.split(lengths, dim=2) for tensor in (grad, *total)))
    parts: list[Gradients] = []
    for (part, positions), (part_grad, output, lse) in zip(_documents(inputs, block), totals):
        if uses_kernel(inputs):
            kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
            tensors = (part_grad, part.query, part.key, part.value, output, lse)
            parts.append(kernel(*tensors, 0.0, block.causal, scale=part.scale))
        else:
            parts.append(_plain_backward(part_grad, part, Outcome(output, lse), *positions))
    query, key, value = (torch.cat(tensors, dim=2) for tensors in zip(*parts))
    return query, key, value


def uses_kernel(inputs: Inputs) -> bool:
    """Whether the device's flash kernel computes this; a window would lie askew in its blocks."""
    return inputs.window is None and (inputs.query.device.type == "cpu" or inputs.query.dtype in HALF)


def _documents(inputs: Inputs, block: Block) -> Iterator[tuple[Inputs, tuple[torch.Tensor, torch.Tensor]]]:
    """Each document's tensors, with the positions of its queries and keys."""
    queries = [end - start for start, end in pairwise(block.query_edges)]
    keys = [end - start for start, end in pairwise(block.key_edges)]
    tensors = zip(inputs.query.split(queries, 2), inputs.key.split(keys, 2), inputs.value.split(keys, 2))
    positions = zip(block.query_position.split(queries), block.key_position.split(keys))
    for document, places in zip(tensors, positions):
        yield Inputs(*document, inputs.scale, inputs.window), places


def _flash_cuda(inputs: Inputs, block: Block) -> Outcome:
    """All documents in one call of the kernel behind `torch.nn.attention.varlen`."""
    edges, longest = _edges_cuda(block)
    output, lse, *_ = aten._flash_attention_forward(
        *_heads_last(*inputs[:3]), *edges, *longest, 0.0, block.causal, False, scale=inputs.scale
    )
    return Outcome(output.transpose(0, 1)[None], lse[None])


def _flash_cuda_backward(grad: torch.Tensor, inputs: Inputs, total: Outcome, block: Block) -> Gradients:
    edges, longest = _edges_cuda(block)
    grad, output = _heads_last(grad, total.output)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device)
    query, key, value = aten._flash_attention_backward(
        grad, *_heads_last(*inputs[:3]), output, total.lse[0].contiguous(), *edges, *longest, 0.0, block.causal,
        *no_dropout, scale=inputs.scale,
    )  # fmt: skip
    return query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def _edges_cuda(block: Block) -> tuple[tuple[torch.Tensor, torch.Tensor], list[int]]:
    """Edges of queries and keys on the device, and the longest of each."""
    assert block.edges_on_device is not None
    longest = [max(end - start for start, end in pairwise(each)) for each in (block.query_edges, block.key_edges)]
    return block.edges_on_device, longest


def _heads_last(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(1, H, T, D) -> (T, H, D), contiguous."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]


class _Seen(NamedTuple):
    """A slice of a document's queries, the keys that any of them can see, and what is hidden between them."""

    queries: slice
    keys: slice
    hidden: torch.Tensor  # (queries, keys) bool


def _slices(inputs: Inputs, query_position: torch.Tensor, key_position: torch.Tensor) -> Iterator[_Seen]:
    for start in range(0, len(query_position), QUERIES_AT_ONCE):
        queries = slice(start, start + QUERIES_AT_ONCE)
        places = query_position[queries]
        end = int(torch.searchsorted(key_position, places[-1], right=True))
        begin = 0 if inputs.window is None else int(torch.searchsorted(key_position, places[0] - inputs.window + 1))
        ago = places[:, None] - key_position[None, begin:end]
        hidden = (ago < 0) if inputs.window is None else (ago < 0) | (ago >= inputs.window)
        yield _Seen(queries, slice(begin, max(begin, end)), hidden.to(inputs.query.device))


def _plain(inputs: Inputs, query_position: torch.Tensor, key_position: torch.Tensor) -> Outcome:
    """One document by matrix products in fp32, or fp64 for fp64; a query that sees no key has lse -inf, output 0."""
    query, key, value = _grouped(inputs)
    output = torch.zeros_like(query)
    lse = query.new_full(query.shape[:-1], -torch.inf)
    for seen in _slices(inputs, query_position, key_position):
        scores = _scores(query, key, seen, inputs.scale)
        total = scores.logsumexp(-1)
        weights = (scores - total.nan_to_num(neginf=0.0)[..., None]).exp()
        output[:, :, seen.queries] = weights @ value[:, None, seen.keys]
        lse[:, :, seen.queries] = total
    return Outcome(output.flatten(0, 1)[None], lse.flatten(0, 1)[None])


def _plain_backward(
    grad: torch.Tensor, inputs: Inputs, total: Outcome, query_position: torch.Tensor, key_position: torch.Tensor
) -> Gradients:
    query, key, value = _grouped(inputs)
    groups = (key.shape[0], -1)
    grad, output = (tensor[0].to(query.dtype).unflatten(0, groups) for tensor in (grad, total.output))
    lse = total.lse[0].to(query.dtype).unflatten(0, groups)
    delta = (grad * output).sum(-1, keepdim=True)
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for seen in _slices(inputs, query_position, key_position):
        of, here = grad[:, :, seen.queries], query[:, :, seen.queries]
        weights = (_scores(query, key, seen, inputs.scale) - lse[:, :, seen.queries, None]).exp()
        error = weights * (of @ value[:, None, seen.keys].mT - delta[:, :, seen.queries]) * inputs.scale
        grads[0][:, :, seen.queries] = error @ key[:, None, seen.keys]
        grads[1][:, seen.keys] += (error.mT @ here).sum(1)
        grads[2][:, seen.keys] += (weights.mT @ of).sum(1)
    return grads[0].flatten(0, 1)[None], grads[1][None], grads[2][None]


def _grouped(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query (G, H/G, Q, D), key and value (G, K, D), in fp32 or fp64."""
    exact = torch.promote_types(inputs.query.dtype, torch.float32)
    query, key, value = (tensor[0].to(exact) for tensor in inputs[:3])
    return query.unflatten(0, (key.shape[0], -1)), key, value


def _scores(query: torch.Tensor, key: torch.Tensor, seen: _Seen, scale: float) -> torch.Tensor:
    """(G, H/G, queries, keys), -inf where hidden."""
    scores = (query[:, :, seen.queries] @ key[:, None, seen.keys].mT) * scale
    return scores.masked_fill(seen.hidden, -torch.inf)
