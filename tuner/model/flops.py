"""FLOPs of a training step: what the model needs (MFU) and what the hardware computes (HFU)."""

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tuner.errors import UserError
from tuner.model.checkpointing import ATTENTION, Choice, recomputed_layers
from tuner.model.hollow import whole_shape


class Matmuls(NamedTuple):
    """The matrix products of a causal LM, read from its weights.

    Embedding look-ups, norms and activations multiply no matrices and are not counted. An adapter's A and B are trained
    products as any other; the row lengths that DoRA computes of its weights, once a forward, are not counted.
    """

    layers: int  # weights that each token is multiplied with, the head not counted
    trained_layers: int  # those of them that get a gradient
    head: int  # weights of the output embedding, counted for trained tokens only
    trained_head: int
    attention: tuple[tuple[int, int | None], ...]  # of each layer: query heads x head size, window


def count_matmuls(llm: PreTrainedModel) -> Matmuls:
    """Read the matrix products from a model's parameters; a mixture of experts counts the experts a token visits.

    Raises:
        UserError: layers whose cost is not known (linear attention, convolutions).
    """
    of_head = {id(parameter): parameter for parameter in llm.get_output_embeddings().parameters()}  # with an adapter's
    embeddings = {id(module.weight) for module in llm.modules() if isinstance(module, torch.nn.Embedding)}
    settings = llm.config.get_text_config().to_dict()
    layers = trained_layers = 0
    for name, parameter in llm.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) < 2 or id(parameter) in embeddings or id(parameter) in of_head:
            continue
        used = shape.numel()
        if len(shape) == 3 and "num_experts_per_tok" in settings:
            used = used // shape[0] * settings["num_experts_per_tok"]
        elif len(shape) > 2:
            raise UserError(f"The cost of {name}, of shape {tuple(shape)}, is not known; no MFU for this model.")
        layers += used
        trained_layers += used * parameter.requires_grad
    matrices = [weight for weight in of_head.values() if len(whole_shape(weight)) == 2]
    head = sum(whole_shape(weight).numel() for weight in matrices)
    trained_head = sum(whole_shape(weight).numel() for weight in matrices if weight.requires_grad)
    return Matmuls(layers, trained_layers, head, trained_head, attention_layers(settings))


def attention_layers(settings: dict[str, Any]) -> tuple[tuple[int, int | None], ...]:
    """Query heads x head size and window of each layer. GQA saves no FLOPs here: each query head has its scores."""
    heads = settings["num_attention_heads"]
    head_size = settings.get("head_dim") or settings["hidden_size"] // heads
    kinds = settings.get("layer_types") or ["attention"] * settings["num_hidden_layers"]
    windows = {"full_attention": None, "attention": None, "sliding_attention": settings.get("sliding_window")}
    if settings.get("layer_types") is None and settings.get("use_sliding_window", True):
        windows["attention"] = settings.get("sliding_window")  # Mistral: all layers or none
    if unknown := set(kinds) - set(windows):
        raise UserError(f"The cost of layers of type {', '.join(sorted(unknown))} is not known; no MFU for this model.")
    return tuple((heads * head_size, windows[kind]) for kind in kinds)


def count_matmuls_of_config(config: PreTrainedConfig) -> Matmuls:
    """`count_matmuls` without weights: the model is laid out on torch's meta device, every weight trained."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
        return count_matmuls(llm)


def attention_flops(matmuls: Matmuls, num_tokens: int, sum_squared_lengths: int) -> float:
    """FLOPs of scores and weighted values in one forward over all layers.

    A causal document of n tokens has n^2 / 2 pairs, each costs 2 products of `head size` multiply-adds per head:
    4 x heads x head size x sum(n^2) / 2. PaLM's appendix B counts n^2 pairs; half of those are never computed. With a
    window a token sees at most `window` others, so the smaller of the two bounds is taken.
    """
    full = sum_squared_lengths / 2
    pairs = (
        width * (full if window is None else min(full, window * num_tokens)) for width, window in matmuls.attention
    )
    return 4.0 * sum(pairs)


def model_flops(matmuls: Matmuls, num_tokens: int, sum_squared_lengths: int, num_loss_tokens: int) -> float:
    """FLOPs that a forward and backward need, the numerator of MFU; nothing that is computed twice counts twice.

    2 per weight and token forward, 2 for the gradient of the input, 2 for the gradient of the weight if it is trained:
    6 N T as in PaLM (arXiv 2204.02311, appendix B) and in Megatron-LM's count, which differ from this one in
    - attention: causal, and sum(n^2) of the real documents instead of T x context length, so that packing short
      documents is not credited with attention it never computes;
    - the head: only the `num_loss_tokens` that are trained, as the loss multiplies no others.

    Args:
        matmuls: from `count_matmuls`.
        num_tokens: tokens of all documents of the step, padding not counted.
        sum_squared_lengths: sum of squared document lengths.
        num_loss_tokens: trained tokens of the step.
    """
    per_token = 4 * matmuls.layers + 2 * matmuls.trained_layers
    per_loss_token = 4 * matmuls.head + 2 * matmuls.trained_head
    attention = 3 * attention_flops(matmuls, num_tokens, sum_squared_lengths)  # backward is twice the forward
    return float(per_token * num_tokens + per_loss_token * num_loss_tokens) + attention


def hardware_flops(
    matmuls: Matmuls,
    num_tokens: int,
    sum_squared_lengths: int,
    num_loss_tokens: int,
    *,
    gradient_checkpointing: Choice,
) -> float:
    """FLOPs that are computed, the numerator of HFU: `model_flops` and what is computed again.

    Again: the scores, in the backward of every flash kernel (half an attention forward); with gradient checkpointing
    the forward of the layers that it chooses (torch stops it before the last product of a layer, which is counted all
    the same), without the scores where those are kept. The fused head computes nothing twice. Feed-forward blocks in
    tiles are computed again also in layers that are not; that is not counted.
    """
    forward = attention_flops(matmuls, num_tokens, sum_squared_lengths)
    again = forward / 2
    is_again = recomputed_layers(gradient_checkpointing, len(matmuls.attention))
    again += 2.0 * matmuls.layers * num_tokens * sum(is_again) / len(is_again)
    if gradient_checkpointing != ATTENTION:
        chosen = tuple(attention for attention, chosen in zip(matmuls.attention, is_again) if chosen)
        again += attention_flops(matmuls._replace(attention=chosen), num_tokens, sum_squared_lengths)
    return model_flops(matmuls, num_tokens, sum_squared_lengths, num_loss_tokens) + again
