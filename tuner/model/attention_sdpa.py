"""Packed attention on any device: torch's SDPA once per document, tiny documents together in padded buckets."""

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Up to this length a call of SDPA costs more than its arithmetic: on one core and 8 heads of 32, 256 documents of 8
# tokens take 0.7 to 0.85 of the time in a bucket; longer ones, or with larger heads, nothing less.
TINY = 8
BUCKET_STEP = 4  # tiny documents whose lengths round up to the same multiple share a bucket
MIN_BUCKET = 16  # documents; fewer do not pay for a gradient as long as the pack


class Pack(NamedTuple):
    """What every backend of packed attention takes; `packed_attention` has checked it."""

    query: torch.Tensor  # (1, H, T, D)
    key: torch.Tensor  # (1, Hkv, T, D), the kv heads not repeated
    value: torch.Tensor  # (1, Hkv, T, D)
    cu_seqlens: torch.Tensor  # (documents + 1,) int32, edges of the documents, from 0 to T
    max_seqlen: int  # longest document
    scale: float | None  # factor of the scores, 1/sqrt(D) if None
    window: int | None  # a token sees itself and the `window - 1` before it; all before it if None


def sdpa_attention(pack: Pack) -> torch.Tensor:
    """Causal attention inside each document, (1, H, T, D); the reference of the other backends."""
    edges, window = pack.cu_seqlens.tolist(), pack.window
    lengths = [end - start for start, end in pairwise(edges)]
    # `split` has one backward for all documents, a concatenation. With slices each document's backward fills a
    # gradient as long as the pack: at 256 documents of 32 tokens 20 times slower.
    documents = list(zip(*(tensor.split(lengths, dim=2) for tensor in pack[:3])))
    outputs = [document[0] for document in documents]  # stays so only where a document has no token
    alone, together = group(lengths, TINY if window is None else min(TINY, window))
    for i in alone:
        outputs[i] = _attend(*documents[i], scale=pack.scale, window=window)
    for members in together:
        starts = torch.tensor([edges[i] for i in members])
        attended = _attend_padded(pack, starts, [lengths[i] for i in members])
        for i, output in zip(members, attended):
            outputs[i] = output
    if len(outputs) == 1:
        return outputs[0]  # as the kernel made it: its backward keeps that, and a copy would be another
    # (1, T, H, D) in memory, which is what a model flattens next
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).transpose(1, 2)


def group(lengths: list[int], tiny: int) -> tuple[list[int], list[list[int]]]:
    """Indices of the documents that are attended alone, and buckets of tiny documents of near lengths.

    A bucket too small to pay for its gathering is given up; documents of no token are in neither.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        if 0 < length <= tiny:
            buckets[-(-length // BUCKET_STEP)].append(i)
    together = [members for members in buckets.values() if len(members) >= MIN_BUCKET]
    in_bucket = {i for members in together for i in members}
    return [i for i, length in enumerate(lengths) if length and i not in in_bucket], together


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None, window: int | None
) -> torch.Tensor:
    """One document: (1, H, L, D) -> (1, H, L, D)."""
    if window is None or query.shape[2] <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return _attend_window(query, key, value, scale, window)


def _attend_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
) -> torch.Tensor:
    """One document longer than its window, in blocks of `window` queries: work and memory grow with L, not with L^2.

    A block sees parts of the keys of the block before it and of its own, so one (window, 2 window) mask fits all.
    """
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)[None] - window  # 0 is the block's own first key
    band = (column <= row) & (column > row - window)
    blocks = list(zip(*(tensor.split(window, dim=2) for tensor in (query, key, value))))
    outputs = [_attend(*blocks[0], scale=scale, window=None)]
    for (_, key_before, value_before), (block, key_here, value_here) in pairwise(blocks):
        keys, values = torch.cat([key_before, key_here], dim=2), torch.cat([value_before, value_here], dim=2)
        mask = band[: block.shape[2], : keys.shape[2]]  # the last block may be short
        outputs.append(
            F.scaled_dot_product_attention(block, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2)


def _attend_padded(pack: Pack, starts: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Documents of near lengths out of a pack in one call; the causal mask hides the padding at their ends."""
    size = torch.tensor(lengths)[:, None]
    position = torch.arange(max(lengths))[None]
    # Padding repeats the document's own last token: nothing can pass between documents, not even a NaN times 0.
    rows = (starts[:, None] + position.minimum(size - 1)).flatten().to(pack.query.device)
    kept = (position < size).flatten().nonzero().flatten().to(rows.device)
    # (1, heads, T, D) -> (documents, heads, longest, D)
    query, key, value = (
        tensor[0].transpose(0, 1).index_select(0, rows).unflatten(0, (len(lengths), -1)).transpose(1, 2)
        for tensor in pack[:3]
    )
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=pack.scale, enable_gqa=True)
    tokens = output.transpose(1, 2).flatten(0, 1).index_select(0, kept)  # (tokens of these documents, H, D)
    return tokens.transpose(0, 1)[None].split(lengths, dim=2)
