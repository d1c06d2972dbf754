"""Models whose attention knows documents: packed equals separate, nobody sees a neighbour, generation is unchanged."""

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.errors import UserError
from tuner.model import attention
from tuner.model.attention import Documents, attention_name
from tuner.model.attention_sdpa import MIN_BUCKET
from tuner.model.internlm2.configuration import InternLM2Config

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
WINDOWED = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}  # the second layer has the window
CONFIGS: dict[str, Callable] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-windowed": lambda: transformers.Qwen2Config(**SIZES, **WINDOWED),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "internlm2": lambda: InternLM2Config(**SIZES, bias=False),
}
LENGTHS = [7, 1, 12, 4, *([3] * MIN_BUCKET)]
families = pytest.mark.parametrize("family", CONFIGS)


def make_llm(family: str, implementation="tuner_sdpa", dtype=torch.float64, sharpen=3.0) -> PreTrainedModel:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=implementation).to(dtype)
    assert llm.config._attn_implementation == implementation
    with torch.no_grad():  # initial weights are so small that a leak would be small too
        for parameter in llm.parameters():
            parameter.mul_(sharpen)
    return llm.eval()


def make_pack(lengths: list[int]) -> dict:
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.randint(1, SIZES["vocab_size"], (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "use_cache": False,
    }


def gradients(llm: PreTrainedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    llm.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return {name: parameter.grad for name, parameter in llm.named_parameters()}


def run_packed(llm: PreTrainedModel, lengths: list[int]) -> tuple[torch.Tensor, dict]:
    logits = llm(**make_pack(lengths)).logits
    return logits, gradients(llm, logits)


def run_separate(llm: PreTrainedModel, lengths: list[int]) -> tuple[torch.Tensor, dict]:
    ids = make_pack(lengths)["input_ids"].split(lengths, dim=1)
    logits = torch.cat([llm(document, use_cache=False).logits for document in ids], dim=1)
    return logits, gradients(llm, logits)


def assert_same_run(got: tuple[torch.Tensor, dict], expected: tuple[torch.Tensor, dict], tolerance: float) -> None:
    assert got[1].keys() == expected[1].keys()
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=tolerance * max(1.0, expected[0].abs().max().item()))
    # measured by the largest gradient: a key's bias has none in exact arithmetic, only the rounding of large sums
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=tolerance * max(1.0, largest))


@families
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_packed_equals_separate_in_logits_and_in_every_gradient(family, dtype, tolerance):
    """Separate runs use transformers' own sdpa."""
    sharpen = 3.0 if dtype == torch.float64 else 1.0  # sharp attention also sharpens fp32's rounding
    packed, separate = (make_llm(family, name, dtype, sharpen) for name in ("tuner_sdpa", "sdpa"))
    assert_same_run(run_packed(packed, LENGTHS), run_separate(separate, LENGTHS), tolerance)


@families
def test_gradient_checkpointing_changes_no_bit(family):
    """The document edges reach the recomputation."""
    llm = make_llm(family).train()
    plain = run_packed(llm, LENGTHS)
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    again = run_packed(llm, LENGTHS)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


@families
@pytest.mark.parametrize("changed", [0, 2, 6], ids=["first", "middle", "tiny"])
def test_a_changed_document_leaves_no_trace_in_the_logits_and_gradients_of_the_others(family, changed):
    llm = make_llm(family, dtype=torch.float32)
    pack = make_pack(LENGTHS)
    edges = pack["cu_seqlens"].tolist()
    inside = torch.zeros(edges[-1], dtype=torch.bool)
    inside[edges[changed] : edges[changed + 1]] = True
    other = pack | {"input_ids": torch.where(inside, (pack["input_ids"] + 17) % 59 + 1, pack["input_ids"])}

    def run(batch: dict) -> tuple[torch.Tensor, dict]:
        logits = llm(**batch).logits
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits) * ~inside[:, None]  # the others' loss
        llm.zero_grad()
        (logits * weights).sum().backward()
        return logits, {name: parameter.grad for name, parameter in llm.named_parameters()}

    (logits, grads), (new_logits, new_grads) = run(pack), run(other)
    assert torch.equal(logits[:, ~inside], new_logits[:, ~inside])
    assert not torch.equal(logits[:, inside], new_logits[:, inside])
    assert all(torch.equal(grads[name], new_grads[name]) for name in grads)


