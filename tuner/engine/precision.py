"""The number formats that forward and backward may compute in, by name; light, for a config's check needs no more."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
