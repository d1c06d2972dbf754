"""`tuner convert legacy`: old files of XTuner and DeepSpeed, against torch, peft and zero_to_fp32 themselves."""

import json
import math
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tuner.cli import run
from tuner.convert import legacy
from tuner.convert.legacy_again import origin_of
from tuner.convert.record import RECORD, Checks
from tuner.convert.reload import MismatchError, compare
from tuner.errors import UserError

convert_legacy = partial(legacy.convert_legacy, verify=False)  # the reload is a claim of its own
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def base(llm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights are others than those of `llm`."""
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(llm.config).save_pretrained(folder)
    (folder / "added_tokens.json").write_text("{}")
    return folder


def mmengine_file(path: Path, state: dict[str, torch.Tensor], config: str = "") -> Path:
    hub = MessageHub.get_instance("test_convert_legacy")
    hub.update_scalar("train/loss", 1.0)
    meta = {"iter": 5, "config": f"__import__('os').system('touch {path.parent / 'ran'}')", "cfg": config}
    torch.save({"meta": meta, "message_hub": hub.state_dict(), "state_dict": state}, path)
    return path


def reloaded(source: Path, out: Path, base: Path | None, texts: list[str], alpha: float | None) -> Checks:
    """What a fresh process would find, in this one."""
    digests = {name: entry["sha256"] for name, entry in json.loads((out / RECORD).read_text())["tensors"].items()}
    return compare(origin_of(source, out, base, texts, alpha), out, digests)


def written(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_file_of_mmengine_becomes_a_model(llm: LlamaForCausalLM, base: Path, tmp_path: Path) -> None:
    state = OrderedDict((f"llm.{name}", tensor) for name, tensor in llm.state_dict().items())
    source = mmengine_file(tmp_path / "iter_5.pth", state)
    out = convert_legacy(source, tmp_path / "hf", allow=True, base=base)
    assert not (tmp_path / "ran").exists()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in llm.state_dict().items())
    assert (out / "added_tokens.json").exists()
    found = reloaded(source, out, base, ["x = dict(max_length = 24)"], None)
    assert [text.partition(":")[0] for text in found.checked if "logits" in text] == [
        "logits of a text of 16 tokens",
        "logits of a text of 24 tokens",
    ]
    assert found.not_checked == ["tokenizer ids: there is no tokenizer"]
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    with pytest.raises(MismatchError, match="logits of a text of 16 tokens differ"):
        reloaded(source, out, base, [], None)


def test_nothing_is_read_without_the_flag(llm: LlamaForCausalLM, tmp_path: Path, capsys: Any) -> None:
    source = mmengine_file(tmp_path / "iter_5.pth", llm.state_dict())
    assert run(["convert", "legacy", str(source), str(tmp_path / "hf")]) == 2
    message = capsys.readouterr().err
    assert "--allow-legacy-pickle" in message
    assert "Traceback" not in message
    words = [str(source), str(tmp_path / "hf"), "--allow-legacy-pickle", "--dtype", "bf16", "--no-verify"]
    assert run(["convert", "legacy", *words]) == 0
    assert all(
        torch.equal(tensor, llm.state_dict()[name].bfloat16()) for name, tensor in written(tmp_path / "hf").items()
    )


def test_a_directory_of_bin_files_is_one_model(llm: LlamaForCausalLM, base: Path, tmp_path: Path) -> None:
    state = list(llm.state_dict().items())
    (tmp_path / "old").mkdir()
    torch.save(dict(state[:5]), tmp_path / "old" / "pytorch_model-00001-of-00002.bin")
    index = {"weight_map": {name: "../../etc/passwd" for name, _ in state}}
    (tmp_path / "old" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names .* which none of the 1 files has"):
        convert_legacy(tmp_path / "old", tmp_path / "hf", allow=True)
    torch.save(dict(state[5:]), tmp_path / "old" / "pytorch_model-00002-of-00002.bin")
    found = written(convert_legacy(tmp_path / "old", tmp_path / "hf", allow=True, base=base))
    assert all(torch.equal(found[name], tensor) for name, tensor in state)


def lora_state(llm: LlamaForCausalLM, default: str) -> dict[str, torch.Tensor]:
    """As XTuner's `state_dict` has LoRA weights."""
    torch.manual_seed(1)
    state = {}
    for name, parameter in llm.named_parameters():
        if "proj" in name:
            rank = 8 if "down_proj" in name else 4
            module = f"llm.base_model.model.{name.removesuffix('.weight')}"
            state[f"{module}.lora_A{default}.weight"] = torch.randn(rank, parameter.shape[1])
            state[f"{module}.lora_B{default}.weight"] = torch.randn(parameter.shape[0], rank)
    return state


@pytest.mark.parametrize("default", ["", ".default"])
@torch.no_grad()
def test_lora_weights_become_an_adapter_that_peft_applies(llm: LlamaForCausalLM, default: str, tmp_path: Path) -> None:
    from peft import PeftModel

    state = lora_state(llm, default)
    source = mmengine_file(tmp_path / "iter_5.pth", state, "llm = dict(lora=dict(type=LoraConfig, r=4, lora_alpha=6))")
    out = convert_legacy(source, tmp_path / "adapter", allow=True)
    assert not (tmp_path / "ran").exists()
    copy = LlamaForCausalLM(llm.config).eval()
    copy.load_state_dict(llm.state_dict())
    ids = torch.arange(12)[None]
    applied = PeftModel.from_pretrained(copy, out)(ids).logits
    merged = LlamaForCausalLM(llm.config).eval()
    weights = dict(llm.state_dict())
    for name in [name for name in state if ".lora_A" in name]:
        module = name.removeprefix("llm.base_model.model.").split(".lora_A")[0]
        first, second = state[name], state[name.replace("lora_A", "lora_B")]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + 6 / 4 * second @ first
        if "down_proj" in module:
            weights[f"{module}.weight"] = llm.state_dict()[f"{module}.weight"] + 6 / 8 * second @ first
    merged.load_state_dict(weights)
    torch.testing.assert_close(applied, merged(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_its_base_is_loaded_by_peft_and_compared(
    llm: LlamaForCausalLM, base: Path, tmp_path: Path
) -> None:
    state = {name: tensor / 10 for name, tensor in lora_state(llm, "").items()}
    source = mmengine_file(tmp_path / "iter_5.pth", state)
    out = convert_legacy(source, tmp_path / "adapter", allow=True, base=base, lora_alpha=6)
    found = reloaded(source, out, base, ["max_length = 32"], 6)
    assert sum("logits" in text for text in found.checked) == 2
    with pytest.raises(MismatchError, match="logits of a text of 16 tokens differ"):
        reloaded(source, out, base, ["max_length = 32"], 7)
    other = tmp_path / "other"
    LlamaConfig(**SHAPE | {"intermediate_size": 20}, architectures=["LlamaForCausalLM"]).save_pretrained(other)
    with pytest.raises(UserError, match=r"another base than .*other: model.layers.0.mlp.gate_proj.weight is \(24,"):
        convert_legacy(source, tmp_path / "none", allow=True, base=other, lora_alpha=6)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tuned", ["whole", "lora"])
def test_a_fresh_process_checks_it_by_default(tuned: str, llm: LlamaForCausalLM, base: Path, tmp_path: Path) -> None:
    state = dict(llm.state_dict()) if tuned == "whole" else {n: t / 10 for n, t in lora_state(llm, "").items()}
    torch.save(state, tmp_path / "old.pth")
    words = [str(tmp_path / "old.pth"), str(tmp_path / "out"), "--base", str(base), "--allow-legacy-pickle"]
    assert run(["convert", "legacy", *words, "--lora-alpha", "6"]) == 0
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert sum("logits" in text for text in record["checked"]) == 2


def test_lora_alpha_is_asked_for_where_no_config_states_it(llm: LlamaForCausalLM, tmp_path: Path) -> None:
    source = mmengine_file(tmp_path / "iter_5.pth", lora_state(llm, ""), "lora_alpha=8\nlora_alpha = 16")
    with pytest.raises(UserError, match=r"states several: \[8.0, 16.0\].*--lora-alpha"):
        convert_legacy(source, tmp_path / "adapter", allow=True)
    out = convert_legacy(source, tmp_path / "adapter", allow=True, lora_alpha=32)
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 32


def zero_checkpoint(folder: Path, stage: int, ranks: int, llm: LlamaForCausalLM, frozen: tuple[str, ...] = ()) -> None:
    """What DeepSpeed writes: 16-bit weights and shapes in the model's states, fp32 vectors in the optimizer's."""
    folder.mkdir()
    trained = {name: p.detach() for name, p in llm.named_parameters() if name not in frozen}
    halves = [dict(list(trained.items())[:5]), dict(list(trained.items())[5:])]
    vectors: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for group in halves:
        if stage < 3:
            flat = torch.cat([tensor.flatten() for tensor in group.values()])
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * ranks)))
            for of_rank, part in zip(vectors, flat.chunk(ranks), strict=True):
                of_rank.append(part.clone())
            continue
        for rank, of_rank in enumerate(vectors):
            of_rank.append(torch.cat([part_of(tensor, rank, ranks) for tensor in group.values()]))
    for rank in range(ranks if stage == 3 else 1):
        kept = {name: dict(llm.named_parameters())[name].detach() for name in frozen}
        states = {
            "module": {name: tensor.half() for name, tensor in llm.state_dict().items()} if stage < 3 else {},
            "buffer_names": [],
            "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in halves],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in kept.items()} or None,
            "frozen_param_fragments": {n: part_of(t, rank, ranks) if stage == 3 else t for n, t in kept.items()}
            or None,
            "shared_params": {},
            "ds_version": "0.19.8",
            "meta": {"cfg": "x = 1"},
        }
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save(states, folder / f"{prefix}mp_rank_00_model_states.pt")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank, of_rank in enumerate(vectors):
        states = {"optimizer_state_dict": {"zero_stage": stage, "partition_count": ranks, key: of_rank}}
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder.parent / "latest").write_text(folder.name)


