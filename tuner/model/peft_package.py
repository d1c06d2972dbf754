"""The package peft, imported without what it and bitsandbytes tell everybody and nobody can act on."""

import logging
import warnings
from types import ModuleType


def load_peft() -> ModuleType:
    """`peft`; it takes seconds to import, and brings bitsandbytes where that is installed."""
    # a faster kernel of its own for CPUs, which would be fetched from the hub: we have no use for it
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    import peft

    return peft
