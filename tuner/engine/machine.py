"""What this machine can do: usable CPUs, peak arithmetic rate, memory in use."""

import functools
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch

# dense bf16/fp16 tensor-core rate in FLOP/s, from the vendor's data sheets; the first name that fits counts
PEAK_RATES = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


class PeakRate(NamedTuple):
    """FLOP/s that MFU is a share of, and where the number comes from."""

    flops: float
    source: str


def peak_rate(device: torch.device) -> PeakRate:
    """The data sheet's rate of a known GPU; else the best of a few matrix products measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, rate in PEAK_RATES.items():
            if known in name:
                return PeakRate(rate, f"the data sheet's dense bf16 rate of {known}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = measured_rate(device, dtype)
    return PeakRate(rate, f"{device.type}'s measured {str(dtype).removeprefix('torch.')} matrix products")


@functools.cache
def measured_rate(device: torch.device, dtype: torch.dtype, num_tries: int = 5) -> float:
    """FLOP/s of square matrix products: 2 n^3 over the shortest of a few times. Draws no random number."""
    size = MATRIX_SIZE[device.type]
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    seconds = []
    for _ in range(num_tries):
        synchronize(device)
        started = time.perf_counter()
        left @ left
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


@functools.cache
def measured_bandwidth(device: torch.device, num_bytes: int = 2**28, num_tries: int = 5) -> float:
    """Bytes/s of the device's memory: those read and written by a copy, over the shortest of a few times."""
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(num_tries):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / min(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by its tensors, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def usable_cpus() -> int:
    """CPUs this process may run on: its affinity, cut down by a container's quota."""
    usable = len(os.sched_getaffinity(0))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            usable = min(usable, max(1, int(quota) // int(period)))
    return usable


def set_num_threads(num_processes: int = 1) -> None:
    """As many torch threads as each process of this node has usable CPUs, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cpus() // num_processes))
