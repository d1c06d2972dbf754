"""An adapter's run converted: peft loads it with the numbers of training, and merged it is that model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import write_directory
from transformers import AutoConfig, AutoModelForCausalLM

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.config import render
from tuner.convert.adapter_checkpoint import adapter_origin, load_trained_adapter
from tuner.convert.merge import merge
from tuner.convert.record import RECORD
from tuner.convert.reload import MismatchError, compare
from tuner.convert.to_hf import convert
from tuner.engine.checkpoint import find_checkpoint
from tuner.errors import UserError
from tuner.train import train

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "torch_dtype": "float32"}  # fmt: skip
KINDS = {
    "sft_lora": {"lora_variant": "dora", "modules_to_save": ["output"]},
    "sft_qlora": {"lora_variant": "rslora"},
}

pytestmark = pytest.mark.filterwarnings("ignore")


def make_base(folder):
    """A model directory with weights."""
    base = write_directory(folder)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **SMALL, "tie_word_embeddings": False}))
    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
    weights = {name: weight.detach().contiguous() for name, weight in llm.named_parameters()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="module", params=["sft_lora", pytest.param("sft_qlora", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """A work dir after three steps, in bf16."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(8)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_path": str(base),
        "data_path": str(folder / "train.jsonl"),
        "cache_dir": str(folder / "cache"),
        "max_length": 64,
        "max_steps": 3,
        "lr": 1e-1,
        "num_accumulation_steps": 1,
        "sample_interval": 0,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        **KINDS[request.param],
    }
    return train(render(f"internlm2_chat_7b-{request.param}", settings), work_dir=folder / "work")


def test_peft_loads_what_was_trained_and_the_merged_model_is_it(run, tmp_path):
    checkpoint, base = find_checkpoint(run), run.parent / "base"
    adapter = convert(run, tmp_path / "adapter", verify=False)
    digests = {name: entry["sha256"] for name, entry in json.loads((adapter / RECORD).read_text())["tensors"].items()}
    found = compare(adapter_origin(checkpoint), adapter, digests)
    assert found.not_checked == []
    assert sum("logits" in text for text in found.checked) == 2
    assert not list(adapter.glob("model*"))

    ids = torch.arange(30).view(1, 30)
    merged = merge(base, adapter, tmp_path / "merged", verify=False)
    record = json.loads((merged / RECORD).read_text())
    assert any("fingerprint" in text for text in record["checked"])
    is_quantised = "qlora" in run.parent.name
    assert any("NF4 in training" in text for text in record["checked"]) == is_quantised
    with torch.inference_mode():
        expected = load_trained_adapter(checkpoint, torch.float32).eval()(ids).logits
        before = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        after = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    tolerance = (1e-2 if is_quantised else 1e-5) * expected.abs().max()  # 4-bit values were rounded to bf16 in training
    assert (after - expected).abs().max() < tolerance
    assert (before - expected).abs().max() > 10 * tolerance
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert stops == json.loads((adapter / "generation_config.json").read_text())["eos_token_id"]
    assert "Recipe" in (merged / "README.md").read_text()


def test_another_base_and_changed_weights_are_found(run, tmp_path):
    adapter = convert(run, tmp_path / "adapter", verify=False)
    other = shutil.copytree(run.parent / "base", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapter for another base than .*other: names and shapes fit"):
        merge(other, adapter, tmp_path / "out", verify=False)
    digests = {name: entry["sha256"] for name, entry in json.loads((adapter / RECORD).read_text())["tensors"].items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(MismatchError, match="logits of a text of 16 tokens differ"):
        compare(adapter_origin(find_checkpoint(run)), adapter, digests)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]
