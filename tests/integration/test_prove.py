"""`tuner check sp` and `tuner check attn`: what holds is proven, what does not is caught, on a config of one's own."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preview_runs import PRESET, rows, write_run
from ranks import start_server
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tuner.cli import run
from tuner.dataset.tokenize import Document
from tuner.engine import replicated
from tuner.engine.replicated import sum_bucket
from tuner.engine.zero import Zero
from tuner.method import sft
from tuner.model import attention
from tuner.model.attention_sdpa import Pack, sdpa_attention
from tuner.model.internlm2.rotary import InternLM2RotaryEmbedding
from tuner.parallel.mesh import Degrees
from tuner.parallel.sequence import held_tokens
from tuner.prove import holding, rotary, sp
from tuner.prove.documents import make_step, num_shared, shorten, train_last_shard
from tuner.prove.gradients import EXACT, compare, worst
from tuner.prove.processes import on_ranks
from tuner.prove.spread_step import Job, Outcome, outcomes_on_rank

SHAPE = {
    **{"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 12},
    **{"intermediate_size": 512, "vocab_size": 1010, "max_position_embeddings": 256, "rope_theta": 1e5},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR, DYNAMIC = ({"type": kind, "factor": 2.0} for kind in ("linear", "dynamic"))
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1 + 0.1 * place for place in range(16)]}
FAMILIES: dict[str, dict[str, Any]] = {
    "internlm2": {"model_type": "internlm2"},
    "internlm2 linear": {"model_type": "internlm2", "rope_scaling": LINEAR},
    "internlm2 dynamic": {"model_type": "internlm2", "rope_scaling": DYNAMIC},
    "internlm2 yarn": {"model_type": "internlm2", "rope_scaling": YARN},
    "llama linear": {"model_type": "llama", "rope_scaling": LINEAR},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 128}},
    "qwen2 yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3 yarn": {"model_type": "qwen3", "head_dim": 64, "rope_parameters": YARN | {"rope_theta": 1e6}},
    "mistral": {"model_type": "mistral", "sliding_window": 100},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
}
RARE = ("internlm2 linear", "internlm2 yarn", "llama linear", "qwen2 yarn")  # less special than the others
LESS_SPECIAL = ("internlm2", *RARE)  # or than other tests
DEPENDS_ON_PACK = {
    "llama dynamic": {"model_type": "llama", "rope_scaling": DYNAMIC, "max_position_embeddings": 64},
    "phi3 longrope": {
        **{"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 128},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    },
}


def write_config(directory: Path, **entries: Any) -> Path:
    content = {name: value for name, value in {**SHAPE, **entries}.items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings of a run whose model has a tokenizer and no weights; its data is prepared once."""
    start_server()  # with all that ranks of later tests import, too: it is started once
    settings = write_run(tmp_path_factory.mktemp("prove"))
    return {**settings, "gradient_checkpointing": True}


def check(command: str, data: dict[str, object], *options: str, **entries: Any) -> int:
    """Run a check on a model whose config.json has these entries; it lies beside the tokenizer."""
    write_config(Path(str(data["model_path"])), **{"model_type": "internlm2", **entries})
    return run(["check", command, PRESET, *(f"{name}={value}" for name, value in data.items()), *options])


def test_a_step_spread_over_ranks_is_proven(data: dict[str, object], capsys: pytest.CaptureFixture[str]):
    """Two by two, with a model whose angles depend on the length of a document, and gradient checkpointing."""
    assert check("sp", data, "--sp", "2", "--ranks", "4", "--tokens", "24", rope_scaling=DYNAMIC) == 0
    out = capsys.readouterr().out
    assert "data parallel 2 x Ulysses 2 x ring 1, 2 micro-batches a rank" in out
    assert out.count("ratio 1.000000000000") == 2, "the tokens of the config, and those of the last shard"
    assert "more, at most" in out
    assert "The same: no parameter's gradient" in out


