"""InternLM2's rotary angles, a pure function of the positions: no buffer that a cast or a meta device could spoil."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tuner.errors import UserError
from tuner.model.internlm2.configuration import InternLM2Config


class InternLM2RotaryEmbedding(nn.Module):
    """Cosines and sines of plain, linear, dynamic NTK and YaRN rotary embeddings, in fp32 until the very end.

    The frequencies are computed in every forward (head_dim / 2 numbers, once per model, not per layer) instead of
    being kept in a buffer: `model.to(torch.bfloat16)` would round a buffer, `to_empty` would leave it undefined, and
    transformers' dynamic form keeps the frequencies of the longest sequence seen, so that a result would depend on
    the batches before it.

    Dynamic NTK scales theta with the length L of the sequence once L exceeds `max_position_embeddings`:
    theta' = theta * (factor * L / max_position_embeddings - (factor - 1)) ** (head_dim / (head_dim - 2)).
    L is the largest position of the batch + 1, as in the published code; of packed documents each has its own L,
    so that packing does not change what a document sees.

    `held_tokens`, set once where sequences are cut over ranks, says of `cu_seqlens` which tokens this rank holds.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.config = config
        self.held_tokens: Callable[[torch.Tensor], torch.Tensor] | None = None

    @torch.no_grad()
    def forward(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles for `position_ids` (B, T) -> cosines and sines (B, T, head_dim) in the dtype of `hidden`."""
        frequencies, scale = self._inverse_frequencies(position_ids, cu_seqlens, max_seqlen)
        angles = position_ids[..., None].float() * frequencies.to(hidden.device)  # (B, T, D / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale).to(hidden.dtype), (angles.sin() * scale).to(hidden.dtype)

    def _inverse_frequencies(
        self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None
    ) -> tuple[torch.Tensor, float]:
        """Frequencies and what cosine and sine are multiplied by, which is 1 but for YaRN.

        (D / 2,) for the whole batch, or (T, D / 2) where long packed documents have their own.
        """
        assert self.config.rope_parameters is not None
        rope_type = self.config.rope_parameters["rope_type"]
        with torch.device("cpu"):  # the same digits wherever the model lives
            if rope_type == "default":
                return LlamaRotaryEmbedding.compute_default_rope_parameters(self.config)
            if rope_type in ("linear", "yarn"):
                return ROPE_INIT_FUNCTIONS[rope_type](self.config)
            longest = int(position_ids.max()) + 1 if max_seqlen is None else max_seqlen
            if cu_seqlens is None or longest <= self.config.max_position_embeddings:
                return self._dynamic(longest), 1.0
            return self._dynamic_per_document(cu_seqlens.cpu(), position_ids.shape[-1]), 1.0

    def _dynamic(self, length: int) -> torch.Tensor:
        """Frequencies (D / 2,) of a sequence of `length` tokens; up to max_position_embeddings, the plain ones."""
        return ROPE_INIT_FUNCTIONS["dynamic"](self.config, torch.device("cpu"), seq_len=length)[0]

    def _dynamic_per_document(self, cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
        lengths = cu_seqlens.diff()
        document = torch.arange(len(lengths)).repeat_interleave(lengths)  # (T,)
        if self.held_tokens is not None:
            document = document[self.held_tokens(cu_seqlens)]
        if len(document) != num_tokens:
            raise UserError(
                f"Dynamic rope scaling needs each token's document, but {num_tokens} of {len(document)} tokens came. "
                "Pass the whole pack, or its part on this rank once the method's cut_sequences was called."
            )
        frequencies = torch.stack([self._dynamic(length) for length in lengths.tolist()])  # (documents, D / 2)
        return frequencies[document]
