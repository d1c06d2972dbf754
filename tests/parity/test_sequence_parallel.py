"""A step whose packs are cut over ranks is the step of one process: its loss, and the gradient of every parameter."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import Batch, collate
from tuner.dataset.tokenize import Document
from tuner.method.sft import SFT
from tuner.model.checkpointing import ATTENTION, enable_gradient_checkpointing
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.tiles import tile
from tuner.parallel.mesh import Degrees, Mesh, build_mesh
from tuner.parallel.sequence import cut, held_tokens
from tuner.parallel.ulysses import num_elements

NUM_TOKENS = 48
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
HEAD_SIZE = 8
MODELS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "internlm2": lambda: InternLM2Config(**SIZES),
    "internlm2, dynamic rope": lambda: InternLM2Config(
        **SIZES, max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 2.0}
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral, window": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
}
LENGTHS = {
    "mixed": [7, 2, 12, 4, 9, 3, 11],
    "one document": [NUM_TOKENS],
    "a document over all ranks": [4, 41, 3],
    "documents of one token": [*[1] * 13, 6, *[1] * 12, 16, 1],
    "a padded tail": [20, 10, 15],
}
TRAINED = {  # which ranks' tokens are trained; those that have a next token at all
    "all": lambda rank, size: True,
    "the last rank's": lambda rank, size: rank == size - 1,
    "one rank's": lambda rank, size: rank == min(1, size - 1),
    "none of the first rank's": lambda rank, size: rank != 0,
}
CASES = [(lengths, trained) for lengths in LENGTHS for trained in TRAINED]
FEW = [(lengths, list(TRAINED)[i % len(TRAINED)]) for i, lengths in enumerate(LENGTHS)]
DEGREES = [Degrees(2, 1), Degrees(1, 2), Degrees(4, 1), Degrees(1, 4), Degrees(2, 2)]
LONG = [Degrees(4, 1), Degrees(1, 4)]  # on four ranks the test of one gradient has them, too
PLACEMENTS = [pytest.param(each, marks=pytest.mark.slow if each in LONG else []) for each in DEGREES]
IDS = [f"ulysses {degrees.ulysses} ring {degrees.ring}" for degrees in DEGREES]
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]  # loss, and gradients by name


def make_method(model: str, dtype: torch.dtype) -> SFT:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(MODELS[model](), attn_implementation="tuner_sdpa").to(dtype)
    for parameter in llm.parameters():  # as drawn, attention is nearly uniform and says little
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return SFT(norms_in_their_dtype(llm))


def norms_in_their_dtype(llm: PreTrainedModel) -> PreTrainedModel:
    """transformers' norms round to fp32 inside, where a last bit of fp64 decides over 1e-7."""
    for module in llm.modules():
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm | MistralRMSNorm):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return llm


