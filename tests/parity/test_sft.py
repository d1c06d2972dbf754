"""One optimizer step is the same however its documents are packed and accumulated, gradient by gradient."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import tuner.model.attention
from tuner.constants import IGNORE_INDEX
from tuner.errors import UserError
from tuner.method.sft import SFT

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LENGTHS = [7, 2, 12, 4, 9, 3]
DIVISIONS = [  # of the six documents over micro-batches
    [[0, 1, 2, 3, 4, 5]],
    [[5, 4, 3, 2, 1, 0]],
    [[0], [1], [2], [3], [4], [5]],
    [[2, 1], [0, 5, 4], [3]],
]


def make_llm(config: transformers.PreTrainedConfig, implementation: str = "tuner_sdpa") -> PreTrainedModel:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double()


def make_llama(**changes) -> PreTrainedModel:
    return make_llm(transformers.LlamaConfig(**SIZES | changes))


def make_documents() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and shifted labels. One document is not trained at all, one in its last position only."""
    generator = torch.Generator().manual_seed(9)
    documents = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(1, 60, (length,), generator=generator)
        labels = F.pad(ids[1:], (0, 1), value=IGNORE_INDEX)
        hidden = {1: slice(0, length), 2: slice(0, length - 2)}.get(i, slice(0, 1))
        labels[hidden] = IGNORE_INDEX
        documents.append((ids, labels))
    return documents


def make_weights() -> list[torch.Tensor]:
    """Of each document's labels, fp32: the first document's are all 1, the others' differ from token to token."""
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(length, generator=generator) * 3 + 0.1 if i else torch.ones(length)
            for i, length in enumerate(LENGTHS)]  # fmt: skip


def make_batch(documents: list[tuple[torch.Tensor, torch.Tensor]], num_loss_tokens: float) -> dict:
    lengths = [len(ids) for ids, _ in documents]
    return {
        "input_ids": torch.cat([ids for ids, _ in documents])[None],
        "labels": torch.cat([labels for _, labels in documents])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "num_loss_tokens": num_loss_tokens,
    }


def run_step(
    method: SFT, division: list[list[int]], weights: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    documents = make_documents()
    num_loss_tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in documents)
    if weights is not None:
        pairs = zip(weights, documents)
        num_loss_tokens = sum(float(w[labels != IGNORE_INDEX].double().sum()) for w, (_, labels) in pairs)
    method.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for micro_batch in division:
        batch = make_batch([documents[i] for i in micro_batch], num_loss_tokens)
        if weights is not None and micro_batch != [0]:  # document 0 has weights of 1, so alone it has none
            batch["loss_weights"] = torch.cat([weights[i] for i in micro_batch])[None]
        loss = method(**batch)["loss"]
        loss.backward()
        total += loss.detach()
    return total, {name: parameter.grad for name, parameter in method.llm.named_parameters()}


