"""Supervised fine-tuning: an LLM and a batch of packed documents become the loss of the trained tokens."""

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from tuner.constants import IGNORE_INDEX
from tuner.errors import UserError
from tuner.method.loss import divisor, linear_cross_entropy
from tuner.method.token_scores import scores_of, token_scores
from tuner.model.attention import check_edges
from tuner.model.attention_cut import check_whole, cut_attention, rope_by_longest
from tuner.model.head import factors, product_of
from tuner.parallel.mesh import Mesh

PROBE_LENGTHS = (3, 4)  # documents of the check that SFT runs once


class SFT(torch.nn.Module):
    """Next-token cross-entropy on the trained tokens; any packing and accumulation gives the same step.

    The base model gives hidden states, and `linear_cross_entropy` multiplies them with the output embedding, so that
    the logits of a batch never exist at once. Whether the model's head is that product, with nothing before or behind
    it (a bias, a scale, soft-capping), is tried on a few tokens; where it is not, the model's own head is used and the
    logits of the trained tokens are held, with a warning. Whether documents of a pack see each other is tried too.

    Args:
        llm: a causal LM of transformers whose weights are in memory.

    Raises:
        UserError: the model lets documents of a pack see each other (state-space or convolution layers, say).
    """

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.llm = llm
        check_whole(llm)
        check_isolation(llm)
        self.head_is_product = is_head_product(llm)
        if not self.head_is_product:
            warnings.warn(
                f"{type(llm).__name__} does more to its logits than a matrix product. Its own head is used, which "
                "holds the logits of all trained tokens of a pack: lower max_length if memory is short.",
                stacklevel=2,
            )
        self.rope_by_longest = rope_by_longest(llm)
        self.num_parts = 1  # ranks over which a sequence is cut

    def cut_sequences(self, mesh: Mesh) -> None:
        """From now on `forward` takes the part of a batch that `tuner.parallel.sequence.cut` gives this rank.

        Its loss is then this part's share of the whole: losses, and gradients, are summed over the ranks. Call it
        once, before training; what a new method tries out about the model takes whole sequences.
        """
        cut_attention(self.llm, mesh)
        self.num_parts = mesh.degrees.size

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        num_loss_tokens: float,
        loss_weights: torch.Tensor | None = None,
        mode: Literal["loss", "scores"] = "loss",
    ) -> dict[str, torch.Tensor]:
        """The loss of one micro-batch; summed over those of an optimizer step it is the mean per trained token.

        With weights it is the weighted mean: sum(weight * cross-entropy) / sum(weight), both over the whole step.

        Args:
            input_ids: (1, T) int64, documents end to end.
            labels: (1, T) int64, the next token inside each document, `IGNORE_INDEX` where there is no loss.
            position_ids: (1, T) int64, from 0 in each document.
            cu_seqlens: (documents + 1,) int32, edges of the documents, of the whole pack also where it is cut.
            max_seqlen: tokens of the longest document.
            num_loss_tokens: trained tokens of the whole optimizer step; with weights, the sum of theirs.
            loss_weights: (1, T) float, what each label weighs; None where all weigh 1.
            mode: "scores" gives the fields of `TokenScores` of the labels that are here in place of {"loss": ()}.
        """
        check_edges(cu_seqlens, max_seqlen, input_ids.shape[1] * self.num_parts)
        if self.rope_by_longest is not None and len(cu_seqlens) > 2:
            raise UserError(
                f"The rope type {self.rope_by_longest!r} of {type(self.llm).__name__} turns every document of a pack "
                "by the longest one's length, as it never would alone. Set pack = False, or the rope type to "
                "'linear' or 'yarn' in the model's config.json."
            )
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "use_cache": False,
        }
        if mode == "scores":
            return self._scores(batch, labels[0])
        weights = None if loss_weights is None else loss_weights[0]
        if not self.head_is_product:
            return {"loss": own_head_loss(self.llm, batch, labels[0], num_loss_tokens, weights)}
        hidden = self.llm.get_decoder()(**batch).last_hidden_state[0]  # (T, H)
        hidden, head = factors(self.llm, hidden)
        weights = None if weights is None else weights.to(hidden.device)
        return {"loss": linear_cross_entropy(hidden, head, labels[0].to(hidden.device), num_loss_tokens, weights)}

    def _scores(self, batch: dict[str, Any], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.head_is_product:
            trained = (labels != IGNORE_INDEX).nonzero().flatten()
            return scores_of(self.llm(**batch, logits_to_keep=trained).logits[0], labels[trained])._asdict()
        hidden = self.llm.get_decoder()(**batch).last_hidden_state[0]  # (T, H)
        return token_scores(*factors(self.llm, hidden), labels.to(hidden.device))._asdict()


def own_head_loss(
    llm: PreTrainedModel,
    batch: dict[str, Any],
    labels: torch.Tensor,
    num_loss_tokens: float,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss by the model's own logits, of the trained tokens only: (trained, V) at once."""
    trained = (labels != IGNORE_INDEX).nonzero().flatten()
    logits = llm(**batch, logits_to_keep=trained).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if loss_weights is None:
        loss_sum = F.cross_entropy(logits, labels[trained], reduction="sum")
    else:
        loss_sum = (F.cross_entropy(logits, labels[trained], reduction="none") * loss_weights[trained]).sum()
    return loss_sum / divisor(num_loss_tokens)


def probe(llm: PreTrainedModel, first_token: int) -> dict[str, Any]:
    """Two short documents, packed; only the first document's ids depend on `first_token`."""
    first, second = PROBE_LENGTHS
    ids = [first_token + i for i in range(first)] + list(range(second))
    embedding = llm.get_input_embeddings()
    device = embedding.weight.device
    return {
        "input_ids": torch.tensor([ids], device=device) % embedding.num_embeddings,
        "position_ids": torch.tensor([[*range(first), *range(second)]], device=device),
        "cu_seqlens": torch.tensor([0, first, first + second], dtype=torch.int32, device=device),
        "max_seqlen": max(PROBE_LENGTHS),
        "use_cache": False,
    }


@torch.no_grad()
def check_isolation(llm: PreTrainedModel) -> None:
    """Raise UserError if the first of two packed documents changes what the model says about the second."""
    was_training = llm.training
    llm.eval()
    one, other = (llm.get_decoder()(**probe(llm, token)).last_hidden_state for token in (1, 5))
    llm.train(was_training)
    tolerance = 8 * max(torch.finfo(one.dtype).eps, 1e-4)
    one, other = one[:, PROBE_LENGTHS[0] :].float(), other[:, PROBE_LENGTHS[0] :].float()
    # A leak moves a hidden state by about its own size; experts of other batch sizes only round differently.
    if (one - other).abs().max() > tolerance * one.abs().max():
        raise UserError(
            f"In a pack, documents see each other through layers of {type(llm).__name__} that take no document edges. "
            "This model cannot be trained on packs; choose one whose layers all attend through transformers' interface."
        )


@torch.no_grad()
def is_head_product(llm: PreTrainedModel) -> bool:
    """Whether the logits are exactly `hidden @ weight.T`, by what goes into the head and what becomes of its output.

    The head's output is replaced by large numbers, on which soft-capping or a scale cannot hide; the logits of a
    random model are too small for that.
    """
    head = llm.get_output_embeddings()
    if product_of(llm) is None:
        return False
    seen: list[torch.Tensor] = []

    def replace(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        marks = torch.linspace(-1000, 1000, output.numel(), device=output.device).view_as(output).to(output.dtype)
        seen.extend((inputs[0], marks))
        return marks

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        seen.append(output.last_hidden_state)

    hooks = [head.register_forward_hook(replace), llm.get_decoder().register_forward_hook(note)]
    was_training = llm.training
    llm.eval()
    try:
        logits = llm(**probe(llm, 1)).logits
    finally:
        llm.train(was_training)
        for hook in hooks:
            hook.remove()
    hidden, head_input, marks = seen
    return torch.equal(hidden, head_input) and torch.equal(marks.to(logits.dtype), logits)