def make_batch(lengths: str, trained: str, degrees: Degrees, *, seed: int = 0, weighted: bool = False) -> Batch:
    """A pack whose trained tokens lie where `trained` says."""
    rng = np.random.default_rng(seed)
    edges = np.cumsum([0, *LENGTHS[lengths]])
    padded = torch.tensor([*edges.tolist(), NUM_TOKENS] if edges[-1] < NUM_TOKENS else edges.tolist())
    is_trained = np.zeros(NUM_TOKENS + 1, bool)
    for rank in range(degrees.size):
        is_trained[held_tokens(padded, degrees, rank)] = TRAINED[trained](rank, degrees.size)
    is_trained = np.roll(is_trained, 1)  # a document marks the token that is predicted
    documents = []
    for start, end in pairwise(edges):
        weights = rng.random(end - start).astype(np.float32) + 0.5 if weighted else None
        ids = rng.integers(1, 60, end - start).astype(np.uint32)
        documents.append(Document(ids, is_trained[start:end], weights))
    batch = collate(documents, 1, pad_to_multiple_of=degrees.size * -(-NUM_TOKENS // degrees.size))
    assert batch["input_ids"].shape[1] == NUM_TOKENS
    batch["num_loss_tokens"] = count(batch)
    return batch


def count(batch: Batch) -> float:
    if batch["loss_weights"] is not None:
        return float(batch["loss_weights"].double().sum())
    return int((batch["labels"] != IGNORE_INDEX).sum())


def run_step(method: SFT, *batches: dict[str, Any]) -> Step:
    method.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = method(**batch)["loss"]
        loss.backward()
        total += loss.detach()
    trained = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    return total, {name: parameter.grad.detach().clone() for name, parameter in trained.items()}


def summed(step: Step) -> Step:
    """Over all ranks, in one go."""
    tensors = [step[0].double(), *step[1].values()]
    total = torch.cat([tensor.flatten().double() for tensor in tensors])
    dist.all_reduce(total)
    parts = total.split([tensor.numel() for tensor in tensors])
    loss, *gradients = (part.view_as(tensor) for part, tensor in zip(parts, tensors))
    return loss, dict(zip(step[1], gradients))


def differences(got: Step, expected: Step) -> dict[str, float]:
    """The largest difference of the loss and of each gradient, relative to the largest entry."""
    assert got[1].keys() == expected[1].keys()
    pairs = {"loss": (got[0], expected[0])} | {name: (got[1][name], expected[1][name]) for name in expected[1]}
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def bound(method: SFT, degrees: Degrees) -> Mesh:
    mesh = build_mesh(degrees)
    method.cut_sequences(mesh)
    return mesh


def compare_models(degrees: Degrees, dtype: torch.dtype, all_cases: bool) -> dict[Any, dict[str, float]]:
    """Of every model and case, what differs; the first rank says."""
    found = {}
    for model in MODELS:
        whole, parts = make_method(model, dtype), make_method(model, dtype)
        mesh = bound(parts, degrees)
        for case in CASES if all_cases and model == "internlm2" else FEW:
            batch = make_batch(*case, degrees)
            part = cut(batch, degrees, mesh.sequence.rank)
            assert part["input_ids"].shape[1] == NUM_TOKENS // degrees.size
            step = summed(run_step(parts, part))
            if dist.get_rank() == 0:
                found[model, case] = differences(step, run_step(whole, batch))
    return found


def assert_within(found: dict[Any, dict[str, float]], tolerance: float) -> None:
    wrong = {
        (case, name): value
        for case, values in found.items()
        for name, value in values.items()
        if not value <= tolerance
    }
    assert not wrong


@pytest.mark.parametrize("degrees", PLACEMENTS, ids=IDS)
def test_every_placement_gives_the_loss_and_the_gradients_of_one_process(degrees):
    found = run_on_ranks(degrees.size, compare_models, degrees, torch.float64, True)[0]
    assert len(found) == len(CASES) + (len(MODELS) - 1) * len(FEW)
    assert_within(found, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", DEGREES, ids=IDS)
def test_in_fp32_the_difference_is_rounding(degrees):
    assert_within(run_on_ranks(degrees.size, compare_models, degrees, torch.float32, False)[0], 1e-5)


def compare_variants(degrees: Degrees) -> dict[str, dict[str, float]]:
    """Gradient checkpointing, kept attention, loss weights, a model's own head, frozen layers, three micro-batches."""
    found = {}
    case = ("mixed", "all")

    def compare(name: str, change: Callable[[SFT], None], batches: list[Batch]) -> None:
        whole, parts = make_method("internlm2", torch.float64), make_method("internlm2", torch.float64)
        change(whole), change(parts)
        mesh = bound(parts, degrees)
        cuts = [cut(batch, degrees, mesh.sequence.rank) for batch in batches]
        found[name] = differences(summed(run_step(parts, *cuts)), run_step(whole, *batches))

    checkpointing = {"use_reentrant": False}
    compare(
        "checkpointing",
        lambda method: method.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing),
        [make_batch(*case, degrees)],
    )
    compare(
        "reentrant checkpointing",
        lambda method: method.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True}),
        [make_batch(*case, degrees)],
    )
    compare(
        "kept attention and tiles",
        lambda method: (enable_gradient_checkpointing(method.llm, ATTENTION), tile(method.llm, 5))[1],
        [make_batch(*case, degrees)],
    )
    compare("loss weights", lambda method: None, [make_batch(*case, degrees, weighted=True)])
    compare("own head", partial(setattr_, "head_is_product", False), [make_batch("mixed", "one rank's", degrees)])
    compare("frozen but for the last layer's values", freeze, [make_batch(*case, degrees)])
    batches = [make_batch(*each, degrees, seed=seed) for seed, each in enumerate(CASES[:3])]
    for batch in batches:
        batch["num_loss_tokens"] = 77
    compare("accumulation", lambda method: None, batches)
    return found


