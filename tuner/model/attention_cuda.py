"""Packed attention on CUDA: the variable-length kernels of torch and of the flash-attn package."""

import importlib.util
import inspect

import torch

from tuner.errors import UserError
from tuner.model.attention_sdpa import Pack

HALF = (torch.bfloat16, torch.float16)


def flash_attention(pack: Pack) -> torch.Tensor:
    """`flash_attn_varlen_func` of flash-attn, in bf16 or fp16; (1, H, T, D)."""
    from flash_attn import flash_attn_varlen_func

    require_half(pack.query, "flash")
    output = flash_attn_varlen_func(
        *(heads_last(tensor) for tensor in pack[:3]),
        *(pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen),
        softmax_scale=pack.scale,
        causal=True,
        window_size=(-1, -1) if pack.window is None else (pack.window - 1, 0),
    )
    return output.transpose(0, 1)[None]


def varlen_attention(pack: Pack) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, in bf16 or fp16; (1, H, T, D)."""
    from torch.nn.attention.varlen import varlen_attn

    require_half(pack.query, "varlen")
    output = varlen_attn(
        *(heads_last(tensor) for tensor in pack[:3]),
        *(pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen),
        scale=pack.scale,
        window_size=(-1, 0) if pack.window is None else (pack.window - 1, 0),  # (-1, 0) is torch's way to say causal
        enable_gqa=pack.key.shape[1] != pack.query.shape[1],
    )
    return output.transpose(0, 1)[None]


def heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """(1, H, T, D) -> (T, H, D), contiguous."""
    return tensor[0].transpose(0, 1).contiguous()


def require_half(query: torch.Tensor, backend: str) -> None:
    """The kernels know no other precision."""
    if query.dtype not in HALF:
        raise UserError(
            f"attention='{backend}' got {query.dtype}; its kernel takes bf16 or fp16. "
            "Set precision = 'bf16', or attention = 'sdpa'."
        )


def missing_for_flash() -> str | None:
    """What the flash backend lacks here, with the remedy; None if it runs."""
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("flash_attn") is None:
        return "it needs flash-attn: pip install 'tuner[flash]'"
    return None


def missing_for_varlen() -> str | None:
    """What the varlen backend lacks here, with the remedy; None if it runs."""
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen: pip install -U torch"
    from torch.nn.attention.varlen import varlen_attn

    lacking = {"window_size", "enable_gqa", "scale"} - set(inspect.signature(varlen_attn).parameters)
    if lacking:
        return f"varlen_attn of torch {torch.__version__} lacks {', '.join(sorted(lacking))}: pip install -U torch"
    return None


def activate_flash_attention_3() -> bool:
    """Let torch's kernels, varlen among them, run FlashAttention-3 where it is installed, on a Hopper; say if so."""
    if missing_for_varlen() is not None or importlib.util.find_spec("flash_attn_interface") is None:
        return False
    from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls

    if "FA3" not in list_flash_attention_impls() or torch.cuda.get_device_capability()[0] != 9:
        return False
    activate_flash_attention_impl("FA3")
    return True
