"""A step under ZeRO is the step of one process: loss, norm, every gradient, and the weights that AdamW makes."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import by_turns, run_on_ranks
from test_fully_shard import MODELS, checkpoint, freeze, save_memory
from test_one_gradient import StepOfDocuments
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM

from tuner.dataset.sampler import StepPlan, StepSampler
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import NonFiniteStepError, StepResult, Strategy
from tuner.engine.world import World
from tuner.engine.zero import Zero
from tuner.method.sft import SFT
from tuner.model.build import build_llm
from tuner.model.hollow import StoredWeights
from tuner.parallel.mesh import build_mesh

if find_spec("deepspeed") is None:  # not imported: that takes seconds, and only the ranks need it
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

BOUND = 1e-5  # of losses, of norms, and of the largest change of a weight
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"type": SGD, "lr": 1.0},  # which subtracts the gradient itself
    # An eps far above rounding: else Adam makes a whole update out of the rounding of a gradient that is zero. A rate
    # at which weights move far: differences are told by the change, and each step rounds the whole weight.
    "AdamW": {"type": AdamW, "lr": 0.1, "eps": 1e-3, "weight_decay": 0.1},
}


class Case(NamedTuple):
    """What is trained, and how it is held."""

    deepspeed: str
    optimizer: str = "SGD"
    trained: str = "every token"
    num_packs: int = 4  # of the step
    num_accumulation_steps: int = 2
    model: str = "untied"
    change: Callable[[SFT], None] | None = None
    sequence_parallel: int = 1

    def __str__(self) -> str:
        change = f", {self.change.__name__}" if self.change else ""
        return (
            f"{self.deepspeed}, {self.optimizer}, {self.trained}, {self.num_packs} packs, "
            f"{self.model}{change}, sp {self.sequence_parallel}"
        )


STAGES = ("zero1", "zero2", "zero3")
TWO_RANKS = [
    *(Case(stage) for stage in STAGES),
    *(Case(stage, "AdamW", num_packs=3) for stage in STAGES),  # one micro-batch has no documents; clipped
    Case("zero3", change=save_memory, num_accumulation_steps=4, sequence_parallel=2),
    Case("zero3", trained="one token of the step"),
]
MORE = [
    Case("zero2", num_packs=1, num_accumulation_steps=1),  # a rank has none
    Case("zero3", num_packs=1, num_accumulation_steps=1),
    *(Case(stage, "AdamW", model="tied", change=checkpoint) for stage in STAGES),
    *(Case(stage, "AdamW", change=freeze) for stage in STAGES),
    *(Case(preset, "AdamW") for preset in ("zero2_offload", "zero3_offload")),
    *(Case(stage, num_accumulation_steps=4, sequence_parallel=2) for stage in STAGES),
]


def make_method(case: Case) -> SFT:
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(MODELS[case.model](), attn_implementation="tuner_sdpa")
    for parameter in llm.parameters():  # as drawn, attention is nearly uniform and says little
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    method = SFT(llm)
    if case.change is not None:
        case.change(method)
    return method


def start(strategy: Strategy, case: Case, method: SFT) -> None:
    """Hand over the model; clipped where the optimizer is AdamW."""
    if strategy.degrees.size > 1:
        method.cut_sequences(strategy.mesh)
    clip = {"clip_grad": {"max_norm": 0.1}} if case.optimizer == "AdamW" else {}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    wrapper = {"optimizer": OPTIMIZERS[case.optimizer], **clip}
    strategy.prepare(method, optim_wrapper=wrapper, param_scheduler=schedule, num_steps=10**9)


def train(strategy: Strategy, case: Case, num_steps: int, method: SFT | None = None) -> list[StepResult]:
    """`num_steps` times over the same step."""
    start(strategy, case, method or make_method(case))
    num_parts = strategy.degrees.size
    dataset, num_ranks = StepOfDocuments(case.trained, case.num_packs), strategy.world.size // num_parts
    steps = case.num_accumulation_steps * (dist.get_world_size() // num_parts // num_ranks)  # one rank takes all
    sampler = StepSampler(
        dataset, num_accumulation_steps=steps, rank=strategy.world.rank // num_parts, num_ranks=num_ranks
    )
    return [strategy.train_step(dataset.batches(sampler.plan(0), num_parts)) for _ in range(num_steps)]


def on_all_ranks(case: Case, **settings: Any) -> Zero:
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    settings = {"precision": "fp32", "sequence_parallel_size": case.sequence_parallel, **settings}
    if case.deepspeed == "zero3_hpz":
        settings["hpz_partition_size"] = 2  # as if nodes had two processes
    strategy = Zero(case.deepspeed, device="cpu", **settings)
    strategy.place(World(rank, size, rank, size), build_mesh(strategy.degrees))
    return strategy


def weights_of(strategy: Zero) -> dict[str, torch.Tensor]:
    return {name: strategy.tensors.whole(weight) for name, weight in strategy.model.llm.named_parameters()}


class Alone(NamedTuple):
    """What one process does."""

    results: list[StepResult]
    weights: dict[str, torch.Tensor]
    changes: dict[str, float]  # the largest of each weight


def train_alone(case: Case) -> Alone:
    """A case whose differences are told: rounding a weight to fp32 once a step stays well below what may differ.

    At a rate of 0.01 it does not: then both ways are 1.2e-5 of a weight's change from what float64 makes, and 1.0e-5
    apart, by the distance of fp32 numbers alone.
    """
    method, strategy = make_method(case), Replicated(precision="fp32", device="cpu")
    before = {name: weight.detach().clone() for name, weight in method.llm.named_parameters()}
    results = train(strategy, case, num_steps_of(case), method)
    weights, changes = {name: weight.detach() for name, weight in method.llm.named_parameters()}, {}
    for name, parameter in method.llm.named_parameters():
        changes[name] = (weights[name] - before[name]).abs().max().item()
        assert (changes[name] > 0) == parameter.requires_grad, name
        rounding = num_steps_of(case) * weights[name].abs().max().item() * 2**-24
        assert rounding < BOUND / 2 * changes[name] or not parameter.requires_grad, name
    return Alone(results, weights, changes)


def num_steps_of(case: Case) -> int:
    return 3 if case.optimizer == "AdamW" else 1


def compare(case: Case, alone: Alone) -> dict[str, float]:
    """Relative differences to one process: of losses and norms, and of each weight's change by its largest."""
    spread, found = on_all_ranks(case), {}
    results = train(spread, case, num_steps_of(case))
    weights = weights_of(spread)
    spread.engine.destroy()
    for step, (got, expected) in enumerate(zip(results, alone.results, strict=True)):
        found[f"loss {step}"] = abs(got.loss / expected.loss - 1)
        found[f"norm {step}"] = abs(got.grad_norm / expected.grad_norm - 1)
        assert got.num_loss_tokens == expected.num_loss_tokens
    assert weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        found[name] = (weights[name] - weight).abs().max().item() / max(alone.changes[name], 1e-20)
    return found