def test_a_mistaken_divisor_is_caught_on_the_ranks_of_the_config(
    data: dict[str, object], capsys: pytest.CaptureFixture[str]
):
    settings = {**data, "sequence_parallel_size": {"ulysses": 1, "ring": 2}}
    assert check("sp", settings, "--scale-loss", "0.5", "--tokens", "24", "--train", "last") == 2
    out = capsys.readouterr().out
    assert "data parallel 1 x Ulysses 1 x ring 2" in out
    assert "ratio 0.500000000000" in out
    assert out.count(" 0.500000000000   1.000000000000   5.0e-01\n") == 5, "every parameter that is shown"
    assert "NOT THE SAME" in out


def mean_of_bucket(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return sum_bucket(state, bucket).then(lambda future: future.value() / torch.distributed.get_world_size())


def with_averaged_gradients(job: Job) -> dict[str, Outcome]:
    replicated.sum_bucket = mean_of_bucket
    return outcomes_on_rank(job)


def test_a_gradient_that_is_halved_under_an_exact_loss_is_caught(
    data: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """What published loss reductions for sequence parallelism do."""
    monkeypatch.setattr(sp, "outcomes_on_rank", with_averaged_gradients)
    assert check("sp", data, "--sp", "2", "--tokens", "24") == 2
    out = capsys.readouterr().out
    assert out.count("ratio 1.000000000000") == 2, "both losses"
    assert out.count(" 0.500000000000   1.000000000000   5.0e-01\n") == 10


def test_labels_that_weigh_less_and_weights_that_are_cut_are_proven(
    data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = rows()
    for row in content[::2]:
        row["messages"][1]["loss"] = 0.25
    path = tmp_path / "weighted.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
    assert (
        check("sp", {**data, "data_path": path, "fsdp": "full"}, "--sp", "2", "--train", "own", **FAMILIES["mixtral"])
        == 0
    )
    out = capsys.readouterr().out
    assert "cut over the ranks by FSDP2 (full)" in out
    assert "ratio 1.000000000000" in out


def zero_file(directory: Path) -> Path:
    """A JSON file as for training on GPUs: in bf16, clipped, with the optimizer's state on a disk."""
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(directory)}}
    path = directory / "zero.json"
    path.write_text(json.dumps({"zero_optimization": offload, "bf16": {"enabled": True}, "gradient_clipping": 1.0}))
    return path


def test_weights_that_zero_cuts_are_proven(data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("deepspeed")
    settings = {**data, "deepspeed": zero_file(tmp_path), "precision": "bf16", "sequence_parallel_size": 2}
    assert check("sp", settings, "--tokens", "24") == 0
    out = capsys.readouterr().out
    assert "zero.json), float32: its ZeRO has no float64" in out
    ratios = [float(line.split()[1]) for line in out.splitlines() if line.startswith("  llm.")]
    assert ratios == pytest.approx([1] * 10, abs=3e-5)
    assert ratios != [1] * 10, "so it was not float64 after all"
    assert "more than 3e-05 apart" in out


class Averaging(Zero):
    """The rank's loss is not made up for DeepSpeed's mean."""

    def prepare(self, *args: Any, **settings: Any) -> torch.nn.Module:
        prepared, self.loss_factor = super().prepare(*args, **settings), 1
        return prepared


def under_averaging_zero(job: Job) -> dict[str, Outcome]:
    holding.Zero = Averaging
    return outcomes_on_rank(job)


@pytest.mark.slow
def test_zero_that_averages_is_caught(
    data: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(sp, "outcomes_on_rank", under_averaging_zero)
    assert check("sp", {**data, "deepspeed": "zero3"}, "--tokens", "24", "--train", "own") == 2
    out = capsys.readouterr().out
    ratios = [float(line.split()[1]) for line in out.splitlines() if line.startswith("  llm.")]
    assert ratios == pytest.approx([0.5] * 5, abs=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero2_offload", "zero3_offload", "zero3_hpz"])
def test_each_stage_of_zero_is_proven(deepspeed: str, data: dict[str, object]):
    pytest.importorskip("deepspeed")
    assert check("sp", {**data, "deepspeed": deepspeed}, "--sp", "2", "--ranks", "4", "--tokens", "24") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--sp", "3", "--ranks", "3"],
            "3 ranks cannot share 8 query heads and 2 kv heads. Sizes that can: 1, 2, 4, 8",
        ),
        (["--sp", "2", "--ranks", "3"], "does not fit 3 ranks, which it must divide. Sizes that do: 1, 3"),
        (["--sp", "many"], "--sp many is not understood"),
        (["--sp", "ulyses=2"], "is not understood"),
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--tokens", "3"], "--tokens 3 leaves too little"),
        (
            ["--cfg-options", "model.llm.attention=eager", "--sp", "2"],
            "'eager' cannot attend to sequences that are cut",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_training_would_refuse_is_refused(
    options: list[str], words: str, data: dict[str, object], capsys: pytest.CaptureFixture[str]
):
    assert check("sp", data, *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in LESS_SPECIAL)) for name in FAMILIES]
)
def test_packs_and_angles_are_proven(family: str, data: dict[str, object], capsys: pytest.CaptureFixture[str]):
    assert check("attn", data, **FAMILIES[family]) == 0
    out = capsys.readouterr().out
    assert "attention sdpa ('auto' in the config) on cpu, torch.float64" in out
    assert out.count("  ok  ") == 6
    assert "the model turns so, in documents of 256 and 85 tokens" in out


@pytest.mark.parametrize("family", DEPENDS_ON_PACK)
def test_angles_that_depend_on_the_pack_are_refused_as_in_training(
    family: str, data: dict[str, object], capsys: pytest.CaptureFixture[str]
):
    assert check("attn", data, **DEPENDS_ON_PACK[family]) == 2
    assert "turns every document of a pack by the longest one's length" in capsys.readouterr().err


def test_rotary_settings_of_the_run_are_proven_to_take_effect(
    data: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The model is dynamic, and the run makes that a fixed base; then what training calls does nothing."""
    settings = {**data, "rope_theta": 2e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    entries = {"rope_scaling": DYNAMIC, "max_position_embeddings": 64}
    assert check("attn", settings, **entries) == 0
    assert "no scaling; base 1,593,925," in capsys.readouterr().out, "2e5 * 7 ** (32 / 30)"
    monkeypatch.setattr(rotary, "set_rope", lambda *_: None)
    assert check("attn", settings, **entries) == 2
    assert "is turned OTHERWISE" in capsys.readouterr().out


def ignore_scaling(module: InternLM2RotaryEmbedding, *_: Any) -> tuple[torch.Tensor, float]:
    return LlamaRotaryEmbedding.compute_default_rope_parameters(module.config)


def test_a_scaling_that_is_ignored_is_caught(
    data: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(InternLM2RotaryEmbedding, "_inverse_frequencies", ignore_scaling)
    assert check("attn", data, rope_scaling=LINEAR) == 2
    assert "as if there were no scaling: it is IGNORED" in capsys.readouterr().out
    assert check("attn", data) == 0, "there is none"


def test_a_base_that_its_family_calls_otherwise_is_caught(data: dict[str, object], capsys: pytest.CaptureFixture[str]):
    """GPT-NeoX reads rotary_emb_base and nothing of rope_theta."""
    assert check("attn", data, model_type="gpt_neox", rotary_pct=0.25, num_key_value_heads=None) == 2
    out = capsys.readouterr().out
    assert "config.json: no scaling; base 100,000" in out
    assert "is turned OTHERWISE" in out


def test_a_scaling_that_comes_too_late_is_told(data: dict[str, object], capsys: pytest.CaptureFixture[str]):
    assert check("attn", data, rope_scaling=DYNAMIC, max_position_embeddings=256) == 0
    assert "note: in documents of up to 256 tokens this scaling changes nothing" in capsys.readouterr().out
    assert check("attn", data, max_position_embeddings=128) == 0
    assert "note: documents may have 256 tokens, more than the 128" in capsys.readouterr().out


def see_the_whole_pack(pack: Pack) -> torch.Tensor:
    num_tokens = pack.query.shape[2]
    return sdpa_attention(pack._replace(cu_seqlens=torch.tensor([0, num_tokens]), max_seqlen=num_tokens))


def see_the_future(pack: Pack) -> torch.Tensor:
    ends = pack.cu_seqlens.tolist()
    shifted = [tensor.clone() for tensor in (pack.key, pack.value)]
    for tensor in shifted:
        for start, end in pairwise(ends):
            tensor[:, :, start:end] = tensor[:, :, start:end].flip(2)
    return sdpa_attention(pack._replace(key=shifted[0], value=shifted[1]))


@pytest.mark.parametrize(
    ("wrong", "broken"),
    [
        (see_the_whole_pack, ["logits by", "another's tokens", "packed and alone"]),
        (see_the_future, ["later tokens", "packed and alone"]),
    ],
)
def test_an_attention_that_leaks_is_caught(
    wrong: Any,
    broken: list[str],
    data: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sft, "check_isolation", lambda llm: None)  # which finds the first of them before we can
    monkeypatch.setitem(attention.BACKENDS, "sdpa", attention.BACKENDS["sdpa"]._replace(attend=wrong))
    assert check("attn", data) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  NO  ")]
    assert all(any(words in line for line in lines) for words in broken), lines


def test_gradients_are_measured_by_their_own_size_unless_it_is_negligible():
    expected = {"large": torch.tensor([3.0, 4.0]), "vanishing": torch.tensor([1e-18, 0.0]), "zero": torch.zeros(2)}
    got = {"large": torch.tensor([3.0, 4.0]) * 2, "vanishing": torch.tensor([0.0, 1e-18]), "zero": torch.zeros(2)}
    double = lambda tensors: {name: tensor.double() for name, tensor in tensors.items()}  # noqa: E731
    found = {difference.name: difference for difference in compare(double(got), double(expected))}
    assert (found["large"].ratio, found["large"].cosine, found["large"].apart) == pytest.approx((2, 1, 1))
    assert found["vanishing"].cosine == 0
    assert EXACT.holds(found["vanishing"].apart)
    assert found["zero"] == ("zero", 1.0, 1.0, 0.0)
    broken = compare({"large": torch.tensor([float("nan"), 4.0])}, {"large": expected["large"]})
    assert not EXACT.holds(broken[0].apart), "NaN is not close"
    assert worst([list(found.values()), broken])[0] == broken[0], "and worse than anything"
    missing = compare({}, {"large": expected["large"]})
    assert missing[0].ratio == 0
    assert not EXACT.holds(missing[0].apart)


def test_short_documents_keep_what_is_trained():
    trained = np.zeros(1000, bool)
    trained[700:] = True
    document = shorten(Document(np.arange(1000, dtype=np.uint32), trained), 40)
    assert document.trained[[1, -1]].tolist() == [False, True]
    assert len(document.ids) == 40
    assert document.ids[document.trained.argmax()] == 700 % 512


def test_the_last_shard_alone_is_trained():
    documents = [Document(np.arange(1, n, dtype=np.uint32), np.ones(n - 1, bool)) for n in (40, 13, 31, 9, 22)]
    for degrees in (Degrees(2, 1), Degrees(1, 2), Degrees(2, 2)):
        step = train_last_shard(make_step(documents, 64, packed=True), degrees)
        assert num_shared(step, degrees) > 0
        for number in range(step.num_packs):
            plan = type("Plan", (), {"packs": [step.layout[number].tolist()], "num_loss_tokens": 1})
            [batch] = step.batches(plan, degrees.size)
            labelled = (batch["labels"][0] >= 0).nonzero().flatten().tolist()
            held = [set(held_tokens(batch["cu_seqlens"], degrees, rank).tolist()) for rank in range(degrees.size)]
            assert set(labelled) <= held[-1]
        assert step.num_loss_tokens.sum() > 0


def fail_on_the_second(kind: type[Exception]) -> int:
    rank = torch.distributed.get_rank()
    if rank == 1:
        raise kind("this is what was wrong")
    torch.distributed.barrier()
    return rank


def test_what_stops_a_process_is_told():
    with pytest.raises(RuntimeError, match="process 1 failed: ZeroDivisionError: this is what was wrong"):
        on_ranks(2, fail_on_the_second, ZeroDivisionError)
