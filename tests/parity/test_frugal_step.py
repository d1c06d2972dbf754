"""Whatever saves memory changes no step: loss and gradient of every parameter are those of the plain form."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from test_sequence_parallel import norms_in_their_dtype
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.model.adapter import LoRA, attach
from tuner.model.checkpointing import ATTENTION, Choice, choice_of, enable_gradient_checkpointing
from tuner.model.fingerprint import Base
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.memory import Memory
from tuner.model.tiles import Tiled, tile
from tuner.plan.live import LiveBytes

SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "internlm2": lambda: InternLM2Config(**SIZES),
    "internlm2, tied": lambda: InternLM2Config(**SIZES, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral, window": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "olmo2, norms behind blocks": lambda: transformers.Olmo2Config(**SIZES),
}
LENGTHS = [9, 1, 17, 4, 12]
NUM_TOKENS = sum(LENGTHS)
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
Step = tuple[float, dict[str, Tensor]]


def make_llm(model: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(MODELS[model](), attn_implementation="tuner_sdpa").to(dtype)
    for parameter in llm.parameters():  # as drawn, attention is nearly uniform and says little
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return norms_in_their_dtype(llm).train() if dtype == torch.float64 else llm.train()


def make_batch(lengths: list[int] = LENGTHS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 60, (1, NUM_TOKENS), generator=generator)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    labels[:, edges[1:] - 1] = -100
    return {
        "input_ids": torch.randint(0, 60, (1, NUM_TOKENS), generator=generator),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": edges.int(),
        "max_seqlen": max(lengths),
        "num_loss_tokens": int((labels != -100).sum()),
    }


def run(llm: PreTrainedModel, method: SFT | None = None, lengths: list[int] = LENGTHS) -> Step:
    llm.zero_grad()
    loss = (method or SFT(llm))(**make_batch(lengths))["loss"]
    loss.backward()
    gradients = {name: own.grad.clone() for name, own in llm.named_parameters() if own.grad is not None}
    return loss.item(), gradients


@cache
def plain(model: str, dtype: torch.dtype) -> Step:
    return run(make_llm(model, dtype))


def apart(got: Step, expected: Step) -> float:
    """The largest difference of the loss and of a parameter's gradient, relative to their size."""
    assert got[1].keys() == expected[1].keys()
    assert all(gradient.norm() > 0 for gradient in expected[1].values())
    differences = [(got[1][name] - value).norm() / value.norm() for name, value in expected[1].items()]
    return max(abs(got[0] / expected[0] - 1), *(difference.item() for difference in differences))


def save(llm: PreTrainedModel, checkpointing: Choice = False, tiles: int | None = None, offload: bool = False) -> None:
    if tiles is not None:
        tile(llm, tiles)
    if checkpointing:
        enable_gradient_checkpointing(llm, checkpointing, offload=offload)


