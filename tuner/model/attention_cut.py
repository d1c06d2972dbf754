"""A model whose sequences are cut over ranks: its attention is bound to the mesh, once, before training."""

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from tuner.errors import UserError
from tuner.model.attention import BACKENDS, attention_of, document_mask, packed_attention
from tuner.model.internlm2.rotary import InternLM2RotaryEmbedding
from tuner.model.kept_attention import keep
from tuner.parallel.mesh import Mesh, check_heads, head_counts
from tuner.parallel.ring import ring
from tuner.parallel.sequence import held_tokens
from tuner.parallel.ulysses import ulysses

BLIND = "tuner_blind"  # an attention that sees nothing: whatever then passes between tokens, passes beside it
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings that look at the longest sequence of a batch


def cut_attention(llm: PreTrainedModel, mesh: Mesh) -> None:
    """From now on `llm` takes batches that `tuner.parallel.sequence.cut` has cut for the ranks of `mesh.sequence`.

    Its backend stays, and a forward without `cu_seqlens` in evaluation mode (generation) still takes whole sequences.
    A later call with another mesh of like degrees rebinds the models of the earlier one too.

    Raises:
        UserError: the ranks cannot share the heads, or the model does something that knows only whole sequences.
    """
    if mesh.degrees.size == 1:
        return
    backend = _backend_of(llm)
    check_heads(*head_counts(llm.config.get_text_config()), mesh.degrees.ulysses)
    _cut_rotary(llm, mesh)
    _check_only_attention_mixes(llm)
    attention = ulysses(keep(ring(packed_attention, mesh.ring)), mesh.ulysses)
    name = f"{BACKENDS[backend].name}_ulysses{mesh.degrees.ulysses}_ring{mesh.degrees.ring}"
    AttentionInterface.register(name, attention_of(backend, attention))
    AttentionMaskInterface.register(name, document_mask)
    llm.set_attn_implementation(name)


def check_whole(llm: PreTrainedModel) -> None:
    """UserError where `llm` takes parts of sequences already: what is tried out on it takes whole ones."""
    if "_ulysses" in (llm.config._attn_implementation or ""):
        raise UserError(
            f"The sequences of this {type(llm).__name__} are cut over ranks already. Build the method on the model "
            "first and call its cut_sequences then."
        )


def _backend_of(llm: PreTrainedModel) -> str:
    """The backend that a model was built with."""
    current = llm.config._attn_implementation
    for backend, (name, _, _) in BACKENDS.items():
        if current == name or current.startswith(f"{name}_ulysses"):
            return backend
    raise UserError(
        f"attention={current!r} cannot attend to sequences that are cut over ranks. "
        f"Set attention = 'auto', or one of {', '.join(BACKENDS)}."
    )


def rope_by_longest(llm: PreTrainedModel) -> str | None:
    """The rope type of a model that turns every document of a pack by the longest one's length; None for others.

    InternLM2's own goes by each document's length.
    """
    if any(isinstance(module, InternLM2RotaryEmbedding) for module in llm.modules()):
        return None
    parameters = getattr(llm.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [entry.get("rope_type") for entry in (parameters, *parameters.values()) if isinstance(entry, dict)]
    return next((kind for kind in LENGTH_DEPENDENT if kind in kinds), None)


def _cut_rotary(llm: PreTrainedModel, mesh: Mesh) -> None:
    """InternLM2's learns which tokens are here; those of transformers that look at a batch's length are refused."""
    for module in llm.modules():
        if isinstance(module, InternLM2RotaryEmbedding):
            module.held_tokens = partial(held_tokens, degrees=mesh.degrees, rank=mesh.sequence.rank)
    if (kind := rope_by_longest(llm)) is not None:
        raise UserError(
            f"The rope type {kind!r} of {type(llm).__name__} depends on the longest sequence of a batch, which a "
            "rank does not see where sequences are cut. Set it to 'linear' or 'yarn', or use one rank per sequence."
        )


def _check_only_attention_mixes(llm: PreTrainedModel) -> None:
    """Raise where tokens see each other beside the attention: there a cut would show.

    With an attention that sees nothing, a token's hidden state must have no gradient whatever for another's embedding.
    """
    implementation, was_training = llm.config._attn_implementation, llm.training
    embedding = llm.get_input_embeddings()  # called, since its weight may be cut over ranks
    early, late = embedding(torch.arange(8, device=embedding.weight.device)).detach().split(4)
    llm.set_attn_implementation(BLIND)
    llm.eval()
    try:
        with torch.enable_grad():
            early = early.clone().requires_grad_()
            inputs = torch.cat([early, late])[None]
            hidden = llm.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, len(early) :]
            marks = torch.linspace(1, 2, hidden.numel(), dtype=hidden.dtype, device=hidden.device).view_as(hidden)
            (gradient,) = torch.autograd.grad((hidden * marks).sum(), early)
    finally:
        llm.set_attn_implementation(implementation)
        llm.train(was_training)
    if gradient.count_nonzero():
        raise UserError(
            f"Layers of {type(llm).__name__} let tokens see each other beside its attention (state-space or "
            "convolution layers, say), so its sequences cannot be cut over ranks. Use one rank per sequence."
        )


def _blind(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """(B, H, T, D) -> zeros (B, T, H, D)."""
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return query.new_zeros(shape), None


AttentionInterface.register(BLIND, _blind)
AttentionMaskInterface.register(BLIND, document_mask)
