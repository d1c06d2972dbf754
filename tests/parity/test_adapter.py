"""Adapters in place give the gradients of peft's own model, however a step is spread, and only they are kept."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import by_turns, run_on_ranks
from test_one_gradient import SIZES, StepOfDocuments, mesh_of
from torch import Tensor, nn
from torch.optim import SGD
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tuner.dataset.sampler import StepSampler
from tuner.engine.replicated import Replicated
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategy import Strategy
from tuner.engine.tensor_files import WEIGHTS
from tuner.engine.world import ALONE, World
from tuner.method.sft import SFT
from tuner.model.adapter import LoRA, export_adapter, kept_parameters
from tuner.model.build import build_llm
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.memory import Memory

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "internlm2": lambda: InternLM2Config(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
}
PLAIN = LoRA(rank=4, alpha=6)
VARIANTS = {
    "lora": PLAIN,
    "rslora": replace(PLAIN, variant="rslora"),
    "dora": replace(PLAIN, variant="dora"),
    "some": replace(PLAIN, targets=("q_proj", "down_proj")),
    "head": replace(PLAIN, targets=("v_proj", "lm_head")),
    "head by its own way": replace(PLAIN, targets=("v_proj", "lm_head"), variant="dora"),
    "saved": replace(PLAIN, modules_to_save=("embed_tokens", "lm_head", "model.norm")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of small models whose attention is not nearly uniform."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        llm = AutoModelForCausalLM.from_config(config())
        for parameter in llm.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        llm.save_pretrained(root / name)
    return root


def move(llm: PreTrainedModel) -> None:
    """Away from the beginning, where B is zero and A has no gradient."""
    for name, parameter in llm.named_parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1


def make_method(directory: Path, lora: LoRA, dtype: torch.dtype = torch.float64, *, again: bool = False) -> SFT:
    llm = build_llm(str(directory), attention="sdpa", adapter=lora, memory=Memory(again))
    move(llm)
    return SFT(llm if lora.quantise else exact(llm.to(dtype)))


def exact(llm: PreTrainedModel) -> PreTrainedModel:
    """Transformers' norms compute in float32 whatever they are given; these do not."""
    for module in list(llm.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return llm


def prepare(strategy: Strategy, method: SFT, **optimizer: Any) -> None:
    if strategy.degrees.size > 1:
        method.cut_sequences(strategy.mesh)
    node = {"type": SGD, "lr": 1.0, **optimizer}
    schedule = WarmupCosine(warmup_ratio=0, min_lr_ratio=1)
    strategy.prepare(method, optim_wrapper={"optimizer": node}, param_scheduler=schedule, num_steps=10**9)


def gradients_of_a_step(strategy: Strategy, method: SFT, num_packs: int, num_accumulation_steps: int) -> dict:
    """As the optimizer gets them; where DeepSpeed's has them, what SGD at a rate of 1 takes off the weights."""
    is_zero = type(strategy).__name__ == "Zero"
    prepare(strategy, method)
    before = {name: weight.clone() for name, weight in strategy.state_tensors()[WEIGHTS]} if is_zero else {}
    found: dict[str, Tensor] = {}
    if not is_zero:
        strategy.optimizer.register_step_pre_hook(
            lambda *_: found.update({n: whole(p.grad) for n, p in method.llm.named_parameters() if p.requires_grad})
        )
    parts = strategy.degrees.size
    dataset, ranks = StepOfDocuments("every token", num_packs), strategy.world.size // parts
    sampler = StepSampler(
        dataset, num_accumulation_steps=num_accumulation_steps, rank=strategy.world.rank // parts, num_ranks=ranks
    )
    result = strategy.train_step(dataset.batches(sampler.plan(0), parts))
    if is_zero:
        after = dict(strategy.state_tensors()[WEIGHTS])
        assert after.keys() == before.keys()
        found = {name: before[name] - weight for name, weight in after.items()}
    return {"loss": torch.tensor(result.loss, dtype=torch.float64), **found}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of its tensor."""
    assert got.keys() == expected.keys()
    return max(((got[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


def peft_model(directory: Path, lora: LoRA, trained: dict[str, Tensor]) -> Any:
    """The same adapter by peft alone, with the same numbers in it."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    llm = exact(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa"))
    names = {name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted(names - {"lm_head", "output"} if lora.targets == "auto" else lora.targets),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
    )
    model = get_peft_model(llm, config, autocast_adapter_dtype=False)
    report = set_peft_model_state_dict(model, export_adapter(trained))
    assert report.unexpected_keys == []
    return model.train()