TECHNIQUES: dict[str, Callable[[PreTrainedModel], None]] = {
    "tiles": partial(save, tiles=8),
    "tiles, layers again": partial(save, tiles=8, checkpointing=True),
    "layers again": partial(save, checkpointing=True),
    "every second layer again": partial(save, checkpointing=2),
    "all but attention again": partial(save, checkpointing="attention"),
    "tiles, all but attention again": partial(save, tiles=8, checkpointing="attention"),
    "layers again, offloaded": partial(save, checkpointing=True, offload=True),
    "tiles, all but attention again, offloaded": partial(save, tiles=8, checkpointing="attention", offload=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("model", MODELS)
def test_the_step_is_that_of_the_plain_form(model: str, technique: str, dtype: torch.dtype) -> None:
    llm = make_llm(model, dtype)
    TECHNIQUES[technique](llm)
    assert apart(run(llm), plain(model, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_step_under_autocast_comes_as_near_to_the_exact_one_as_the_plain_form(technique: str) -> None:
    exact, llm = plain("internlm2", torch.float64), make_llm("internlm2", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(llm)
    TECHNIQUES[technique](llm)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(llm)
    assert apart(as_double(got), exact) < 1.5 * apart(as_double(expected), exact)


def as_double(step: Step) -> Step:
    return step[0], {name: gradient.double() for name, gradient in step[1].items()}


def with_lora(dropout: float) -> PreTrainedModel:
    """As it may look in the middle of training: A and B drawn, and what they stand on frozen."""
    llm = make_llm("llama", torch.float32)
    weights = {name: weight.clone() for name, weight in llm.state_dict().items()}
    attach(llm, LoRA(rank=4, alpha=8.0, dropout=dropout), Base("somewhere", "random", 0), weights=weights)
    torch.manual_seed(1)
    for parameter in llm.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return norms_in_their_dtype(llm.double())


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_adapters_get_the_gradients_of_the_plain_form(technique: str) -> None:
    llm = with_lora(0.0)
    expected = run(llm)
    TECHNIQUES[technique](llm)
    assert apart(run(llm), expected) < 1e-12
    assert len(expected[1]) == 3 * 7 * 2


def test_a_tile_that_is_computed_again_draws_the_same_dropout() -> None:
    """The gradient along a direction is the slope of the loss, of which the same numbers are drawn."""
    llm = with_lora(0.3)
    tile(llm, 8)
    method = SFT(llm)
    name, parameter = next((name, own) for name, own in llm.named_parameters() if "gate_proj.lora_A" in name)

    def loss() -> float:
        torch.manual_seed(5)
        return method(**make_batch())["loss"].item()

    torch.manual_seed(5)
    gradient = run(llm, method)[1][name]
    direction, step, sides = torch.randn_like(parameter), 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * direction
        sides.append(loss())
        with torch.no_grad():
            parameter -= sign * step * direction
    slope = (sides[0] - sides[1]) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """How many tokens came into feed-forward blocks' first products, call by call."""
    seen: list[int] = []
    kept = torch.nn.functional.linear

    def note(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == SIZES["intermediate_size"]:
            seen.append(hidden.shape[1])
        return kept(hidden, weight, bias)

    torch.nn.functional.linear = note
    try:
        yield seen
    finally:
        torch.nn.functional.linear = kept


def test_tiles_are_no_longer_than_asked_and_checkpoints_compute_them_no_more_often() -> None:
    llm = make_llm("internlm2", torch.float32)
    with counted_calls() as plainly:
        run(llm)
    tile(llm, 8)
    with counted_calls() as in_tiles:
        run(llm)
    enable_gradient_checkpointing(llm)
    with counted_calls() as checkpointed:
        run(llm)
    assert plainly[-1] == NUM_TOKENS
    for seen in (in_tiles, checkpointed):
        assert max(seen[len(plainly) - 6 :]) <= 8
        assert sum(seen) == sum(plainly) + 2 * 3 * NUM_TOKENS  # gate and up of three layers, once more in backward


def test_short_sequences_are_computed_as_before_bit_for_bit() -> None:
    llm = make_llm("llama", torch.float32)
    tile(llm, NUM_TOKENS)
    got, expected = run(llm), plain("llama", torch.float32)
    assert got[0] == expected[0]
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())


def test_each_layer_has_tiles_and_names_stay() -> None:
    for model in MODELS:
        llm = make_llm(model, torch.float32)
        names = list(llm.state_dict())
        tile(llm, 8)
        assert list(llm.state_dict()) == names
        assert sum(isinstance(module, Tiled) for module in llm.modules()) == 3 * 3 + 1


def test_a_weight_gets_its_gradient_once_however_many_tiles() -> None:
    llm = make_llm("internlm2", torch.float32)
    calls: list[str] = []
    for name, parameter in llm.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    tile(llm, 4)
    run(llm)
    assert sorted(calls) == sorted(name for name, _ in llm.named_parameters())


@contextmanager
def counted_scores() -> Iterator[list[int]]:
    """How many tokens attention was computed for, call by call."""
    seen: list[int] = []
    kept = torch.nn.functional.scaled_dot_product_attention

    def note(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(query.shape[2])
        return kept(query, *rest, **options)

    torch.nn.functional.scaled_dot_product_attention = note
    try:
        yield seen
    finally:
        torch.nn.functional.scaled_dot_product_attention = kept


def test_each_choice_computes_again_what_it_says() -> None:
    found = {}
    for choice in (False, True, 2, 3, ATTENTION):
        llm = make_llm("internlm2", torch.float32)
        method = SFT(llm)
        save(llm, choice)
        assert choice_of(llm) == choice
        with counted_scores() as scores, counted_calls() as blocks:
            run(llm, method)
        found[str(choice)] = (sum(scores) / NUM_TOKENS, sum(blocks) / NUM_TOKENS / 2)
    assert found == {"False": (3, 3), "True": (6, 6), "2": (5, 5), "3": (4, 4), ATTENTION: (3, 6)}


def test_a_choice_that_means_nothing_is_refused() -> None:
    llm = make_llm("llama", torch.float32)
    for choice in (-1, "everything", 0.5):
        with pytest.raises(UserError, match="every n-th layer, or 'attention'"):
            enable_gradient_checkpointing(llm, choice)  # type: ignore[arg-type]
    llm.set_attn_implementation("eager")
    with pytest.raises(UserError, match="keeps the output of tuner's attention, and this model has 'eager'"):
        enable_gradient_checkpointing(llm, ATTENTION)


@pytest.mark.parametrize("lengths", [LENGTHS, [NUM_TOKENS]], ids=["documents", "one document"])
@pytest.mark.parametrize("choice", [True, ATTENTION])
def test_offloading_changes_no_bit_and_leaves_nothing_on_the_host(choice: Choice, lengths: list[int]) -> None:
    llm = make_llm("llama", torch.float32)
    save(llm, choice)
    expected = run(llm, lengths=lengths)
    checkpointing = enable_gradient_checkpointing(llm, choice, offload=True)
    memory = checkpointing.host
    assert memory is not None
    seen: list[int] = []
    llm.get_decoder().norm.register_forward_hook(lambda *_: seen.append(memory.host_bytes))
    got = run(llm, SFT(llm), lengths)
    assert got[0] == expected[0]
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    # What a layer begins with, and the output of its attention with the log-sum-exp of the longer documents; of several
    # SDPA has copies, once for its backward and once joined.
    output, log_sum_exp = SIZES["num_attention_heads"] * 8 * 4, SIZES["num_attention_heads"] * 4
    attention = (2 if len(lengths) > 1 else 1) * output + log_sum_exp
    per_token = SIZES["hidden_size"] * 4 + (attention if choice == ATTENTION else 0)
    assert seen[-1] == pytest.approx(3 * NUM_TOKENS * per_token, rel=0.05)
    gc.collect()
    assert memory.host_bytes == 0


MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "deepseek v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 8}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "phimoe": lambda: transformers.PhimoeConfig(**SIZES, num_local_experts=4),
}  # fmt: skip


@pytest.mark.parametrize("model", ["mixtral", "deepseek v3"])
def test_experts_are_tiled_too_and_get_the_gradients_of_the_plain_form(model: str) -> None:
    """In fp32, in which their products of groups are."""
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(MIXTURES[model](), attn_implementation="eager").train()
    ids = make_batch()["input_ids"]

    def step() -> Step:
        llm.zero_grad()
        loss = llm(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = {name: own.grad.clone() for name, own in llm.named_parameters() if own.grad is not None}
        return loss.item(), {name: gradient for name, gradient in found.items() if gradient.norm() > 0}

    expected = step()
    Memory(tile_tokens=8, gradient_checkpointing=True).save(llm)
    assert sum(isinstance(module, Tiled) for module in llm.modules()) == 3 * 3 + 1
    assert apart(step(), expected) < 2e-6


@pytest.mark.parametrize("model", ["gpt-oss", "phimoe"])
def test_experts_that_are_more_than_a_function_of_each_token_stay_whole_which_is_said(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(MIXTURES[model]())
    tile(llm, 8)
    assert sum(isinstance(module, Tiled) for module in llm.modules()) == 3 * 2 + 1
    assert "takes all tokens at once" in caplog.text


def peak_of_a_step(num_tokens: int, document: int, **settings: Any) -> int:
    """Bytes of living tensors, weights left out."""
    llm = make_llm("internlm2", torch.float32)
    Memory(**settings).save(llm)
    method, ids = SFT(llm), torch.zeros(1, num_tokens, dtype=torch.int64)
    edges = torch.arange(0, num_tokens + 1, document, dtype=torch.int32)
    counter = LiveBytes()
    counter.ignore(list(llm.parameters()))
    with counter:
        method(ids, ids, torch.arange(num_tokens)[None] % document, edges, document, num_tokens)["loss"].backward()
    return counter.peak


def test_memory_grows_linearly_and_each_setting_saves_what_it_is_for() -> None:
    found = {}
    for name, settings in {
        "all": {},
        "layers again": {"gradient_checkpointing": True},
        "attention kept": {"gradient_checkpointing": ATTENTION},
        "tiles": {"gradient_checkpointing": True, "tile_tokens": 256},
    }.items():
        for documents in (1, 4) if name == "tiles" else (4,):  # a long one, or short ones
            peaks = [peak_of_a_step(length, length // documents, **settings) for length in (1024, 2048, 3072)]
            assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.03), (name, documents)
            found[name] = (peaks[2] - peaks[1]) / 1024
    assert found["tiles"] < 0.75 * found["layers again"] < 0.4 * found["all"]
    kept = found["attention kept"] - found["layers again"]
    # SDPA's copies of several documents; of the layer that is computed again they are there either way
    assert kept == pytest.approx(2 * 2 * (8 * 8 * 4) + 2 * 8 * 4, rel=0.1)