@families
def test_no_dense_mask_is_built_for_a_pack(family, monkeypatch):
    """Neither by the mask function nor by the way: no bool or float tensor of T x T appears."""
    seen = []

    def spy(**options):
        seen.append(original(**options))
        return seen[-1]

    original = attention.document_mask
    monkeypatch.setitem(transformers.masking_utils.AttentionMaskInterface._global_mapping, "tuner_sdpa", spy)
    llm = make_llm(family)
    for lengths in (LENGTHS, [20]):  # a single document longer than the window too
        llm(**make_pack(lengths))
    assert seen
    assert not [mask for mask in seen if isinstance(mask, torch.Tensor)]


@families
def test_restarting_positions_alone_are_documents_and_never_leak(family):
    llm = make_llm(family)
    pack = make_pack(LENGTHS)
    alone = {key: pack[key] for key in ("input_ids", "position_ids", "use_cache")}
    torch.testing.assert_close(llm(**alone).logits, llm(**pack).logits, rtol=0, atol=1e-12)


@families
def test_restarting_positions_with_a_cache_are_refused(family):
    """Transformers looks for documents only without a cache, and would let them see each other here."""
    pack = make_pack(LENGTHS)
    with pytest.raises(UserError, match=r"position_ids restart.*use_cache=False"):
        make_llm(family)(pack["input_ids"], position_ids=pack["position_ids"], use_cache=True)


@families
def test_rows_of_packs_without_edges_get_the_mask_of_transformers(family):
    llm, reference = make_llm(family), make_llm(family, "sdpa")
    ids, positions = make_pack([6, 4])["input_ids"].repeat(2, 1), make_pack([6, 4])["position_ids"].repeat(2, 1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert torch.equal(llm(**inputs).logits, reference(**inputs).logits)


@families
def test_generation_with_left_padding_equals_sdpa_token_for_token(family):
    ids = make_pack([24])["input_ids"].view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    inputs |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
    got, expected = (make_llm(family, name).generate(**inputs) for name in ("tuner_sdpa", "sdpa"))
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(got.scores, expected.scores, strict=True))


@families
def test_prefill_in_chunks_equals_sdpa_and_one_forward(family):
    ids = make_pack([20])["input_ids"]
    logits = {}
    for name in ("tuner_sdpa", "sdpa"):
        llm, cache = make_llm(family, name), transformers.DynamicCache(config=CONFIGS[family]())
        chunks = [llm(chunk, past_key_values=cache, use_cache=True).logits for chunk in ids.split([9, 8, 1, 2], 1)]
        logits[name] = torch.cat(chunks, 1)
    assert torch.equal(logits["tuner_sdpa"], logits["sdpa"])
    whole = make_llm(family)(ids, use_cache=False).logits
    torch.testing.assert_close(logits["tuner_sdpa"], whole, rtol=0, atol=1e-12)


def test_cu_seqlens_that_end_before_the_pack_are_refused():
    pack = make_pack(LENGTHS) | {"cu_seqlens": torch.tensor([0, 7, 8])}
    with pytest.raises(UserError, match="cu_seqlens must go up from 0 to the"):
        make_llm("llama")(**pack)


def test_a_padding_mask_beside_cu_seqlens_is_refused():
    pack = make_pack([6, 4])
    mask = torch.ones_like(pack["input_ids"])
    mask[0, 0] = 0
    with pytest.raises(UserError, match="Drop attention_mask"):
        make_llm("llama")(**pack, attention_mask=mask)


def test_attention_dropout_is_refused_in_packs():
    llm = make_llm("llama").train()
    for layer in llm.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"dropout 0\.1.*attention_dropout"):
        llm(**make_pack([6, 4]))


@pytest.mark.parametrize("feature", [{"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}])
def test_scores_that_packed_attention_does_not_compute_are_refused(feature):
    with pytest.raises(UserError, match=f"'{next(iter(feature))}'.*'eager'"):
        attention.check_layer(None, feature)


def test_chunked_layers_are_refused():
    mask = Documents(torch.tensor([0, 10]), local_size=4)
    with pytest.raises(UserError, match="chunks of 4 tokens"):
        attention.check_layer(mask, {})


def test_a_saved_model_does_not_name_our_attention(tmp_path):
    make_llm("llama").save_pretrained(tmp_path)
    assert "tuner" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_every_backend_is_known_to_transformers():
    for backend in attention.BACKENDS:
        assert attention_name(backend) in transformers.AttentionInterface().valid_keys()
        assert attention_name(backend) in transformers.masking_utils.AttentionMaskInterface().valid_keys()
