"""The fused, interleaved `wqkv` projection: how its rows are laid out, split and merged."""

import torch


def split_wqkv(
    wqkv: torch.Tensor, *, num_key_value_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of one fused projection -> rows of the query, key and value projections of Llama.

    The published modelling code computes `rearrange(qkv, "b q (h gs d) -> b q h gs d", gs=2 + groups)`, h being the
    key/value heads: for each of them come its `groups` query heads, then its key head, then its value head.
    Query head n = i * groups + j, dimension d, is therefore row (i * (groups + 2) + j) * head_dim + d.

    Args:
        wqkv: weight (R, H) or bias (R,), R = (heads + 2 * num_key_value_heads) * head_dim; any dtype.

    Returns:
        query (heads * head_dim, ...), key and value (num_key_value_heads * head_dim, ...); copies, same dtype.
    """
    grouped = wqkv.unflatten(0, (num_key_value_heads, -1, head_dim))  # (Hkv, groups + 2, D, ...)
    query, key, value = grouped.split((grouped.shape[1] - 2, 1, 1), dim=1)
    return tuple(part.flatten(0, 2).contiguous() for part in (query, key, value))


def merge_wqkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, head_dim: int) -> torch.Tensor:
    """The inverse of `split_wqkv`: Llama's three projections, weights or biases, -> the fused rows."""
    num_key_value_heads = key.shape[0] // head_dim
    parts = [part.unflatten(0, (num_key_value_heads, -1, head_dim)) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)
