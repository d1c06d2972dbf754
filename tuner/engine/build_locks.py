"""Locks that a killed build of DeepSpeed's kernels leaves behind: told, where DeepSpeed would wait for ever."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from tuner.errors import UserError

KERNELS = ("async_io", "pin_memory", "gds")
"""what ZeRO compiles, and only for offload to a disk; without it nothing is compiled"""
BUILD_SECONDS = 900.0  # a build takes a few minutes


def wait_for_builds(config: Mapping[str, Any], *, patience: float = BUILD_SECONDS) -> None:
    """Return once no other process builds what this config of DeepSpeed needs.

    Raises:
        UserError: a lock is older than `patience` seconds, so that its owner is gone.
    """
    zero = config["zero_optimization"]
    devices = [(zero.get(part) or {}).get("device") for part in ("offload_param", "offload_optimizer")]
    if "nvme" not in devices:
        return
    for name in KERNELS:
        wait_for(Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock", patience)


def wait_for(lock: Path, patience: float) -> None:
    """Return once the file is gone, which says once that it is waited for."""
    is_said = False
    while (age := age_of(lock)) is not None:
        if age > patience:
            raise UserError(
                f"{lock} is {age / 60:.0f} minutes old: a killed build of DeepSpeed's kernels has left it, and "
                f"DeepSpeed would wait for it for ever. Delete it and start again: rm {lock}"
            )
        if not is_said:
            print(f"waiting for another process that builds DeepSpeed's kernels ({lock})", flush=True)
            is_said = True
        time.sleep(min(1.0, patience / 10))


def age_of(lock: Path) -> float | None:
    """In seconds; None where it is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