def freeze(method: SFT) -> None:
    method.requires_grad_(False)
    method.llm.model.layers[-1].attention.wqkv.requires_grad_(True)


def setattr_(name: str, value: Any, method: SFT) -> None:
    setattr(method, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", DEGREES, ids=IDS)
def test_with_checkpointing_weights_own_heads_and_accumulation(degrees):
    for found in run_on_ranks(degrees.size, compare_variants, degrees):
        assert len(found) == 7
        assert_within(found, 1e-12)


def compare_in_bf16(degrees: Degrees) -> dict[str, float]:
    """Autocast over fp32 weights, as in training, against fp64."""
    whole, parts = make_method("internlm2", torch.float64), make_method("internlm2", torch.float64).float()
    mesh = bound(parts, degrees)
    batch = make_batch("mixed", "all", degrees)
    with torch.autocast("cpu", torch.bfloat16):
        step = run_step(parts, cut(batch, degrees, mesh.sequence.rank))
    expected = run_step(whole, batch)
    got = summed(step)
    return {name: ((got[1][name].double() - grad).norm() / grad.norm()).item() for name, grad in expected[1].items()}


@pytest.mark.parametrize("degrees", DEGREES[:2], ids=IDS[:2])
def test_bf16_autocast_comes_near_the_exact_gradients(degrees):
    for found in run_on_ranks(2, compare_in_bf16, degrees):
        assert_within({"bf16": found}, 0.05)


def compare_data_parallel(degrees: Degrees) -> dict[str, float]:
    """Two sequences, each over two ranks; both together are one step."""
    whole, parts = make_method("llama", torch.float64), make_method("llama", torch.float64)
    mesh = bound(parts, degrees)
    batches = [make_batch("mixed", "all", degrees), make_batch("one document", "the last rank's", degrees, seed=1)]
    for batch in batches:
        batch["num_loss_tokens"] = sum(map(count, batches))
    part = cut(batches[mesh.data.rank], degrees, mesh.sequence.rank)
    return differences(summed(run_step(parts, part)), run_step(whole, *batches))


@pytest.mark.parametrize("degrees", DEGREES[:2], ids=IDS[:2])
def test_data_parallel_ranks_with_cut_sequences_make_one_step(degrees):
    for found in run_on_ranks(4, compare_data_parallel, degrees):
        assert_within({"2 x 2": found}, 1e-12)


class ShownLoss(torch.autograd.Function):
    """The loss over all ranks as a value, while the gradient is the one of this rank's own mean."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, num_trained: torch.Tensor) -> torch.Tensor:
        total = torch.stack([mean * num_trained, num_trained])
        dist.all_reduce(total)
        return total[0] / total[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def reduce_as_others_do(degrees: Degrees) -> tuple[dict[str, float], list[float]]:
    """Each rank's mean, averaged for the eye, and gradients averaged over ranks: as XTuner v0.1 does."""
    whole, parts = make_method("internlm2", torch.float64), make_method("internlm2", torch.float64)
    mesh = bound(parts, degrees)
    batch = make_batch("one document", "the last rank's", degrees)
    expected = run_step(whole, batch)
    part = cut(batch, degrees, mesh.sequence.rank)
    num_trained = (part["labels"] != IGNORE_INDEX).sum().double()
    part["num_loss_tokens"] = max(1, int(num_trained))
    parts.zero_grad()
    loss = ShownLoss.apply(parts(**part)["loss"], num_trained)
    loss.backward()
    gradients = {name: parameter.grad / mesh.sequence.size for name, parameter in parts.named_parameters()}
    _, gradients = summed((loss.detach(), gradients))
    ratios = [(gradients[name].norm() / expected[1][name].norm()).item() for name in gradients]
    return differences((loss.detach(), gradients), expected), ratios


@pytest.mark.parametrize("degrees", [Degrees(2), Degrees(4)], ids=["2", "4"])
def test_a_loss_that_looks_right_with_a_wrong_gradient_is_caught(degrees):
    for found, ratios in run_on_ranks(degrees.size, reduce_as_others_do, degrees):
        assert found.pop("loss") <= 1e-12
        assert ratios == pytest.approx([1 / degrees.size] * len(ratios), rel=1e-9)
        assert min(found.values()) == pytest.approx(1 - 1 / degrees.size)
        with pytest.raises(AssertionError):
            assert_within({"shown": found}, 1e-5)


def count_bytes(degrees: Degrees, kv_heads: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Bytes that this rank sent in forward and in backward, by Ulysses and by the ring; in bf16 by autocast."""
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": kv_heads})
    method = SFT(AutoModelForCausalLM.from_config(config, attn_implementation="tuner_sdpa"))
    if dtype == torch.float64:
        method.double()
    mesh = bound(method, degrees)
    part = cut(make_batch("mixed", "all", degrees), degrees, mesh.sequence.rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = method(**part)["loss"]
    forward = [mesh.ulysses.bytes_sent, mesh.ring.bytes_sent]
    loss.backward()
    return forward, [mesh.ulysses.bytes_sent - forward[0], mesh.ring.bytes_sent - forward[1]]


def count_all(degrees: Degrees) -> dict[tuple[int, torch.dtype], tuple[list[int], list[int]]]:
    cases = product((8, 4, 2), (torch.float64, torch.bfloat16))
    return {case: count_bytes(degrees, *case) for case in cases}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ulysses_moves_what_the_formula_says_and_no_byte_more(num_ranks):
    two_kv_heads = {2: 5 / 8, 4: 3 / 4}[num_ranks]  # they travel as two, or, to four ranks, as four
    for counted in run_on_ranks(num_ranks, count_all, Degrees(num_ranks)):
        for (kv_heads, dtype), (forward, backward) in counted.items():
            elements = num_elements(NUM_TOKENS, 8, kv_heads, HEAD_SIZE, num_ranks)
            share = {8: 1, 4: 3 / 4, 2: two_kv_heads}[kv_heads]
            assert elements == share * 4 * NUM_TOKENS * SIZES["hidden_size"] / num_ranks
            size = elements * dtype.itemsize * SIZES["num_hidden_layers"]
            assert forward == backward == [size * (num_ranks - 1) // num_ranks, 0]  # the rest stays at home


def test_a_ring_moves_keys_and_values_once_and_in_backward_their_gradients_too():
    layer = 3 * 2 * 2 * HEAD_SIZE * NUM_TOKENS // 4 * 8  # n - 1 hops of key and value, two heads of each
    for forward, backward in run_on_ranks(4, count_bytes, Degrees(1, 4), 2, torch.float64):
        assert forward == [0, layer * SIZES["num_hidden_layers"]]
        assert backward == [0, 2 * layer * SIZES["num_hidden_layers"]]
