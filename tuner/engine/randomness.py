"""The random states of a process: seeded at the start, captured and restored around whatever must not disturb them."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, on the CPU and on every accelerator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_random_state() -> dict[str, Any]:
    """The state of every generator, as values that JSON keeps exactly."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": to_hex(torch.get_rng_state()),
        "cuda": [to_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any], devices: Sequence[int] | None = None) -> None:
    """Put every generator back to where `capture_random_state` found it.

    Args:
        state: what it returned; "cuda" may have been cut down to some GPUs.
        devices: the GPUs that those states are for, in their order; None is all of this process, from the first.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(from_hex(state["torch"]))
    for device, text in zip(range(torch.cuda.device_count()) if devices is None else devices, state["cuda"]):
        torch.cuda.set_rng_state(from_hex(text), device)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever the block draws is given back at its end."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def to_hex(state: torch.Tensor) -> str:
    """A generator's bytes as text."""
    return state.numpy().tobytes().hex()


def from_hex(text: str) -> torch.Tensor:
    """The inverse of `to_hex`."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
