"""mmengine's runner, loop and strategy, without the packages that it would import wherever they are installed."""

import sys

UNASKED = ("deepspeed", "bitsandbytes")
"""seconds each, and what they print: DeepSpeed of a missing GPU, bitsandbytes of missing kernels"""

hidden = [name for name in UNASKED if name not in sys.modules]
for name in hidden:
    sys.modules[name] = None  # type: ignore[assignment]  # "not installed", which mmengine is content with
try:
    from mmengine._strategy import BaseStrategy
    from mmengine.runner import BaseLoop, FlexibleRunner
finally:
    for name in hidden:
        del sys.modules[name]

__all__ = ["BaseLoop", "BaseStrategy", "FlexibleRunner"]
