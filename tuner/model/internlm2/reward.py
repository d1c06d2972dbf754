"""InternLM2 as a reward model: one score per conversation, read at its last token."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from tuner.model.internlm2.configuration import REWARD_TOKEN_ID, InternLM2Config
from tuner.model.internlm2.modeling import InternLM2Model, InternLM2PreTrainedModel


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """The published reward form: the trunk and `v_head`, a row that turns a hidden state into a score.

    A conversation to score ends with `config.reward_token_id` (92527 in the released models). The model reads the
    last attended position whatever stands there; ending the conversation rightly is the caller's part.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        if config.reward_token_id is None:
            config.reward_token_id = REWARD_TOKEN_ID
        self.model = InternLM2Model(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutputWithPast:
        """Scores `logits` (B, 1), or (documents, 1) of packed documents when `cu_seqlens` is among `kwargs`.

        All arguments are those of `InternLM2Model.forward`. There is no loss here: what two scores should be to each
        other is the training method's business.
        """
        trunk = self.model(input_ids, attention_mask=attention_mask, **kwargs)
        last = _last_attended(trunk.last_hidden_state, attention_mask, kwargs.get("cu_seqlens"))
        return SequenceClassifierOutputWithPast(
            logits=self.v_head(last),
            past_key_values=trunk.past_key_values,
            hidden_states=trunk.hidden_states,
            attentions=trunk.attentions,
        )


def _last_attended(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The hidden state (rows, H) that ends each sequence, out of (B, T, H)."""
    if cu_seqlens is not None:
        return hidden[0, cu_seqlens[1:].long() - 1]
    if attention_mask is None:
        return hidden[:, -1]
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=hidden.device)
    ends = (attention_mask[:, -hidden.shape[1] :] * positions[-hidden.shape[1] :]).argmax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), ends]
