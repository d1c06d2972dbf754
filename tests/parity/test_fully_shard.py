"""A step whose weights are spread over ranks in rows is the step of one process that holds all of them."""

import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import by_turns, run_on_ranks
from test_one_gradient import SIZES, StepOfDocuments, mesh_of
from torch.distributed.fsdp import FSDPModule
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM, LlamaConfig

from tuner.dataset.sampler import StepSampler
from tuner.engine import fsdp
from tuner.engine.fsdp import FullyShard
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.stepping import Stepping
from tuner.engine.strategy import NonFiniteStepError, StepResult
from tuner.engine.world import World
from tuner.method.sft import SFT
from tuner.model.build import build_llm
from tuner.model.checkpointing import ATTENTION, enable_gradient_checkpointing
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.memory import Memory
from tuner.model.tiles import tile

MODELS = {
    "untied": lambda: InternLM2Config(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
}


def checkpoint(method: SFT) -> None:
    method.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_memory(method: SFT) -> None:
    """All at once of what changes no step."""
    enable_gradient_checkpointing(method.llm, ATTENTION, offload=True)
    tile(method.llm, 8)


def freeze(method: SFT) -> None:
    """All of the embedding and of the first layer, and half of the second."""
    method.llm.get_input_embeddings().requires_grad_(False)
    first, second = method.llm.get_decoder().layers
    first.requires_grad_(False)
    for parameter in list(second.parameters())[::2]:
        parameter.requires_grad_(False)


def use_own_head(method: SFT) -> None:
    method.head_is_product = False


class Case(NamedTuple):
    """What is trained, on which layout."""

    model: str = "untied"
    change: Callable[[SFT], None] | None = None
    num_packs: int = 8  # of the step
    num_accumulation_steps: int = 4
    sequence_parallel: int = 1
    fsdp: str = "full"
    accumulate: str = "whole"
    optimizers: int = 1  # SGD alone, whose step is the gradient, or AdamW with clipping too

    def __str__(self) -> str:
        name = self.change.__name__ if self.change else "plain"
        layout = f"{self.fsdp}, {self.accumulate}, sp {self.sequence_parallel}"
        return f"{layout}, {self.model}, {name}, {self.num_packs} packs"


TWO_RANKS = [
    Case(optimizers=2),
    Case("tied", optimizers=2),
    Case("tied", use_own_head, num_packs=7),  # one micro-batch has no documents
    Case("tied", num_packs=1, num_accumulation_steps=1),  # one rank has none
    Case(change=save_memory, sequence_parallel=2, num_accumulation_steps=8),
    Case("tied", save_memory, num_packs=2, num_accumulation_steps=1),
    Case(change=freeze, optimizers=2),
    Case(change=use_own_head, accumulate="rows"),
]
ONE_BY_ONE = [  # what those have several of at once
    Case("tied", num_packs=7),
    Case(change=checkpoint),
    Case("tied", checkpoint, num_packs=2, num_accumulation_steps=1),
    Case("tied", use_own_head),
    Case(change=use_own_head),
    Case(sequence_parallel=2, num_accumulation_steps=8),
    Case(accumulate="rows"),
]
SINGLE = [Case("tied", checkpoint, optimizers=2)]
FOUR_RANKS = [
    Case("tied", checkpoint, sequence_parallel=2),
    Case("tied", fsdp="hybrid", num_accumulation_steps=2, optimizers=2),
    Case("tied", num_packs=7, fsdp="hybrid", num_accumulation_steps=2, accumulate="rows"),
]


def make_method(case: Case, dtype: torch.dtype) -> SFT:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(MODELS[case.model](), attn_implementation="tuner_sdpa")
    for parameter in llm.parameters():  # as drawn, attention is nearly uniform and says little
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    method = SFT(llm.to(dtype))
    if case.change is not None:
        case.change(method)
    return method


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Trained(NamedTuple):
    """What a run did."""

    results: list[StepResult]
    gradients: dict[str, torch.Tensor]  # of the first step, as the optimizer got it
    weights: dict[str, torch.Tensor]


def train(strategy: Stepping, case: Case, dtype: torch.dtype, optimizer: dict[str, Any], num_steps: int) -> Trained:
    """`num_steps` times over the same step; clipped where the optimizer is AdamW."""
    num_parts, method = strategy.degrees.size, make_method(case, dtype)
    if num_parts > 1:
        method.cut_sequences(strategy.mesh)
    clip = {"clip_grad": {"max_norm": 0.1}} if optimizer["type"] is AdamW else {}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(method, optim_wrapper={"optimizer": optimizer, **clip}, param_scheduler=schedule, num_steps=10**9)
    gradients: dict[str, torch.Tensor] = {}

    def note(*_: Any) -> None:
        for name, parameter in method.named_parameters():
            if parameter.requires_grad and name not in gradients:
                gradients[name] = whole(parameter.grad)

    strategy.optimizer.register_step_pre_hook(note)
    dataset, num_ranks = StepOfDocuments("every token", case.num_packs), strategy.world.size // num_parts
    sampler = StepSampler(
        dataset,
        num_accumulation_steps=case.num_accumulation_steps,
        rank=strategy.world.rank // num_parts,
        num_ranks=num_ranks,
    )
    results = [strategy.train_step(dataset.batches(sampler.plan(0), num_parts)) for _ in range(num_steps)]
    return Trained(results, gradients, {name: whole(weight) for name, weight in method.named_parameters()})


def fully_sharded(case: Case, precision: str = "fp32") -> FullyShard:
    rank, size = dist.get_rank(), dist.get_world_size()
    strategy = FullyShard(
        fsdp=case.fsdp,
        accumulate=case.accumulate,
        precision=precision,
        sequence_parallel_size=case.sequence_parallel,
        device="cpu",
    )
    strategy.place(World(rank, size, rank % 2, 2), mesh_of(strategy.degrees))
    return strategy


def apart(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry of its tensor."""
    assert got.keys() == expected.keys()
    return max(((got[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


OPTIMIZERS: dict[str, tuple[dict[str, Any], int]] = {  # and how many steps each makes
    "SGD": ({"type": SGD, "lr": 1.0}, 1),
    "AdamW": ({"type": AdamW, "lr": 1e-2}, 2),
}


class Reference(NamedTuple):
    """A run of one process that holds all, computes nothing again, and sees each document of the step in one batch."""

    model: str
    is_frozen: bool
    optimizer: str
    dtype: torch.dtype

    @classmethod
    def of(cls, case: Case, optimizer: str, dtype: torch.dtype) -> "Reference":
        """What `case` must give."""
        return cls(case.model, case.change is freeze, optimizer, dtype)

    def run(self) -> Trained:
        """Make the step, or some."""
        case = Case(self.model, freeze if self.is_frozen else None, num_packs=1, num_accumulation_steps=1)
        return train(Replicated(precision="fp32", device="cpu"), case, self.dtype, *OPTIMIZERS[self.optimizer])


def compare(cases: Sequence[Case], dtype: torch.dtype) -> dict[str, float]:
    found, tolerance = {}, 1e-5 if dtype == torch.float32 else 1e-12
    runs = [(case, optimizer) for case in cases for optimizer in list(OPTIMIZERS)[: case.optimizers]]
    references = by_turns(Reference.run, [Reference.of(case, optimizer, dtype) for case, optimizer in runs])
    for case, optimizer in runs:
        expected = references[Reference.of(case, optimizer, dtype)]
        got = train(fully_sharded(case), case, dtype, *OPTIMIZERS[optimizer])
        for one, other in zip(got.results, expected.results, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=tolerance)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
            assert one.num_loss_tokens == other.num_loss_tokens
        found[f"gradients of {case}, {optimizer}"] = apart(got.gradients, expected.gradients)
        found[f"weights of {case}, {optimizer}"] = apart(got.weights, expected.weights)
    return found


def assert_within(found: dict[str, float], tolerance: float) -> None:
    assert {name: value for name, value in found.items() if not value <= tolerance} == {}


@pytest.mark.slow
def test_four_ranks_make_the_step_of_one_also_with_cut_sequences_and_with_copies_on_two_nodes():
    for found in run_on_ranks(4, compare, FOUR_RANKS, torch.float64):
        assert_within(found, 1e-12)


@pytest.mark.slow
def test_so_they_do_with_one_thing_at_a_time():
    for found in run_on_ranks(2, compare, ONE_BY_ONE, torch.float64):
        assert_within(found, 1e-12)


def look_closer(directory: Path) -> dict[str, Any]:
    """On two ranks: what else holds; one start of processes for all of it."""
    return {
        "fp64": compare(TWO_RANKS, torch.float64),
        "fp32": compare(SINGLE, torch.float32),
        "averaged": average_instead(Case("tied")),
        "collectives": {how: count_collectives(how) for how in ("whole", "rows")},
        "precision": compute_in("bf16", "fp16"),
        "overflow": overflow(),
        "poisoned": poison(),
        "generated": generate(),
        "resumed": resume_from_one(),
        "held": {model: hold(model, directory) for model in MODELS},
    }


@contextmanager
def averaging() -> Iterator[None]:
    """Gradients as FSDP2 itself reduces them."""
    kept = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda self, factor: kept(self, float(dist.get_world_size()))
    try:
        yield
    finally:
        FSDPModule.set_gradient_divide_factor = kept


def average_instead(case: Case) -> float:
    expected = Reference.of(case, "SGD", torch.float64).run()
    with averaging():
        got = train(fully_sharded(case), case, torch.float64, *OPTIMIZERS["SGD"])
    return apart(got.gradients, expected.gradients)


def count_collectives(how: str) -> dict[str, int]:
    """Of a step of four micro-batches."""
    strategy, batches = prepared(Case(accumulate=how))
    counts, kept = {}, {name: getattr(dist, name) for name in ("reduce_scatter_single", "all_gather_single")}

    def counting(name: str, *args: Any, **options: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return kept[name](*args, **options)

    for name in kept:
        setattr(dist, name, partial(counting, name))
    try:
        strategy.train_step(batches)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return counts


def compute_in(*precisions: str) -> dict[str, Any]:
    """Losses of some steps, on one process too, and the dtypes that a layer, the optimizer and a gradient have."""
    alone = by_turns(losses_alone, precisions)
    return {precision: {"one process": alone[precision], **compute_spread(precision)} for precision in precisions}


IN_HALVES = Case("tied", num_packs=2, num_accumulation_steps=1)


def losses_alone(precision: str) -> list[float]:
    both = IN_HALVES._replace(num_accumulation_steps=2)
    return losses(Replicated(precision=precision, device="cpu"), both)


def losses(strategy: Stepping, case: Case) -> list[float]:
    return [result.loss for result in train(strategy, case, torch.float32, {"type": AdamW, "lr": 1e-2}, 10).results]


def compute_spread(precision: str) -> dict[str, Any]:
    strategy, dtypes = fully_sharded(IN_HALVES, precision), set()

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        if torch.is_grad_enabled() and type(module).__name__ == "LlamaMLP":  # without: what SFT tries out
            dtypes.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        spread = losses(strategy, IN_HALVES)
    kept = {value.dtype for state in strategy.optimizer.state.values() for value in state.values()}
    return {"spread": spread, "layer": dtypes, "kept": kept | {weight.dtype for weight in strategy.parameters()}}


def prepared(case: Case, precision: str = "fp32") -> tuple[FullyShard, Any]:
    """A strategy that holds a model, and the batches of this rank's part of a step."""
    strategy = fully_sharded(case, precision)
    wrapper = {"optimizer": {"type": AdamW, "lr": 1e-2}}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(make_method(case, torch.float32), optim_wrapper=wrapper, param_scheduler=schedule, num_steps=10**9)
    return strategy, step_of(case)


def step_of(case: Case) -> list[Any]:
    """This rank's micro-batches; where two ranks share a sequence, both have the same."""
    dataset, num_parts = StepOfDocuments("every token", case.num_packs), case.sequence_parallel
    rank, num_ranks = dist.get_rank() // num_parts, dist.get_world_size() // num_parts
    sampler = StepSampler(dataset, num_accumulation_steps=case.num_accumulation_steps, rank=rank, num_ranks=num_ranks)
    return dataset.batches(sampler.plan(0), num_parts)


def weights_of(strategy: FullyShard) -> dict[str, torch.Tensor]:
    return {name: whole(weight) for name, weight in strategy.model.named_parameters()}


def overflow() -> dict[str, Any]:
    """A step under a loss scale with which the gradient overflows."""
    strategy, batches = prepared(Case("tied"), "fp16")
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights_of(strategy)
    result = strategy.train_step(batches)
    same = all(torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())
    return {"skipped": result.skipped, "scale": strategy.scaler.get_scale(), "same weights": same}


def poison() -> dict[str, Any]:
    """A gradient that is NaN in the rows of one rank only."""
    strategy, batches = prepared(Case())
    strategy.train_step(batches)
    norm = strategy.model.get_submodule("llm.model.norm").weight
    before = weights_of(strategy)
    exact = strategy.gradient_norm

    def spoiled() -> torch.Tensor:
        if dist.get_rank() == 1:
            norm.grad.to_local()[0] = float("nan")
        return exact()

    strategy.gradient_norm = spoiled
    try:
        strategy.train_step(batches)
    except NonFiniteStepError as error:
        same = all(torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())
        return {"error": str(error), "same weights": same, "step": strategy.step}
    return {}


def generate() -> dict[str, Any]:
    """Before the first step, between two, and what the second is then."""
    steps, replies = {}, []
    for samples in (False, True):
        strategy, batches = prepared(Case("tied"))
        llm = strategy.model.get_submodule("llm")
        for _ in range(2):
            if samples:
                with torch.no_grad(), strategy.generation():
                    replies.append(llm.generate(torch.arange(1, 5)[None], max_new_tokens=6, do_sample=False).tolist())
            strategy.train_step(batches)
        steps[samples] = weights_of(strategy)
    return {"replies": replies, "same": all(torch.equal(steps[True][name], steps[False][name]) for name in steps[True])}


def resume_from_one() -> dict[str, bool]:
    """What a rank reads of a checkpoint that one process has written, and the step after it."""
    case, alone = Case("tied"), Replicated(precision="fp32", device="cpu")
    train(alone, case._replace(num_accumulation_steps=8), torch.float32, *OPTIMIZERS["AdamW"])
    spread, _ = prepared(case)
    with tempfile.TemporaryDirectory() as directory:
        spread.resume(Path(directory), alone.save_checkpoint(Path(directory)))
    states = [
        torch.equal(whole(value), alone.optimizer.state[parameter][key])
        for parameter, own in zip(alone.parameters(), spread.parameters())
        for key, value in spread.optimizer.state[own].items()
    ]
    weights = weights_of(spread)
    return {
        "weights": all(torch.equal(weights[name], weight) for name, weight in alone.model.named_parameters()),
        "states": all(states) and len(states) == 3 * len(alone.parameters()),
        "step": spread.step == 2,
    }


def hold(model: str, directory: Path) -> dict[str, Any]:
    """Build a model of files whole on each rank, and lend it to them; its sequences are cut, too."""
    weights, most, case = [], {}, Case(model, num_packs=2, sequence_parallel=2, num_accumulation_steps=2)
    for lent in (False, True):
        strategy = fully_sharded(case)
        hold = strategy.hold if lent else None
        llm = build_llm(str(directory / model), attention="sdpa", memory=Memory(True), hold=hold)
        method = SFT(llm)
        method.cut_sequences(strategy.mesh)
        with counting_whole_layers(llm) as counts:
            strategy.prepare(
                method,
                optim_wrapper={"optimizer": {"type": AdamW, "lr": 1e-2}},
                param_scheduler=WarmupCosine(warmup_ratio=0, min_lr_ratio=1),
                num_steps=10**9,
            )
        most[lent] = max(counts)
        strategy.train_step(step_of(case))
        weights.append(weights_of(strategy))
    one, other = weights
    assert one.keys() == other.keys()
    return {"most": most, "same": all(torch.equal(one[name], other[name]) for name in one)}


@contextmanager
def counting_whole_layers(llm: torch.nn.Module) -> Iterator[list[int]]:
    """How many layers have all their weights in memory, before and whenever one of them is cut."""
    refs = [[weakref.ref(parameter) for parameter in layer.parameters()] for layer in llm.get_decoder().layers]
    kept, counts = fsdp.fully_shard, []

    def count() -> None:
        whole = [[ref() for ref in layer] for layer in refs]
        counts.append(sum(all(p is not None and p.untyped_storage().size() for p in layer) for layer in whole))

    def counting(*args: Any, **options: Any) -> Any:
        count()
        return kept(*args, **options)

    count()
    fsdp.fully_shard = counting
    try:
        yield counts
    finally:
        fsdp.fully_shard = kept


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("models")
    for model in MODELS:
        make_method(Case(model), torch.float32).llm.save_pretrained(directory / model)
    return run_on_ranks(2, look_closer, directory)


def test_two_ranks_make_the_step_of_one(seen):
    for found in seen:
        assert len(found["fp64"]) == 2 * sum(case.optimizers for case in TWO_RANKS)
        assert_within(found["fp64"], 1e-12)


def test_in_fp32_the_difference_is_rounding(seen):
    for found in seen:
        assert len(found["fp32"]) == 2 * sum(case.optimizers for case in SINGLE)
        assert_within(found["fp32"], 1e-5)


def test_an_average_in_place_of_the_sum_is_caught(seen):
    for found in seen:
        assert found["averaged"] == pytest.approx(0.5)


def test_gradients_are_exchanged_once_a_step_or_where_memory_is_short_once_a_micro_batch(seen):
    units, micro_batches = 3, 4  # two layers and the rest
    gathered = micro_batches * (2 * (units - 1) + 1)  # a layer for its forward and for its backward
    for found in seen:
        assert found["collectives"]["whole"] == {"reduce_scatter_single": units, "all_gather_single": gathered}
        assert found["collectives"]["rows"]["reduce_scatter_single"] == units * micro_batches


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_layers_compute_in_the_precision_and_weights_and_optimizer_stay_fp32(seen, precision, dtype):
    for found in seen:
        values = found["precision"][precision]
        assert values["layer"] == {dtype}
        assert values["kept"] == {torch.float32}
        assert values["spread"] == pytest.approx(values["one process"], rel=0.05)  # norms' weights are rounded here
        assert values["spread"][-1] < 0.2 * values["spread"][0]


def test_fp16_skips_a_step_that_overflows_on_all_ranks(seen):
    for found in seen:
        assert found["overflow"] == {"skipped": True, "scale": 2.0**39, "same weights": True}


def test_a_nan_in_the_rows_of_one_rank_stops_all_before_weights_are_touched(seen):
    for found in seen:
        assert found["poisoned"]["same weights"]
        assert found["poisoned"]["step"] == 1
        assert "gradient norm nan" in found["poisoned"]["error"]


def test_the_sampled_chat_may_come_at_any_time_and_changes_nothing(seen):
    first, second = seen[0]["generated"]["replies"]
    assert first != second
    for found in seen:
        assert found["generated"] == {"replies": [first, second], "same": True}


def test_a_rank_resumes_its_rows_of_what_one_process_has_written(seen):
    for found in seen:
        assert found["resumed"] == {"weights": True, "states": True, "step": True}


def test_a_model_whose_layers_are_lent_to_it_is_the_one_that_is_built_whole(seen):
    for found in seen:
        for held in found["held"].values():
            assert held == {"most": {False: 2, True: 0}, "same": True}