def compare_all(cases: Sequence[Case]) -> dict[str, float]:
    """The largest difference of each case."""
    alone = by_turns(train_alone, [one_process(case) for case in cases])
    return {str(case): max(compare(case, alone[one_process(case)]).values()) for case in cases}


def one_process(case: Case) -> Case:
    """The same step where nothing is spread."""
    return case._replace(deepspeed="none", sequence_parallel=1)


def assert_same(found: dict[str, float], cases: Sequence[Case]) -> None:
    assert len(found) == len(cases)
    assert {case: apart for case, apart in found.items() if not apart < BOUND} == {}


@pytest.mark.slow
def test_so_they_do_with_checkpointing_frozen_weights_offload_and_cut_sequences():
    for found in run_on_ranks(2, compare_all, MORE):
        assert_same(found, MORE)


THREE_RANKS = [  # which divide no weight of the model; one has a micro-batch without documents
    Case("zero3", num_packs=5),
    Case("zero3", "AdamW", num_packs=5, model="tied"),
    Case("zero1", "AdamW", num_packs=5),
]


@pytest.mark.slow
def test_three_ranks_make_the_step_of_one_process():
    for found in run_on_ranks(3, compare_all, THREE_RANKS):
        assert_same(found, THREE_RANKS)


FOUR_RANKS = [
    Case("zero3", "AdamW", num_packs=3, sequence_parallel=2),
    Case("zero3_hpz", "AdamW", num_accumulation_steps=1),
]