def plain_step(
    llm: PreTrainedModel, implementation: str = "sdpa", weights: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over all trained tokens, document by document, by transformers' attention and torch's cross-entropy."""
    llm.set_attn_implementation(implementation)
    logits = torch.cat([llm(ids[None], use_cache=False).logits[0] for ids, _ in make_documents()])
    labels = torch.cat([labels for _, labels in make_documents()])
    loss = F.cross_entropy(logits, labels)
    if weights is not None:
        trained, weight = labels != IGNORE_INDEX, torch.cat(weights).double()
        chosen = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        loss = -(chosen * weight)[trained].sum() / weight[trained].sum()
    llm.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in llm.named_parameters()}


def assert_same_step(got, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for name in expected[1]:
        torch.testing.assert_close(got[1][name], expected[1][name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("division", DIVISIONS, ids=["one pack", "reversed", "one by one", "mixed"])
def test_any_packing_and_accumulation_gives_the_step_of_one_big_batch(division, tied):
    method = SFT(make_llama(tie_word_embeddings=tied))
    assert method.head_is_product
    assert_same_step(run_step(method, division), plain_step(make_llama(tie_word_embeddings=tied)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("division", DIVISIONS, ids=["one pack", "reversed", "one by one", "mixed"])
def test_with_weights_too_any_packing_and_accumulation_gives_the_step_of_one_big_batch(division, tied):
    """sum(weight * cross-entropy) / sum(weight) over the step, whatever the division; and it is not the plain mean."""
    weights = make_weights()
    got = run_step(SFT(make_llama(tie_word_embeddings=tied)), division, weights)
    assert_same_step(got, plain_step(make_llama(tie_word_embeddings=tied), weights=weights))
    assert (got[0] - plain_step(make_llama(tie_word_embeddings=tied))[0]).abs() > 1e-3


def test_weights_of_one_give_bit_for_bit_the_step_without():
    ones = [torch.ones(length) for length in LENGTHS]
    plain, weighted = run_step(SFT(make_llama()), DIVISIONS[3]), run_step(SFT(make_llama()), DIVISIONS[3], ones)
    assert torch.equal(plain[0], weighted[0])
    assert all(torch.equal(plain[1][name], weighted[1][name]) for name in plain[1])


def test_gradient_checkpointing_gives_the_same_step():
    llm = make_llama().train()
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(run_step(SFT(llm), DIVISIONS[3]), plain_step(make_llama()))


def make_cohere() -> PreTrainedModel:
    return make_llm(transformers.CohereConfig(**SIZES, logit_scale=0.5))


def make_granite() -> PreTrainedModel:
    return make_llm(transformers.GraniteConfig(**SIZES, logits_scaling=3.0))


def make_soft_capped() -> PreTrainedModel:
    return make_llm(transformers.Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None), "eager")


def make_biased() -> PreTrainedModel:
    llm = make_llm(transformers.PhiConfig(**SIZES))
    torch.nn.init.normal_(llm.lm_head.bias)
    return llm


@pytest.mark.parametrize(
    ("make", "implementation", "tolerance"),
    [
        (make_cohere, "sdpa", 1e-6),  # its norm is in fp32 always
        (make_granite, "sdpa", 1e-12),
        (make_soft_capped, "eager", 1e-6),  # its softmax too
        (make_biased, "sdpa", 1e-12),
    ],
)
def test_a_head_that_is_more_than_a_product_is_found_and_used_as_it_is(make, implementation, tolerance):
    """Random models have logits near 0, where soft-capping at 30 is nearly the identity; it is found all the same."""
    with pytest.warns(UserWarning, match="more to its logits than a matrix product"):
        method = SFT(make())
    assert_same_step(run_step(method, DIVISIONS[3]), plain_step(make(), implementation), tolerance)
    weights = make_weights()
    assert_same_step(run_step(method, DIVISIONS[3], weights), plain_step(make(), implementation, weights), tolerance)


def test_the_checks_leave_the_model_as_it_was():
    llm = make_llama().train()
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SFT(llm)
    assert llm.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in llm.parameters())
    assert not [module for module in llm.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_a_model_whose_layers_mix_neighbouring_documents_is_refused():
    """A state-space layer carries its state over the edge."""
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UserError, match="documents see each other through layers of MambaForCausalLM"):
        SFT(AutoModelForCausalLM.from_config(config))


def test_a_pack_without_trained_tokens_has_loss_zero_and_zero_gradients():
    method = SFT(make_llama())
    batch = make_batch(make_documents(), 10)
    batch["labels"].fill_(IGNORE_INDEX)
    loss = method(**batch)["loss"]
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.count_nonzero() == 0 for parameter in method.parameters())


def test_edges_that_do_not_fit_the_pack_are_refused_before_the_model_runs():
    batch = make_batch(make_documents(), 10)
    batch["cu_seqlens"] = batch["cu_seqlens"][:-1]
    with pytest.raises(UserError, match="cu_seqlens must go up from 0 to the 37 tokens"):
        SFT(make_llama())(**batch)


def test_bf16_autocast_comes_near_the_exact_step():
    llm = make_llama().float()
    exact, grads = run_step(SFT(make_llama()), DIVISIONS[0])
    with torch.autocast("cpu", torch.bfloat16):
        got, low = run_step(SFT(llm), DIVISIONS[0])
    torch.testing.assert_close(got, exact, rtol=5e-3, atol=0)
    assert all((low[name].double() - grads[name]).norm() <= 0.05 * grads[name].norm() for name in grads)


def test_the_model_of_a_method_is_found_under_llm():
    llm = make_llama()
    assert SFT(llm).llm is llm
    assert llm.config._attn_implementation == tuner.model.attention.attention_name("sdpa")


def test_a_rope_type_that_looks_at_the_longest_document_of_a_pack_is_refused_there_and_right_alone():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    method = SFT(make_llama(rope_parameters=rope, max_position_embeddings=4).double())
    documents = make_documents()
    with pytest.raises(UserError, match=r"'dynamic' of LlamaForCausalLM turns every document .*pack = False"):
        method(**make_batch(documents[:2], 1))
    ids, labels = max(documents, key=lambda document: len(document[0]))
    trained = labels != IGNORE_INDEX
    logits = method.llm(ids[None], use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[trained], labels[trained])
    loss = method(**make_batch([(ids, labels)], int(trained.sum())))["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
