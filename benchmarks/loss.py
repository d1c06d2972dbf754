"""LM head and loss: the chunked loss beside naive cross-entropy and torch's own fused one, time and peak memory.

    python benchmarks/loss.py [--hidden 2048]

Forward and backward of T tokens, all trained, fp32, one thread, every row in a process of its own. Memory is the peak
of the process above what it held when the inputs were ready (gradients of weight and hidden states included).
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

from tuner.method import loss


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def chunked(chunk: int) -> Callable[..., torch.Tensor]:
    """Ours, with a chunk of so many tokens."""

    def attempt(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss.CHUNK_TOKENS = chunk
        return loss.linear_cross_entropy(hidden, weight, labels, len(labels))

    return attempt


def fused(chunk: int) -> Callable[..., torch.Tensor]:
    """torch.nn.functional.linear_cross_entropy (torch 2.13), with a chunk of so many tokens."""

    def attempt(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, labels, options=options)

    return attempt


WAYS = {
    "naive": naive,
    "tuner, 512": chunked(512),
    f"tuner, {loss.CHUNK_TOKENS}": chunked(loss.CHUNK_TOKENS),
    "torch, 1024": fused(1024),
}


def measure(way: str, num_tokens: int, vocabulary: int, hidden_size: int) -> tuple[float, float]:
    """CPU seconds and bytes above the inputs, in this process."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden_size) * 0.02)
    labels = torch.randint(0, vocabulary, (num_tokens,))
    WAYS[way](hidden[:8], weight, labels[:8])  # start-up of the libraries; without backward
    before, started = peak_bytes(), time.process_time()
    WAYS[way](hidden, weight, labels).backward()
    return time.process_time() - started, peak_bytes() - before


def peak_bytes() -> int:
    """Most bytes the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_apart(way: str, sizes: list[int]) -> tuple[float, float]:
    """`measure` in a fresh process, whose peak is its own."""
    command = [sys.executable, __file__, "--way", way, "--sizes", *map(str, sizes)]
    seconds, memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), float(memory)


def main() -> None:
    """Print the table; with --way, measure one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=92544)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(*measure(arguments.way, *arguments.sizes))
        return
    sizes = [arguments.tokens, arguments.vocabulary, arguments.hidden]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} cores, fp32")
    print(f"{sizes[0]} tokens x {sizes[1]} entries, hidden {sizes[2]}, forward + backward, all tokens trained\n")
    print(f"{'way, chunk':16}{'CPU s':>8}{'share':>8}{'GB':>8}{'share':>8}")
    baseline = None
    for way in WAYS:
        seconds, memory = measure_apart(way, sizes)
        baseline = baseline or (seconds, memory)
        shares = seconds / baseline[0], memory / baseline[1]
        print(f"{way:16}{seconds:8.1f}{shares[0]:8.2f}{memory / 1e9:8.2f}{shares[1]:8.3f}", flush=True)


if __name__ == "__main__":
    main()