@pytest.mark.slow
def test_four_ranks_in_two_sequences_or_two_nodes_make_the_step_of_one_process():
    for found in run_on_ranks(4, compare_all, FOUR_RANKS):
        assert_same(found, FOUR_RANKS)


def divide_by_ranks(case: Case) -> dict[str, float]:
    """Of each gradient, what is left of it where the loss of a rank is not made up for DeepSpeed's mean."""
    strategy = on_all_ranks(case)
    prepare = strategy.prepare

    def prepare_wrongly(*args: Any, **settings: Any) -> Any:
        prepared, strategy.loss_factor = prepare(*args, **settings), 1
        return prepared

    strategy.prepare = prepare_wrongly
    train(strategy, case, 1)
    alone = Replicated(precision="fp32", device="cpu")
    train(alone, case, 1)
    before, weights = dict(make_method(case).llm.named_parameters()), weights_of(strategy)
    changes = {name: (weight - before[name]).norm() for name, weight in alone.model.llm.named_parameters()}
    return {name: ((weights[name] - before[name]).norm() / change).item() for name, change in changes.items()}


def poison_a_rank(stage: str) -> tuple[list[str], bool]:
    """What all ranks say where one has a NaN in a gradient, and whether any weight has moved."""
    case, said = Case(stage, "AdamW"), []
    strategy = on_all_ranks(case)
    train(strategy, case, 1)
    before = weights_of(strategy)
    if dist.get_rank() == 1:
        strategy.model.llm.get_decoder().norm.register_forward_hook(poison_gradient)
    batches = StepOfDocuments(case.trained, 2).batches(one_pack_each(), 1)
    for _ in range(2):
        try:
            strategy.train_step(batches)
        except NonFiniteStepError as error:
            said.append(str(error))
    after = weights_of(strategy)
    strategy.engine.destroy()
    return said, all(torch.equal(before[name], after[name]) for name in before)


def poison_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * float("nan"))


def one_pack_each() -> StepPlan:
    dataset = StepOfDocuments("every token", 2)
    return StepSampler(dataset, num_accumulation_steps=1, rank=dist.get_rank(), num_ranks=2).plan(0)


def overflow(stage: str) -> tuple[list[bool], list[float], bool]:
    """Which fp16 steps are skipped from a scale that is too large, the scales after them, and whether weights moved."""
    case = Case(stage, "AdamW")
    strategy = on_all_ranks(case, precision="fp16")
    train(strategy, case, 0)
    strategy.optimizer.loss_scaler.cur_scale = 2.0**22
    before, skipped, scales = weights_of(strategy), [], []
    batches = StepOfDocuments(case.trained, 2).batches(one_pack_each(), 1)
    skipped.append(strategy.train_step(batches).skipped)
    after = weights_of(strategy)
    for _ in range(12):
        scales.append(strategy.optimizer.loss_scaler.cur_scale)
        skipped.append(strategy.train_step(batches).skipped)
    strategy.engine.destroy()
    return skipped, scales, all(torch.equal(before[name], after[name]) for name in before)


def compute_in_halves(stage: str) -> dict[str, Any]:
    """In bf16: the dtypes at work, and the losses of some steps."""
    case = Case(stage, "AdamW", change=note_dtypes)
    strategy = on_all_ranks(case, precision="bf16")
    results = train(strategy, case, 12)
    seen = strategy.model.seen
    state = strategy.tensors.whole(strategy.model.llm.get_decoder().norm.weight, "exp_avg_sq")
    parts = {flat.dtype for flat in strategy.tensors.partitions()}
    strategy.engine.destroy()
    return {"activations": seen, "masters": parts, "state": state.dtype, "losses": [result.loss for result in results]}


def note_dtypes(method: SFT) -> None:
    method.seen = set()
    method.llm.get_decoder().layers[0].feed_forward.register_forward_hook(lambda *args: method.seen.add(args[-1].dtype))


