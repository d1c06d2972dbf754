"""What is asked of a model between two steps, without a trace in the training that goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tuner.engine.randomness import random_state_kept


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; modes, random states and rotary embeddings are put back.

    Some rotary embeddings of transformers turn later documents by the longest one that they have seen.
    """
    modes = [(module, module.training) for module in model.modules()]
    rotary = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in rotary]
    model.eval()
    try:
        with random_state_kept(), torch.no_grad():
            yield
    finally:
        for module, values, buffers in kept:
            vars(module).update(values)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, training in modes:
            module.training = training