def by_definition(model: Any) -> dict[str, Tensor]:
    """Each document alone, all logits kept: -log p summed over the labels, over their number."""
    from peft import get_peft_model_state_dict

    dataset = StepOfDocuments("every token", 1)
    total = torch.zeros((), dtype=torch.float64)
    for document in dataset.documents:
        ids = torch.from_numpy(document.ids.astype(np.int64))[None]
        if ids.shape[1] > 1:
            logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
            total = total - logits[:-1].gather(1, ids[0, 1:, None]).sum()
    loss = total / int(dataset.num_loss_tokens.sum())
    loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert None not in trained.values()
    gradients = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    return {"loss": loss.detach(), **gradients}


QUICK = [("internlm2", "lora"), ("internlm2", "dora"), ("llama", "rslora"), ("llama", "head")]
OTHERS = [("internlm2", "rslora"), *(("llama", name) for name in VARIANTS if ("llama", name) not in QUICK)]


@pytest.mark.parametrize(
    ("model", "variant"), [*QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
@pytest.mark.filterwarnings("ignore:.*does more to its logits")
def test_gradients_are_those_of_peft_s_own_model_for_each_document_alone(models: Path, model: str, variant: str):
    lora = VARIANTS[variant]
    method = make_method(models / model, lora, again=True)
    assert method.head_is_product == (variant != "head by its own way")
    expected = by_definition(peft_model(models / model, lora, dict(kept_parameters(method.llm))))
    strategy = Replicated(precision="fp32", device="cpu")
    got = gradients_of_a_step(strategy, method, num_packs=3, num_accumulation_steps=3)
    assert apart({"loss": got.pop("loss"), **export_adapter(got)}, expected) < 1e-12


def dequantised_base(source: Path, place: Path) -> Path:
    """The same model with the numbers that NF4 makes of its linear layers, the head's apart, by bitsandbytes alone."""
    llm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in llm.named_modules():
        if isinstance(module, nn.Linear) and name != "output":
            module.weight.data = bitsandbytes.functional.dequantize_4bit(
                *bitsandbytes.functional.quantize_4bit(
                    module.weight.data, quant_type="nf4", blocksize=64, compress_statistics=True
                )
            )
    llm.save_pretrained(place)
    return place


@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_gradients_on_four_bits_are_those_of_the_dequantised_base(models: Path, variant: str, tmp_path: Path):
    lora = replace(PLAIN, variant=variant)
    got, expected, before = (
        gradients_of_a_step(
            Replicated(precision="fp32", device="cpu"), make_method(directory, one, torch.float32), 3, 3
        )
        for directory, one in (
            (models / "internlm2", replace(lora, quantise="nf4")),
            (dequantised_base(models / "internlm2", tmp_path / "base"), lora),
            (models / "internlm2", lora),
        )
    )
    assert apart(got, expected) < 2e-5
    assert apart(before, expected) > 1e-2  # of weights that never were in 4 bits


class Case(NamedTuple):
    """How a step is spread over two ranks, and what trains in it."""

    way: str  # of holding the weights
    adapter: str = "lora"
    model: str = "internlm2"
    sequence_parallel: int | dict[str, int] = 1

    def __str__(self) -> str:
        return f"{self.way}, {self.adapter}, {self.model}, sp {self.sequence_parallel}"


ADAPTERS = {
    **VARIANTS,
    "head": replace(PLAIN, targets=("wqkv", "output")),
    "saved": replace(PLAIN, modules_to_save=("tok_embeddings", "output")),
    "qlora": replace(PLAIN, quantise="nf4"),
    "qdora": replace(PLAIN, quantise="nf4", variant="dora"),
}
TWO_RANKS = [
    *(Case("ddp", adapter) for adapter in ("lora", "dora", "head", "saved", "qlora")),
    Case("ddp", sequence_parallel=2),
    Case("ddp", "head", sequence_parallel={"ring": 2}),
    Case("ddp", "qlora", sequence_parallel=2),
    *(Case("full", adapter) for adapter in ("lora", "dora", "head", "saved")),
    Case("full", "lora", "tied", 2),
    *(Case(stage, "lora") for stage in ("zero1", "zero2", "zero3")),
    *(Case(stage, adapter) for stage in ("zero2", "zero3") for adapter in ("head", "saved")),
    Case("zero2", "dora"),
    Case("zero2", "qlora"),
    Case("zero3", "lora", "tied", 2),
]


def strategy_of(case: Case, **settings: Any) -> Strategy:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    settings = {"precision": "fp32", "device": "cpu", "sequence_parallel_size": case.sequence_parallel, **settings}
    if case.way == "full":
        from tuner.engine.fsdp import FullyShard

        strategy: Strategy = FullyShard(fsdp="full", **settings)
    elif case.way.startswith("zero"):
        from tuner.engine.zero import Zero

        strategy = Zero(case.way, **settings)
    else:
        strategy = Replicated(**settings)
    strategy.place(World(rank, size, rank, size), mesh_of(strategy.degrees))
    return strategy


def held_method(directory: Path, case: Case, strategy: Strategy) -> SFT:
    """A model that the strategy takes tensor by tensor where it wants to, with an adapter away from zero."""
    is_exact = case.way in ("ddp", "full") and ADAPTERS[case.adapter].quantise is None
    if strategy.holder() is None or is_exact:
        return make_method(directory, ADAPTERS[case.adapter], torch.float64 if is_exact else torch.float32, again=True)
    return SFT(build_llm(str(directory), attention="sdpa", adapter=ADAPTERS[case.adapter], hold=strategy.holder()))


class Alone(NamedTuple):
    """What one process makes of a case."""

    model: str
    adapter: str
    is_exact: bool
    is_moved: bool

    @classmethod
    def of(cls, case: Case) -> "Alone":
        """All of a case that decides the numbers."""
        is_exact = case.way in ("ddp", "full") and ADAPTERS[case.adapter].quantise is None
        return cls(case.model, case.adapter, is_exact, case.way != "zero3")


def step_alone(directory: Path, alone: Alone) -> dict[str, Tensor]:
    lora, dtype = ADAPTERS[alone.adapter], torch.float64 if alone.is_exact else torch.float32
    if alone.is_moved:
        method = make_method(directory / alone.model, lora, dtype)
    else:
        method = SFT(build_llm(str(directory / alone.model), attention="sdpa", adapter=lora))
    strategy = Replicated(precision="fp32", device="cpu")
    strategy.place(ALONE, mesh_of(strategy.degrees))
    return gradients_of_a_step(strategy, method, num_packs=1, num_accumulation_steps=1)


def compare(directory: Path, cases: Sequence[Case]) -> dict[str, float]:
    """The largest difference to one process of each case; under ZeRO of tensors that change by what fp32 can tell."""
    alone = by_turns(lambda key: step_alone(directory, key), [Alone.of(case) for case in cases])
    found = {}
    for case in cases:
        strategy = strategy_of(case)
        method = held_method(directory / case.model, case, strategy)
        ranks = 2 // strategy.degrees.size
        got = gradients_of_a_step(strategy, method, num_packs=4, num_accumulation_steps=4 // ranks)
        expected = alone[Alone.of(case)]
        if case.way == "zero3":  # B is zero there, and so is the gradient of A
            got, expected = ({n: v for n, v in one.items() if "lora_A" not in n} for one in (got, expected))
        found[str(case)] = apart(got, expected)
    return found


def bound_of(case: str) -> float:
    return 1e-12 if case.startswith(("ddp", "full")) and "qlora" not in case else 2e-5


def check_two_ranks(models: Path, cases: Sequence[Case]) -> None:
    for found in run_on_ranks(2, compare, models, cases, timeout=600):
        assert len(found) == len(cases)
        assert {case: value for case, value in found.items() if not value < bound_of(case)} == {}


def test_two_ranks_make_the_step_of_one(models: Path):
    cases = [Case("ddp", "qlora", sequence_parallel=2), Case("full", "dora"), Case("zero2"), Case("zero3", "head")]
    check_two_ranks(models, cases)


@pytest.mark.slow
def test_two_ranks_make_the_step_of_one_by_every_strategy(models: Path):
    check_two_ranks(models, TWO_RANKS)


def plain_logits(directory: Path, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Of the base with other weights in some places."""
    llm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in weights.items():
            llm.get_parameter(name).copy_(weight)
        return exact(llm.double())(ids).logits


@pytest.mark.parametrize(
    "adapter", ["qdora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "rslora", "dora", "qlora"))]
)
def test_the_adapter_computes_what_merged_weights_do_also_on_four_bits_as_bitsandbytes_has_them(models, adapter):
    lora, ids = ADAPTERS[adapter], torch.arange(40)[None] % 60
    method = make_method(models / "internlm2", lora)
    parts, merged = dict(kept_parameters(method.llm)), {}
    base = dict(AutoModelForCausalLM.from_pretrained(models / "internlm2", dtype=torch.float32).named_parameters())
    scale = lora.alpha / lora.rank ** (0.5 if lora.variant == "rslora" else 1)
    for name in [name for name in parts if ".lora_A." in name]:
        module = name.partition(".lora_A.")[0]
        weight = base[f"{module}.weight"].detach()
        if lora.quantise:
            weight = bitsandbytes.functional.dequantize_4bit(
                *bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
            )
        weight = weight.double() + scale * parts[f"{module}.lora_B.default.weight"].double() @ parts[name].double()
        if lora.variant == "dora":
            length = parts[f"{module}.lora_magnitude_vector.default.weight"].double()
            weight = weight * (length / weight.norm(dim=1))[:, None]
        merged[f"{module}.weight"] = weight
    assert len(merged) == 5 * SIZES["num_hidden_layers"]
    with torch.no_grad():
        got = method.llm.eval()(ids).logits
    expected = plain_logits(models / "internlm2", merged, ids)
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()