def look_closer() -> dict[str, dict[str, Any]]:
    claims = {"poison": poison_a_rank, "overflow": overflow, "halves": compute_in_halves}
    found = {name: {stage: claim(stage) for stage in ("zero2", "zero3")} for name, claim in claims.items()}
    found["halves"]["zero1"] = compute_in_halves("zero1")
    found |= {"divided": {"zero3": divide_by_ranks(Case("zero3"))}}
    return found | {"same": compare_all(TWO_RANKS)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, Any]]]:
    """By rank; one start of the processes for all claims."""
    return run_on_ranks(2, look_closer)


def test_two_ranks_make_the_step_of_one_process(found):
    for rank in found:
        assert_same(rank["same"], TWO_RANKS)


def test_a_mean_over_ranks_in_place_of_the_sum_is_caught(found):
    for rank in found:
        ratios = list(rank["divided"]["zero3"].values())
        assert ratios == pytest.approx([0.5] * len(ratios), rel=1e-3)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_nan_on_one_rank_stops_all_before_any_weight_moves(found, stage):
    for said, unmoved in (rank["poison"][stage] for rank in found):
        assert len(said) == 2
        assert "gradient norm inf" in said[0]
        assert unmoved


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_fp16_halves_its_scale_where_the_gradient_overflows(found, stage):
    for skipped, scales, unmoved in (rank["overflow"][stage] for rank in found):
        assert skipped[0]
        assert unmoved
        assert scales[0] == 2.0**21
        assert not skipped[-1]
        assert scales[-1] == 2.0 ** (22 - sum(skipped))


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_bf16_computes_in_bf16_and_keeps_fp32_weights_and_state(found, stage):
    for seen in (rank["halves"][stage] for rank in found):
        assert seen["activations"] == {torch.bfloat16}
        assert seen["masters"] == {seen["state"]} == {torch.float32}
        assert seen["losses"][-1] < 0.97 * seen["losses"][0]


def test_bf16_makes_the_same_steps_at_every_stage(found):
    for rank in found:
        losses = {stage: seen["losses"] for stage, seen in rank["halves"].items()}
        assert losses["zero1"] == pytest.approx(losses["zero2"], rel=1e-5)
        assert losses["zero3"][:4] == pytest.approx(losses["zero2"][:4], rel=3e-3)


def take_in(directory: str, precision: str, sequence_parallel: int) -> tuple[dict[str, bool], float, list[str]]:
    """Of a model in a directory: which weights are what the files hold, how far a step is off, what stayed whole."""
    case = Case("zero3", num_accumulation_steps=2 * sequence_parallel, sequence_parallel=sequence_parallel)
    strategy = on_all_ranks(case, precision=precision)
    method = SFT(build_llm(directory, attention="sdpa", hold=strategy.holder()))
    whole = [name for name, parameter in method.llm.named_parameters() if parameter.numel()]
    results = train(strategy, case, 1, method)
    after = weights_of(strategy)
    again = on_all_ranks(case, precision=precision)
    again_method = SFT(build_llm(directory, attention="sdpa", hold=again.holder()))
    start(again, case, again_method)
    files = StoredWeights(directory, is_offline=True)
    same = {name: torch.equal(weight, files[name]) for name, weight in weights_of(again).items()}
    alone = Replicated(precision="fp32", device="cpu")
    expected = train(alone, case._replace(sequence_parallel=1), 1, SFT(build_llm(directory, attention="sdpa")))
    apart = max(
        ((after[name] - weight).abs().max() / (weight - files[name]).abs().max()).item()
        for name, weight in alone.model.llm.named_parameters()
    )
    return same, max(apart, abs(results[0].loss / expected[0].loss - 1)), whole


def take_in_all(directory: str) -> dict[tuple[str, int], Any]:
    return {key: take_in(directory, *key) for key in (("fp32", 1), ("fp32", 2), ("bf16", 1))}


@pytest.mark.slow
def test_weights_are_taken_one_by_one_and_none_is_rounded(tmp_path):
    make_method(Case("zero3")).llm.save_pretrained(tmp_path)
    for rank in run_on_ranks(2, take_in_all, str(tmp_path)):
        for (precision, _), (same, apart, whole) in rank.items():
            assert same == dict.fromkeys(same, True)
            assert whole == []
            assert apart < (1e-5 if precision == "fp32" else 0.2)
