"""Attention that knows documents: one function, its backends, and its names in transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tuner.errors import UserError
from tuner.model.attention_cuda import (
    activate_flash_attention_3,
    flash_attention,
    missing_for_flash,
    missing_for_varlen,
    varlen_attention,
)
from tuner.model.attention_sdpa import Pack, sdpa_attention
from tuner.model.kept_attention import keep
from tuner.parallel.ulysses import Attention


class Backend(NamedTuple):
    """A way to compute packed attention."""

    name: str  # in transformers; without "flash", from which transformers would conclude how to build masks
    attend: Callable[[Pack], torch.Tensor]
    missing: Callable[[], str | None]  # what it lacks on this machine, None if it runs


BACKENDS = {
    "flash": Backend("tuner_fa", flash_attention, missing_for_flash),
    "varlen": Backend("tuner_varlen", varlen_attention, missing_for_varlen),
    "sdpa": Backend("tuner_sdpa", sdpa_attention, lambda: None),
}
# What a layer may ask for that changes the scores and that no backend here computes.
UNSUPPORTED = ("softcap", "position_bias", "s_aux")


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str,
) -> torch.Tensor:
    """Causal attention inside each document of a pack; documents cannot see each other.

    Args:
        query: (1, H, T, D).
        key: (1, Hkv, T, D), the kv heads not repeated; value alike.
        value: (1, Hkv, T, D).
        cu_seqlens: (documents + 1,) int32, the edges of the documents from 0 to T.
        max_seqlen: tokens of the longest document.
        scale: factor of the scores before the softmax, 1/sqrt(D) if None.
        window: a token sees itself and the `window - 1` tokens before it in its document; all of them if None.
        backend: key of `BACKENDS`.

    Returns:
        (1, H, T, D), in the dtype of autocast where it is on, else of the query.

    Raises:
        UserError: cu_seqlens or max_seqlen do not fit the tensors. Values of cu_seqlens are looked at on the CPU only;
            on a GPU that would stop the queue in each layer, and `SFT` has looked already.
    """
    num_tokens = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != num_tokens:
        raise UserError(
            f"Packed attention takes one row and no KV cache, got queries {tuple(query.shape)} and keys "
            f"{tuple(key.shape)}. Pack the documents end to end in one row and pass use_cache=False."
        )
    if cu_seqlens.device.type == "cpu":
        check_edges(cu_seqlens, max_seqlen, num_tokens)
    query, key, value = in_autocast_dtype(query, key, value)
    return BACKENDS[backend].attend(Pack(query, key, value, cu_seqlens, max_seqlen, scale, window))


whole_attention = keep(packed_attention)


def in_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What goes into an attention: rotary embeddings leave q and k in fp32 where v is in the lower precision."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def check_edges(cu_seqlens: torch.Tensor, max_seqlen: int, num_tokens: int) -> None:
    """Raise unless `cu_seqlens` goes up from 0 to `num_tokens` by steps of at most `max_seqlen`."""
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    if not lengths or edges[0] != 0 or edges[-1] != num_tokens or min(lengths) < 0:
        raise UserError(
            f"cu_seqlens must go up from 0 to the {num_tokens} tokens of the pack, got {_short(edges)}. "
            "It holds the edges of the documents: lengths [3, 2] give [0, 3, 5]."
        )
    if max(lengths) > max_seqlen:
        raise UserError(f"max_seqlen={max_seqlen}, but cu_seqlens holds a document of {max(lengths)} tokens.")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{str(values[:3])[1:-1]}, ..., {str(values[-3:])[1:-1]}]"


def attention_name(backend: str) -> str:
    """The `attn_implementation` of transformers that stands for a backend."""
    return BACKENDS[backend].name


def resolve_backend(backend: str) -> str:
    """A key of `BACKENDS` that runs here: "auto" takes the fastest, a name is checked.

    FlashAttention-3 inside torch, where present, goes before the flash-attn package (FlashAttention-2).
    """
    if backend == "auto":
        order = ("varlen", "flash", "sdpa") if activate_flash_attention_3() else ("flash", "varlen", "sdpa")
        return next(name for name in order if BACKENDS[name].missing() is None)
    if backend not in BACKENDS:
        raise UserError(f"attention={backend!r} is unknown. Choose auto, {', '.join(BACKENDS)}.")
    if (missing := BACKENDS[backend].missing()) is not None:
        raise UserError(f"attention={backend!r} does not run here: {missing}. Or choose 'auto'.")
    if backend == "varlen":
        activate_flash_attention_3()
    return backend


@dataclass(frozen=True)
class Documents:
    """Stands where transformers puts a (T, T) mask: the edges of the documents, read from position ids."""

    cu_seqlens: torch.Tensor  # (documents + 1,) int32
    local_size: int | None  # window (or chunk) of a layer with local attention


def document_mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable, **options: Any
) -> torch.Tensor | Documents | None:
    """The mask function registered with transformers: `Documents` for a pack, else what "sdpa" would have.

    A forward with one row, no cache and no padding mask (training) gets no dense mask, whatever its positions. The mask
    function of transformers says itself, on neighbours, where documents begin: O(T) instead of O(T^2).
    """
    one_row = batch_size == 1 and q_length == kv_length and options.get("attention_mask") is None
    special = options.get("use_vmap", False) or options.get("allow_is_bidirectional_skip", False)
    is_plain = options.get("allow_is_causal_skip", True) and options.get("local_size") is None
    if one_row and not special and not is_plain:
        position = torch.arange(q_length, device=options.get("device", "cpu"))
        zero = torch.zeros_like(position[1:])
        sees_next = mask_function(zero, zero, position[:-1], position[1:])
        if not sees_next.any():
            begins = ~mask_function(zero, zero, position[1:], position[:-1])
            edges = [position[:1], position[1:][begins.expand_as(zero)], position[-1:] + 1]
            return Documents(torch.cat(edges).int(), options.get("local_size"))
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function, **options
    )


def attention_of(backend: str, attention: Attention = whole_attention) -> Callable[..., tuple[torch.Tensor, None]]:
    """The function registered with transformers for one backend.

    `attention` takes the forwards that bring `cu_seqlens`: `whole_attention`, or what wraps it for sequences that are
    cut over ranks. A forward without them, of a chat say, has its whole sequence here.
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | Documents | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(1, H, T, D) -> (1, T, H, D): packed where documents are known, else exactly transformers' "sdpa"."""
        cu_seqlens, max_seqlen = kwargs.pop("cu_seqlens", None), kwargs.pop("max_seqlen", None)
        documents = attention_mask if isinstance(attention_mask, Documents) else None
        is_cut = cu_seqlens is not None
        if not is_cut and module.training and attention is not whole_attention:
            raise UserError(
                "Sequences are cut over ranks, but this forward in training mode brings no cu_seqlens, so it would "
                "attend to the part of one rank. Pass cu_seqlens and max_seqlen of the whole pack."
            )
        if cu_seqlens is None and (documents is None or len(documents.cu_seqlens) == 2):
            refuse_hidden_documents(query, key, attention_mask, kwargs.get("position_ids"))
        if cu_seqlens is None and documents is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        window = check_layer(attention_mask, kwargs)
        if cu_seqlens is None and documents is not None:
            cu_seqlens = documents.cu_seqlens
            max_seqlen = int(cu_seqlens.diff().max())
        scale = kwargs.get("scaling")
        query, key, value = in_autocast_dtype(query, key, value)  # before they travel
        attend_pack = attention if is_cut else whole_attention
        output = attend_pack(query, key, value, cu_seqlens, max_seqlen, scale=scale, window=window, backend=backend)
        return output.transpose(1, 2).contiguous(), None

    return attend


