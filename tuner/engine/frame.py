"""mmengine's runner, loop, hook and strategy, without the packages that it would import wherever they are installed."""

import sys

UNASKED = ("deepspeed", "bitsandbytes", "transformers")
"""seconds each, for optimizers of theirs that it registers; and what they print of a missing GPU or of kernels"""

loaded = {name: sys.modules.get(name) for name in UNASKED}
sys.modules |= dict.fromkeys(UNASKED)  # type: ignore[arg-type]  # None: "not installed", which mmengine is content with
try:
    from mmengine._strategy import BaseStrategy
    from mmengine.hooks import Hook
    from mmengine.runner import BaseLoop, FlexibleRunner
finally:
    for name, module in loaded.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module

__all__ = ["BaseLoop", "BaseStrategy", "FlexibleRunner", "Hook"]
