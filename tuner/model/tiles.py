"""Feed-forward blocks and norms by tiles of tokens: what lies inside them never exists for all tokens at once."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger("tuner")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")
"""what families call the block that looks at each token alone"""

# Shapes: B batch, T tokens, t tokens of a tile, H hidden


def tile(llm: PreTrainedModel, tile_tokens: int) -> None:
    """From now on feed-forward blocks and norms of `llm` take at most `tile_tokens` tokens at a time.

    Sequences that are no longer run as they did, bit for bit. Of a longer one the backward computes a tile's inside
    again and keeps only the input of the block; where gradient checkpointing computes the layer again anyway, that
    ends in front of a last block in tiles, so only the block's last product is computed more often than before. A
    weight's gradient is added up over the tiles, in fp32 or wider, and given to autograd once.

    Blocks are the children of a layer that are named one of `FEED_FORWARD`, take one tensor and give one; so do most
    mixtures of experts, which send each token its own way. Of those that do otherwise (GPT-OSS gives its router's
    scores as well) or draw noise in front of the router, only norms are tiled, which is logged.
    """
    whole: set[str] = set()
    for layer in decoder_layers(llm):
        for name, module in layer.named_children():
            if is_feed_forward(name, module) or is_norm(module):
                _tile(module, tile_tokens)
            elif name in FEED_FORWARD:
                whole.add(type(module).__name__)
    for module in llm.get_decoder().children():
        if is_norm(module):
            _tile(module, tile_tokens)
    if whole:
        logger.warning(
            "tile_tokens = %d: %s takes all tokens at once, for it is more than a function of each token; norms alone "
            "are tiled.",
            tile_tokens,
            ", ".join(sorted(whole)),
        )


def decoder_layers(llm: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model: what transformers can compute again, down to the first of each branch."""
    found: list[nn.Module] = []
    for child in llm.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else decoder_layers(child)
    return found


def is_feed_forward(name: str, module: nn.Module) -> bool:
    """Whether the child `name` of a layer is a feed-forward block: one tensor in, one out, token by token.

    Whether a mixture of experts gives one tensor, its forward's annotation must say.
    """
    signature = inspect.signature(module.forward)
    parameters = list(signature.parameters.values())
    takes_one = len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    if name not in FEED_FORWARD or not takes_one:
        return False
    gives_one = signature.return_annotation in (Tensor, "torch.Tensor", "Tensor")
    return not has_experts(module) or (gives_one and not adds_noise(module))


def has_experts(module: nn.Module) -> bool:
    """Whether a module is a mixture of experts."""
    return any("expert" in part for part, _ in module.named_modules())


def adds_noise(module: nn.Module) -> bool:
    """Whether a mixture of experts changes its input at random, in place, so that it cannot be computed again."""
    return any(value for part in module.modules() for name, value in vars(part).items() if "jitter" in name)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last dimension."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


class Tiled(nn.Module):
    """In front of a module's own class: its forward in tiles. The parameters stay where they are, and their names."""

    tile_tokens: int

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        plain = super().forward
        if hidden.ndim != 3 or hidden.shape[1] <= self.tile_tokens:
            return plain(hidden)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        wants = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
        if not wants:
            return _by_tiles(plain, hidden, self.tile_tokens)
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        kept = _Keep.apply(hidden)
        return _Tiles.apply(kept, self, plain, kept.grad_fn, *parameters)


def _tile(module: nn.Module, tile_tokens: int) -> None:
    if not isinstance(module, Tiled):
        kind: Any = type(module)
        module.__class__ = _tiled(kind)
    module.tile_tokens = tile_tokens
    # DeepSpeed then gathers the block's weights for all of its tiles together, in forward and in backward
    module._z3_leaf = True


@cache
def _tiled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Tiled, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _rows(num_tokens: int, tile_tokens: int) -> Iterator[slice]:
    """Tiles of near lengths, since a short last one multiplies slowly."""
    size = -(-num_tokens // -(-num_tokens // tile_tokens))
    return (slice(start, start + size) for start in range(0, num_tokens, size))


def _by_tiles(function: Any, hidden: Tensor, tile_tokens: int) -> Tensor:
    """(B, T, H) -> (B, T, H), each tile written to its place."""
    output: Tensor | None = None
    for rows in _rows(hidden.shape[1], tile_tokens):
        part = function(hidden[:, rows])
        if output is None:
            output = part.new_empty(*hidden.shape[:2], part.shape[2])
        output[:, rows] = part
    assert output is not None
    return output


class _Keep(torch.autograd.Function):
    """Itself, kept before anything is computed of it: a checkpoint that computes again has all it wants here."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The same."""
        return grad


class _Tiles(torch.autograd.Function):
    """A module's forward over all tiles, and its backward, which computes each tile again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, module: Tiled, plain: Any, kept: Any, *parameters: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H); `kept` is the node that has the input, `parameters` those that train."""
        ctx.module, ctx.plain, ctx.kept = module, plain, kept
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.random_states = _random_states(hidden) if _draws(module) else None
        return _by_tiles(plain, hidden.detach(), module.tile_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input tile by tile, of each weight the sum."""
        (hidden,) = ctx.kept.saved_tensors
        # read anew: strategies that cut weights over ranks put whole ones in their place for backward
        parameters = [parameter for parameter in ctx.module.parameters() if parameter.requires_grad]
        grad_hidden = torch.empty_like(hidden)
        totals: list[Tensor | None] = [None] * len(parameters)
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled), _as_drawn(ctx.random_states, hidden):
            for rows in _rows(hidden.shape[1], ctx.module.tile_tokens):
                part = hidden[:, rows].detach().requires_grad_()
                output = ctx.plain(part.view_as(part))  # torch's counters of FLOPs and memory take no leaf here
                grads = torch.autograd.grad(output, [part, *parameters], grad[:, rows], allow_unused=True)
                del output
                grad_hidden[:, rows] = grads[0]
                _add(totals, grads[1:])
        found = (None if total is None else total.to(own.dtype) for total, own in zip(totals, parameters))
        return grad_hidden, None, None, None, *found


def _add(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add a tile's gradients to the totals, which are in fp32 or wider: of many tiles a half would lose the last."""
    for place, grad in enumerate(grads):
        if grad is None:
            continue
        total = totals[place]
        if total is None:
            totals[place] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad


def _draws(module: nn.Module) -> bool:
    """Whether a forward of the module may be random; some routers draw experts."""
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    return module.training and (drops or has_experts(module))


def _random_states(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the CPU and of the tensor's GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(hidden.device) if hidden.is_cuda else None


def _as_drawn(states: tuple[Tensor, Tensor | None] | None, hidden: Tensor) -> AbstractContextManager:
    """Where the forward's random numbers come again; the states of before are put back."""
    return nullcontext() if states is None else _drawing(states, hidden)


@contextmanager
def _drawing(states: tuple[Tensor, Tensor | None], hidden: Tensor) -> Iterator[None]:
    with torch.random.fork_rng(devices=[hidden.device] if hidden.is_cuda else []):
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], hidden.device)
        yield
