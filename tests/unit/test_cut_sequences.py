"""Cutting a batch, binding a model to its part, joining parts: with what is refused and why."""

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.errors import UserError
from tuner.method.sft import SFT
from tuner.model.attention_cut import cut_attention
from tuner.parallel.mesh import Degrees, Mesh, build_mesh
from tuner.parallel.ranks import Ranks
from tuner.parallel.ring import ring
from tuner.parallel.sequence import cut, gather, held_tokens, scatter
from tuner.parallel.ulysses import ulysses

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}


def make_llm(config: transformers.PreTrainedConfig, implementation: str = "tuner_sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def make_llama(**changes) -> PreTrainedModel:
    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes
    return make_llm(transformers.LlamaConfig(**sizes))


def mesh_without_processes(degrees: Degrees) -> Mesh:
    """As rank 0 sees it, for what needs no exchange."""

    def alone_of(size: int) -> Ranks:
        return Ranks(range(size), 0, group=object())

    return Mesh(degrees, alone_of(degrees.ulysses), alone_of(degrees.ring), alone_of(degrees.size), alone_of(1))


def make_batch(num_tokens: int = 12) -> dict:
    row = torch.arange(num_tokens)[None]
    edges = torch.tensor([0, 5, num_tokens], dtype=torch.int32)
    return {"input_ids": row, "labels": row + 100, "cu_seqlens": edges, "num_loss_tokens": 7, "loss_weights": None}


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(3), Degrees(1, 3), Degrees(2, 3)])
def test_the_parts_of_a_batch_are_the_batch(degrees):
    batch = make_batch()
    parts = [cut(batch, degrees, rank) for rank in range(degrees.size)]
    whole = torch.cat([held_tokens(batch["cu_seqlens"], degrees, rank) for rank in range(degrees.size)])
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1)[:, whole.argsort()], batch[name])
    for part in parts:
        assert part.keys() == batch.keys()
        assert part["cu_seqlens"] is batch["cu_seqlens"]
        assert (part["num_loss_tokens"], part["loss_weights"]) == (7, None)


def test_a_pack_that_does_not_divide_is_refused_with_the_padding_that_helps():
    with pytest.raises(UserError, match=r"13 tokens does not split over 4 ranks.*pad_to_multiple_of=4 makes 16"):
        cut(make_batch(13), Degrees(2, 2), 0)


def test_one_rank_changes_nothing():
    llm = make_llama()
    cut_attention(llm, build_mesh(Degrees()))
    assert llm.config._attn_implementation == "tuner_sdpa"


@pytest.mark.parametrize(
    ("make", "degrees", "message"),
    [
        (make_llama, Degrees(3), "3 ranks cannot share 4 query heads and 2 kv heads. Sizes that can: 1, 2, 4"),
        (lambda: make_llm(make_llama().config, "eager"), Degrees(2), "attention='eager' cannot attend to sequences"),
        (
            lambda: make_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            Degrees(2),
            "rope type 'dynamic' of LlamaForCausalLM depends on the longest sequence",
        ),
        (
            lambda: make_llm(
                transformers.Lfm2Config(
                    **SIZES | {"num_hidden_layers": 2},
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    layer_types=["conv", "full_attention"],
                )
            ),
            Degrees(2),
            "Layers of Lfm2ForCausalLM let tokens see each other beside its attention",
        ),
    ],
    ids=["heads", "eager", "dynamic rope", "convolution"],
)
def test_what_cannot_be_cut_is_refused_and_left_as_it_was(make, degrees, message):
    llm = make().train()
    implementation = llm.config._attn_implementation
    with pytest.raises(UserError, match=message):
        cut_attention(llm, mesh_without_processes(degrees))
    assert llm.config._attn_implementation == implementation
    assert llm.training


def test_generation_is_what_it_was_and_a_training_forward_without_edges_is_refused():
    llm, plain = make_llama(), make_llama()
    cut_attention(llm, mesh_without_processes(Degrees(2, 2)))
    ids = torch.arange(1, 8)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(llm.eval().generate(ids, **options), plain.eval().generate(ids, **options))
    with pytest.raises(UserError, match="this forward in training mode brings no cu_seqlens"):
        llm.train()(ids, use_cache=False)


def test_a_method_is_built_before_its_sequences_are_cut():
    llm = make_llama()
    SFT(llm).cut_sequences(mesh_without_processes(Degrees(2)))
    with pytest.raises(UserError, match=r"cut over ranks already\. Build the method on the model first"):
        SFT(llm)


def test_heads_and_parts_that_do_not_fit_are_refused_when_called():
    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError

    edges = torch.tensor([0, 8], dtype=torch.int32)
    query = torch.zeros(1, 6, 4, 8)
    attend = ulysses(never, mesh_without_processes(Degrees(4)).ulysses)
    with pytest.raises(UserError, match=r"4 ranks cannot share 6 query heads and 3 kv heads\. Sizes that can: 1, 3, 6"):
        attend(query, query[:, :3], query[:, :3], edges, 8, backend="sdpa")
    with pytest.raises(UserError, match="one row and no KV cache"):
        attend(query, query[:, :, :2], query[:, :, :2], edges, 8, backend="sdpa")
    with pytest.raises(UserError, match=r"got 4 tokens here of a pack of 8.*cut the batch"):
        ring(never, mesh_without_processes(Degrees(1, 4)).ring)(query, query, query, edges, 8, backend="sdpa")


def join_and_part(degrees: Degrees) -> list[torch.Tensor]:
    """What a rank joins, the gradient of its part, and the gradient of what all had alike, summed over ranks."""
    mesh = build_mesh(degrees)
    edges = torch.tensor([0, 5, 12], dtype=torch.int32)
    held = held_tokens(edges, degrees, mesh.sequence.rank)
    whole = torch.arange(24, dtype=torch.float64).view(1, 12, 2).requires_grad_()
    part = scatter(whole, held)
    joined = gather(part, mesh.sequence, edges, degrees)
    (joined * (mesh.sequence.rank + 1) * torch.arange(12)[None, :, None]).sum().backward()
    dist.all_reduce(whole.grad)
    return [joined.detach(), whole.grad]


@pytest.mark.parametrize("degrees", [Degrees(2), Degrees(1, 2)], ids=["ulysses", "ring"])
def test_joined_parts_are_the_whole_and_gradients_of_all_ranks_reach_the_owner(degrees):
    for joined, gradient in run_on_ranks(2, join_and_part, degrees):
        assert torch.equal(joined, torch.arange(24, dtype=torch.float64).view(1, 12, 2))
        assert torch.equal(gradient, (3.0 * torch.arange(12)[None, :, None]).expand(1, 12, 2).double())
