"""Packed attention beside a dense mask and beside slicing: CPU seconds of forward + backward, one thread.

    python benchmarks/attention.py

A dense mask over 64 documents of 4,096 tokens cannot be held (262,144^2 scores), so it is measured at the longest
pack given here and scaled by the square of the tokens: it computes every pair, visible or not. Packed attention is
measured at the full size.
"""

import argparse
import os
import time
from collections.abc import Callable
from itertools import accumulate, pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

from tuner.model.attention import packed_attention

Tensors = list[torch.Tensor]


def make_qkv(num_tokens: int, heads: int, kv_heads: int, size: int) -> Tensors:
    """Query, key, value (1, heads, T, size) as a model hands them over: views of (1, T, heads, size)."""
    shapes = [(1, num_tokens, h, size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


def by_pack(tensors: Tensors, lengths: list[int]) -> torch.Tensor:
    """Ours."""
    cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    return packed_attention(*tensors, cu_seqlens, max(lengths), backend="sdpa")


def by_dense_mask(tensors: Tensors, lengths: list[int]) -> torch.Tensor:
    """One call over the pack with a (T, T) mask, what transformers does with packed positions."""
    document = torch.repeat_interleave(torch.tensor(lengths))
    position = torch.arange(len(document))
    mask = (document[:, None] == document[None]) & (position[:, None] >= position[None])
    return F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)


def by_slices(tensors: Tensors, lengths: list[int]) -> torch.Tensor:
    """A call per document on slices: the same forward, and a backward that fills a whole gradient per document."""
    edges = pairwise(accumulate(lengths, initial=0))
    documents = [[tensor[:, :, start:end] for tensor in tensors] for start, end in edges]
    return torch.cat([F.scaled_dot_product_attention(*d, is_causal=True, enable_gqa=True) for d in documents], 2)


def cpu_seconds(attend: Callable, tensors: Tensors, lengths: list[int], num_tries: int) -> float:
    """Least CPU seconds of a forward and backward."""
    weights, seconds = torch.randn_like(tensors[0]), []
    for _ in range(num_tries):
        started = time.process_time()
        torch.autograd.grad(attend(tensors, lengths), tensors, weights)
        seconds.append(time.process_time() - started)
    return min(seconds)


def long_documents(dense_tokens: int) -> None:
    """The goal: 64 documents of 4,096 tokens at least 20 times faster than a dense mask."""
    heads, size, num_documents, length = 1, 64, 64, 4096
    packed = cpu_seconds(by_pack, make_qkv(num_documents * length, heads, heads, size), [length] * num_documents, 1)
    short = dense_tokens // num_documents
    tensors = make_qkv(dense_tokens, heads, heads, size)
    measured = cpu_seconds(by_dense_mask, tensors, [short] * num_documents, 2)
    same_size = cpu_seconds(by_pack, tensors, [short] * num_documents, 5)
    dense = measured * (num_documents * length / dense_tokens) ** 2
    print(f"{num_documents} documents, {heads} head of {size}, CPU s of forward + backward")
    print(f"{'':24}{'packed':>10}{'dense mask':>12}{'ratio':>8}")
    print(f"{f'of {short} tokens':24}{same_size:10.3f}{measured:12.2f}{measured / same_size:8.0f}")
    print(f"{f'of {length} tokens':24}{packed:10.2f}{dense:12.0f}{dense / packed:8.0f}   dense: scaled from above")


def many_documents() -> None:
    """Where calls and copies, not arithmetic, are the cost."""
    print("\n256 documents, 8 heads of 32, 4 kv heads, CPU ms of forward + backward")
    print(f"{'tokens each':24}{'packed':>10}{'slices':>12}{'dense mask':>12}{'slices/packed':>15}{'dense/packed':>14}")
    for length in (4, 8, 32):
        tensors, lengths = make_qkv(256 * length, 8, 4, 32), [length] * 256
        packed, slices = (cpu_seconds(attend, tensors, lengths, 5) for attend in (by_pack, by_slices))
        dense = cpu_seconds(by_dense_mask, tensors, lengths, 1)
        figures = f"{packed * 1e3:10.1f}{slices * 1e3:12.1f}{dense * 1e3:12.1f}"
        print(f"{length:<24}{figures}{slices / packed:15.1f}{dense / packed:14.1f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-tokens", type=int, default=16384, help="longest pack for the dense mask")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} cores, fp32\n")
    long_documents(arguments.dense_tokens)
    many_documents()


if __name__ == "__main__":
    main()
