"""The head of a language model as one matrix product, also where an adapter adds its own to it."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.model.adapter import NAME, adapter_of


def product_of(llm: PreTrainedModel) -> nn.Linear | None:
    """The layer whose weight makes the logits; None where something is added to its product that is no product."""
    head = llm.get_output_embeddings()
    if has_adapter(llm):
        head = head.base_layer if NAME not in head.lora_variant else None  # DoRA scales the sum
    return head if type(head) is nn.Linear and head.bias is None else None


def has_adapter(llm: PreTrainedModel) -> bool:
    """Whether the head is one of the targets."""
    return adapter_of(llm) is not None and "base_layer" in dict(llm.get_output_embeddings().named_children())


def factors(llm: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices whose product are the logits, for a head of which `product_of` gave a layer.

    With an adapter, h W^T + s (h A^T) B^T is (h, s h A^T) times (W, B)^T: one product that is 1/64 wider for rank 64
    and hidden size 4096. Its weight is copied, and has a gradient of which only B's part is used.

    Args:
        hidden: (T, H).

    Returns:
        (T, H) and (V, H); with an adapter (T, H + rank) and (V, H + rank).
    """
    head = llm.get_output_embeddings()
    if not has_adapter(llm):
        return hidden, head.weight
    down, up = head.lora_A[NAME].weight, head.lora_B[NAME].weight
    low = head.lora_dropout[NAME](hidden).to(down.dtype) @ down.t() * head.scaling[NAME]  # (T, rank)
    wide = torch.promote_types(head.base_layer.weight.dtype, up.dtype)
    weight = torch.cat([head.base_layer.weight.to(wide), up.to(wide)], dim=1)
    return torch.cat([hidden, low.to(hidden.dtype)], dim=1), weight
