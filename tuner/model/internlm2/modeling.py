"""InternLM2's network with the published parameter names, its attention chosen through transformers' interface."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.rotary import InternLM2RotaryEmbedding

# Shapes: B batch, T tokens, H hidden, N attention heads, K key/value heads, G = N / K, D head_dim, V vocabulary


class InternLM2Attention(nn.Module):
    """Grouped-query attention behind one fused projection (its row order: `weights.split_wqkv`)."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # transformers reads it
        self.scaling = self.head_dim**-0.5
        self.is_causal = True  # transformers reads it
        num_fused_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, num_fused_heads * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **attention_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden (B, T, H) -> (B, T, H) and the attention weights where the backend returns them."""
        groups = self.num_key_value_groups
        # K is read off the width, not the config: a tensor-parallel rank holds fewer whole groups
        fused = self.wqkv(hidden).unflatten(-1, (-1, groups + 2, self.head_dim))  # (B, T, K, G + 2, D)
        # one split, since three slices would each fill a zero tensor of the fused size in the backward pass
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in fused.split((groups, 1, 1), dim=3))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **attention_kwargs
        )  # (B, T, N, D)
        return self.wo(attended.flatten(2)), weights


class InternLM2MLP(nn.Module):
    """The gated feed-forward block: w1 is the gate, w3 goes up, w2 comes down."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.w2(self.act_fn(self.w1(hidden)) * self.w3(hidden))


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each on a normed copy that is added back."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        """(B, T, H) -> (B, T, H); the keywords are those of `InternLM2Attention.forward`."""
        hidden = hidden + self.attention(self.attention_norm(hidden), **attention_kwargs)[0]
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class InternLM2PreTrainedModel(PreTrainedModel):
    """What transformers must know about every form of InternLM2."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLM2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # buffers of old checkpoints
    _input_embed_layer = "tok_embeddings"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": InternLM2DecoderLayer, "attentions": InternLM2Attention}


class InternLM2Model(InternLM2PreTrainedModel):
    """The trunk: token ids -> normed hidden states.

    The embedding has no `padding_idx`, unlike the published code's. Released configs say pad = eos = `</s>`, so
    `padding_idx` would freeze the row of a token that ends every document, and leave it zero in a model trained from
    scratch. A row that is only ever used as padding gets no gradient anyway, because nothing attends to it; the
    forward pass is the same either way.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = InternLM2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) int64, or inputs_embeds (B, T, H) -> last_hidden_state (B, T, H).

        Args:
            attention_mask: (B, T), 1 where a token is real; padding may be left or right.
            position_ids: (B, T) or (1, T) int64; by default they count on from the cache.
            kwargs: reach the attention function of every layer, `cu_seqlens` (documents + 1,) int32 and `max_seqlen`
                of packed documents among them.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens, max_seqlen = kwargs.get("cu_seqlens"), kwargs.get("max_seqlen")
        if use_cache and past_key_values is None and cu_seqlens is None:  # a pack has no next token to decode
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden, position_ids, cu_seqlens, max_seqlen)
        for layer in self.layers:
            hidden = layer(
                hidden,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    """InternLM2 with its language-model head `output`, which is tied to the embedding only if the config says so."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head; transformers would look for `lm_head`."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.output = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in the dtype of the weights, for the last `logits_to_keep` tokens (0: all).

        Args:
            labels: (B, T) int64, not shifted, -100 where no loss: transformers' convention, for its own Trainer.
                `tuner.method` shifts beforehand and does not use it.
            kwargs: as in `InternLM2Model.forward`.
        """
        trunk = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(trunk.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=trunk.past_key_values,
            hidden_states=trunk.hidden_states,
            attentions=trunk.attentions,
        )