def part_of(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = math.ceil(tensor.numel() / ranks)
    return torch.nn.functional.pad(tensor.flatten(), (0, size * ranks - tensor.numel()))[
        rank * size : (rank + 1) * size
    ].clone()


@pytest.mark.parametrize(("stage", "ranks", "frozen"), [(2, 3, ()), (3, 3, ("lm_head.weight",)), (1, 1, ())])
def test_zero_checkpoints_give_what_deepspeeds_own_script_gives(
    stage: int, ranks: int, frozen: tuple[str, ...], llm: LlamaForCausalLM, tmp_path: Path
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    zero_checkpoint(tmp_path / "global_step5", stage, ranks, llm, frozen)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == {
        name: tuple(tensor.shape) for name, tensor in llm.named_parameters()
    }
    found = written(convert_legacy(tmp_path, tmp_path / "hf", allow=True))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def lost(folder: Path) -> None:
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def last_lost(folder: Path) -> None:
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()


def of_another_step(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    states = torch.load(path)
    states["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(7)
    torch.save(states, path)


def strange(folder: Path) -> None:
    torch.save({"param_shapes": 3, "module": {}}, folder / "mp_rank_00_model_states.pt")


def flipped(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


MISTAKES = {
    "a rank is missing": (lost, "lacks the optim_states of rank 1"),
    "the last rank is missing": (last_lost, "written by 3 ranks and has files of 2"),
    "vectors of another length": (of_another_step, "do not fit the shapes"),
    "other content": (strange, "not built as DeepSpeed's"),
    "a flipped bit": (flipped, "damaged"),
    "latest leads out": (lambda folder: (folder.parent / "latest").write_text("../../etc"), "no directory beside it"),
    "a link": (
        lambda folder: (
            (folder / "mp_rank_00_model_states.pt").rename(folder.parent / "x.pt").exists()
            and (folder / "mp_rank_00_model_states.pt").symlink_to(folder.parent / "x.pt")
        ),
        "is a link to",
    ),
    "tensor parallel": (
        lambda folder: (folder / "mp_rank_00_model_states.pt").rename(folder / "mp_rank_01_model_states.pt"),
        "tensor parallel",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_broken_zero_checkpoints_are_told(name: str, llm: LlamaForCausalLM, tmp_path: Path) -> None:
    make, message = MISTAKES[name]
    zero_checkpoint(tmp_path / "global_step5", 2, 3, llm)
    make(tmp_path / "global_step5")
    with pytest.raises(UserError, match=message):
        convert_legacy(tmp_path, tmp_path / "hf", allow=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"global_step5", "latest", "x.pt"}


def test_weights_of_another_model_and_other_files_are_told(llm: LlamaForCausalLM, base: Path, tmp_path: Path) -> None:
    state = {f"llm.{name}": tensor for name, tensor in llm.state_dict().items()}
    state["llm.lm_head.weight"] = torch.zeros(63, 16)
    source = mmengine_file(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match=r"lm_head.weight is \(63, 16\), not \(64, 16\)"):
        convert_legacy(source, tmp_path / "hf", allow=True, base=base)
    source = mmengine_file(tmp_path / "b.pth", state | {"projector.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="more than a language model: projector"):
        convert_legacy(source, tmp_path / "hf", allow=True, base=base)
    torch.save([torch.zeros(2)], tmp_path / "c.pth")
    with pytest.raises(UserError, match="holds a list, no weights by name"):
        convert_legacy(tmp_path / "c.pth", tmp_path / "hf", allow=True)
    with pytest.raises(UserError, match="There is no"):
        convert_legacy(tmp_path / "d.pth", tmp_path / "hf", allow=True)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert_legacy(source, base, allow=True)
    assert not (tmp_path / "hf").exists()