def check_layer(attention_mask: torch.Tensor | Documents | None, kwargs: dict[str, Any]) -> int | None:
    """The window of a layer in a packed forward; UserError for what packed attention does not compute."""
    window = kwargs.get("sliding_window")
    if isinstance(attention_mask, torch.Tensor):
        raise UserError("Both attention_mask and cu_seqlens were given; a pack has no padding. Drop attention_mask.")
    if isinstance(attention_mask, Documents) and attention_mask.local_size is not None and window is None:
        raise UserError(
            f"This model's layers attend in chunks of {attention_mask.local_size} tokens, which packed attention does "
            "not know. Set attention = 'eager'."
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserError(f"This model's attention uses {name!r}, which packed attention lacks; use 'eager'.")
    if kwargs.get("dropout", 0.0) > 0:
        raise UserError(
            f"attention dropout {kwargs['dropout']} is not supported in packs. "
            "Set attention_dropout to 0 in the model's config.json, or use attention = 'eager'."
        )
    if kwargs.get("is_causal") is False:
        raise UserError("Packed attention is causal, and this model asks for is_causal=False. Use 'eager'.")
    return window


def refuse_hidden_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | Documents | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Raise where positions restart but a cache kept transformers from masking: documents would see each other."""
    first_forward = not isinstance(attention_mask, torch.Tensor) and 1 < query.shape[2] == key.shape[2]
    if first_forward and position_ids is not None and position_ids.ndim == 2 and (position_ids.diff() != 1).any():
        raise UserError(
            "position_ids restart inside a row, but neither cu_seqlens nor attention_mask says that these are "
            "documents, so they would see each other. Pass cu_seqlens and max_seqlen, or use_cache=False."
        )


def register() -> None:
    """Teach transformers the backends' names; done on import, harmless when repeated."""
    for backend, (name, _, _) in BACKENDS.items():
        AttentionInterface.register(name, attention_of(backend))
        AttentionMaskInterface.register(name, document_mask)


register()
