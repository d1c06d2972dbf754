"""GPUs and links by name, with the figures of their data sheets; or any other by its numbers."""

import math
import re
from typing import NamedTuple

from tuner.errors import UserError
from tuner.nearest import did_you_mean

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LARGEST = 2**50  # bytes
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([KMGT]i?B)", re.IGNORECASE)
SLOWEST = 1e6  # FLOP/s and bytes/s below which a number is one of TFLOP/s or GB/s, or a mistake


class Gpu(NamedTuple):
    """What a step's time and memory depend on."""

    name: str
    flops: float  # dense bf16 matrix products, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes that torch sees
    source: str = "its data sheet"


# memory is what torch reports: some of what is named stays with the driver
GPUS = {
    "H100": Gpu("H100", 989e12, 3.35e12, 79.1 * 2**30),
    "H200": Gpu("H200", 989e12, 4.8e12, 139.8 * 2**30),
    "A100": Gpu("A100", 312e12, 2.04e12, 79.15 * 2**30),
}
# bytes/s that a GPU sends, one way
LINKS = {
    "nvlink4": 450e9,
    "nvlink3": 300e9,
    "pcie4": 25e9,
    "pcie5": 50e9,
    "ib200": 25e9,
    "ib400": 50e9,
    "ethernet100": 12e9,
}
DEFAULT_LINKS = {"A100": "nvlink3"}


def read_size(text: str, option: str = "--gpu-memory") -> float:
    """`80GiB` -> bytes.

    Raises:
        UserError: it is no size, or none that memory has.
    """
    match = SIZE.fullmatch(text.strip())
    size = float(match[1]) * UNITS[match[2].upper()] if match is not None else 0.0
    if not 0 < size < LARGEST:
        raise UserError(f"{option} {text}: give a number above 0 with its unit, such as 80GiB or 80GB.")
    return size


def read_rates(text: str) -> list[float] | None:
    """`400e12,2e12` -> those; None for what is not one number or several."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return None


def is_rate(number: float) -> bool:
    """Whether something moves at that many a second."""
    return SLOWEST <= number < math.inf


def read_gpu(text: str, memory: str | None) -> Gpu:
    """A name of `GPUS`, or `FLOPS,BANDWIDTH` in FLOP/s and bytes/s, such as 400e12,2e12, which needs a memory.

    Raises:
        UserError: neither; says which are known.
    """
    known = {name.lower(): gpu for name, gpu in GPUS.items()}
    if text.lower() in known:
        gpu = known[text.lower()]
        return gpu if memory is None else gpu._replace(memory=read_size(memory))
    rates = read_rates(text)
    if rates is None or len(rates) != 2:
        raise UserError(
            f"--gpu {text}: known are {', '.join(GPUS)}.{did_you_mean(text.upper(), GPUS)} Of another give numbers: "
            "--gpu FLOPS,BANDWIDTH, dense bf16 FLOP/s and bytes/s, such as 400e12,2e12, and --gpu-memory."
        )
    if not all(map(is_rate, rates)):
        raise UserError(f"--gpu {text}: give FLOP/s and bytes/s, not TFLOP/s and TB/s: such as 400e12,2e12.")
    if memory is None:
        raise UserError(f"--gpu {text}: of a GPU by its numbers say --gpu-memory too, such as --gpu-memory 80GiB.")
    return Gpu("this GPU", rates[0], rates[1], read_size(memory), "--gpu")


def read_link(text: str | None, gpu: Gpu, num_nodes: int) -> tuple[str, float]:
    """Name and bytes/s of the slowest link that all ranks share: a name of `LINKS`, or a number.

    Raises:
        UserError: neither.
    """
    if text is None:
        text = "ib400" if num_nodes > 1 else DEFAULT_LINKS.get(gpu.name, "nvlink4")
    if text in LINKS:
        return text, LINKS[text]
    rates = read_rates(text)
    if rates is None or len(rates) != 1:
        raise UserError(
            f"--link {text}: known are {', '.join(LINKS)}.{did_you_mean(text, LINKS)} Or give bytes/s, such as 50e9."
        )
    if not is_rate(rates[0]):
        raise UserError(f"--link {text}: give bytes/s, not GB/s: such as 50e9.")
    return "--link", rates[0]
