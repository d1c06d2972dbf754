"""mmengine's runner, loop and strategy, without DeepSpeed, which it would import wherever that is installed."""

import sys

PACKAGE = "deepspeed"
is_loaded = PACKAGE in sys.modules
if not is_loaded:
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # "not installed", which mmengine is content with
try:
    from mmengine._strategy import BaseStrategy
    from mmengine.runner import BaseLoop, FlexibleRunner
finally:
    if not is_loaded:
        del sys.modules[PACKAGE]

__all__ = ["BaseLoop", "BaseStrategy", "FlexibleRunner"]
