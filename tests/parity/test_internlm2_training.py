"""What training relies on in our InternLM2: rotary angles without a memory, packing, gradient checkpointing."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuner.errors import UserError
from tuner.model.attention import attention_name
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM
from tuner.model.internlm2.rotary import InternLM2RotaryEmbedding

DYNAMIC = {"type": "dynamic", "factor": 2.0}
SCALINGS = [None, {"type": "linear", "factor": 4.0}, DYNAMIC]


def tiny(attention: str = "sdpa", **overrides: Any) -> InternLM2ForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "bias": False,
    }
    return InternLM2ForCausalLM(InternLM2Config(**(shape | overrides), attn_implementation=attention))


def packed(*lengths: int) -> dict[str, Any]:
    edges = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(3, 64, (1, int(edges[-1])), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seqlens": edges.int(),
        "max_seqlen": max(lengths),
    }


@pytest.fixture
def recording() -> Iterator[list[dict[str, Any]]]:
    """A registered attention that notes its keyword arguments; its result is sdpa's."""
    calls: list[dict[str, Any]] = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("recording", attend)
    AttentionMaskInterface.register("recording", sdpa_mask)
    yield calls
    del AttentionInterface._global_mapping["recording"]
    del AttentionMaskInterface._global_mapping["recording"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_document_edges_reach_every_layer_also_in_recomputation(
    recording: list[dict[str, Any]], checkpointing: bool
) -> None:
    llm = tiny("recording").train()
    if checkpointing:
        llm.activation_checkpointing_enable()
    batch = packed(5, 9)
    llm(**batch).logits.sum().backward()
    assert len(recording) == llm.config.num_hidden_layers * (2 if checkpointing else 1)
    for kwargs in recording:
        assert kwargs["cu_seqlens"] is batch["cu_seqlens"]
        assert kwargs["max_seqlen"] == 9


@pytest.mark.parametrize("attention", ["eager", "sdpa", attention_name("sdpa")])
@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "linear", "dynamic"])
def test_gradient_checkpointing_gives_bit_identical_gradients(attention: str, scaling: dict[str, Any] | None) -> None:
    plain = tiny(attention, rope_scaling=scaling, bias=True).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    batch = packed(24, 7)
    losses = [llm(**batch, labels=batch["input_ids"]).loss for llm in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert checkpointed.model.layers[0].gradient_checkpointing
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("attention", ["eager", "sdpa", attention_name("sdpa")])
@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "linear", "dynamic"])
def test_packed_documents_equal_separate_ones(attention: str, scaling: dict[str, Any] | None) -> None:
    """transformers' own attentions see the documents by their positions; dynamic scaling must go by document too."""
    llm = tiny(attention, rope_scaling=scaling)
    lengths = (30, 5, 18)  # of max_position_embeddings = 16
    batch = packed(*lengths)
    together = llm(**batch).logits.split(lengths, dim=1)
    for document, logits in zip(batch["input_ids"].split(lengths, dim=1), together, strict=True):
        torch.testing.assert_close(logits, llm(document).logits, rtol=0, atol=1e-5)


def test_a_long_batch_leaves_no_trace_on_the_next() -> None:
    llm = tiny(rope_scaling=DYNAMIC).eval()
    after_long = copy.deepcopy(llm)
    after_long(packed(60)["input_ids"])
    for length in (10, 16, 17, 40):
        ids = packed(length)["input_ids"]
        assert torch.equal(llm(ids).logits, after_long(ids).logits), length


def test_dynamic_scaling_follows_the_formula_from_the_first_token_too_many() -> None:
    config = InternLM2Config(max_position_embeddings=32768, rope_theta=1000000, rope_scaling=DYNAMIC)
    rotary = InternLM2RotaryEmbedding(config)
    for length, theta in [(100, 1e6), (32768, 1e6), (65536, 3.05e6), (204800, 1.165e7), (262144, 1.566e7)]:
        frequency = rotary._dynamic(length)[1].item()  # theta ** (-2 / 128)
        expected = (2 * max(length, 32768) / 32768 - 1) ** (128 / 126) * 1e6
        assert frequency ** (-64) == pytest.approx(expected, rel=1e-4)
        assert expected == pytest.approx(theta, rel=0.03)


def test_dynamic_scaling_refuses_a_part_of_its_documents() -> None:
    batch = packed(30, 10)
    shard = {name: batch[name][:, :20] for name in ("input_ids", "position_ids")}
    with pytest.raises(UserError, match=r"20 of 40 tokens came.*cut_sequences"):
        tiny(rope_scaling=DYNAMIC)(**(batch | shard))


def test_casting_the_model_does_not_round_the_angles() -> None:
    config = tiny(rope_scaling=DYNAMIC).config
    positions = torch.arange(3000)[None]
    exact = InternLM2RotaryEmbedding(config)(torch.zeros(1, 1, 1), positions)
    cast = InternLM2RotaryEmbedding(config).to(torch.bfloat16)(torch.zeros(1, 1, 1, dtype=torch.bfloat16), positions)
    for full, half in zip(exact, cast, strict=True):
        assert torch.equal(full.bfloat16(), half)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "linear", "dynamic"])
def test_rotary_angles_are_right_after_meta_device_loading(scaling: dict[str, Any] | None) -> None:
    llm = tiny(rope_scaling=scaling).eval()
    with torch.device("meta"):
        hollow = InternLM2ForCausalLM(copy.deepcopy(llm.config)).eval()
    for module in hollow.to_empty(device="cpu").modules():  # fill what is undefined with a value that shows
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            tensor.data.fill_(float("nan"))
    hollow.load_state_dict(llm.state_dict())
    ids = packed(40)["input_ids"]
    assert torch.equal(hollow(ids).logits, llm(ids).logits)


def test_output_is_tied_only_when_the_config_says_so() -> None:
    assert tiny().output.weight is not tiny().model.tok_embeddings.weight
    tied = tiny(tie_word_embeddings=True)
    assert tied.output.weight is tied.model.tok_embeddings.weight
    assert tied.get_output_embeddings() is tied.output
    assert tied.get_input_embeddings() is tied.model.tok_embeddings
