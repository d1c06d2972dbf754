"""`tuner convert merge` against peft: the merged weights, the logits, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from tuner.convert import tensors
from tuner.convert.adapter_files import read_adapter
from tuner.convert.merge import merge, origin_of, piece_of
from tuner.convert.model_files import model_tensors
from tuner.convert.quantised import dequantised
from tuner.convert.record import RECORD
from tuner.convert.reload import MismatchError, compare
from tuner.errors import UserError

# widths are multiples of 64: of others bitsandbytes 0.50 reads 4-bit blocks as if each row began a new one
LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=96, attention_bias=True, max_position_embeddings=64)  # fmt: skip
GPT2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64, tie_word_embeddings=False)
LINEAR = ["q_proj", "o_proj", "down_proj"]
KINDS = {
    "lora": dict(target_modules=LINEAR),
    "rslora": dict(target_modules=LINEAR, use_rslora=True, rank_pattern={"o_proj": 2}, alpha_pattern={"q_proj": 3}),
    "dora": dict(target_modules=LINEAR, use_dora=True),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "dora_embedding": dict(target_modules=["embed_tokens"], use_dora=True),
    "whole_head": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "bias": dict(target_modules=["q_proj"], lora_bias=True),
    "bias_all": dict(target_modules=["q_proj"], bias="all"),
    "turned": dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    "turned_dora": dict(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
}


def make(folder, settings, dtype=torch.float32, config=LLAMA):
    """A base and an adapter whose every number was moved, as training would."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    llm.save_pretrained(folder / "base")
    lora = get_peft_model(llm, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for _, weight in lora.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    lora.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def load(base, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def ids():
    return torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that tensors of tests take several."""
    monkeypatch.setattr(tensors, "BLOCK_SIZE", 640)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_that_of_peft(kind, tmp_path):
    base, adapter = make(tmp_path, KINDS[kind], config=GPT2 if "turned" in kind else LLAMA)
    out = merge(base, adapter, tmp_path / "out", verify=False, max_shard_size=20_000)
    reference = PeftModel.from_pretrained(load(base), adapter).eval()
    with torch.inference_mode():
        expected = reference(ids()).logits
        torch.testing.assert_close(load(out)(ids()).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(load(base)(ids()).logits, expected, atol=1e-2)
    theirs = reference.merge_and_unload().state_dict()
    ours = load(out).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_bfloat16_base_is_rounded_once(tmp_path):
    """peft rounds the product first; the nearest bfloat16 of the float64 sum is the reference, to half an ulp more."""
    base, adapter = make(tmp_path, KINDS["lora"], dtype=torch.bfloat16)
    out = merge(base, adapter, tmp_path / "out", verify=False)
    written, before = (load_file(path / "model.safetensors") for path in (out, base))
    delta = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    down, up = (delta[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
    exact = before[f"{name}.weight"].double() + 2 * up @ down
    assert (written[f"{name}.weight"] != exact.to(torch.bfloat16)).float().mean() < 1e-3
    assert all(torch.equal(written[name], before[name]) for name in before if "gate_proj" in name or "norm" in name)
    whole = merge(base, adapter, tmp_path / "fp32", dtype="float32", verify=False)
    torch.testing.assert_close(
        load_file(whole / "model.safetensors")[f"{name}.weight"].double(), exact, rtol=0, atol=1e-6
    )
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_base_becomes_the_numbers_that_bitsandbytes_computes_with(tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    base, adapter = make(tmp_path, KINDS["lora"], dtype=torch.bfloat16)
    nested = dict(bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **nested)
    llm = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation, dtype=torch.bfloat16)
    llm.save_pretrained(tmp_path / "nf4")
    found = dequantised(model_tensors(tmp_path / "nf4"), tmp_path / "nf4")
    for name, module in llm.named_modules():
        if type(module).__name__ == "Linear4bit":
            theirs = dequantize_4bit(module.weight.data, module.weight.quant_state)
            ours = torch.cat(list(found[f"{name}.weight"].blocks()))
            assert ours.dtype == theirs.dtype == torch.bfloat16
            assert torch.equal(ours, theirs), name
    out = merge(tmp_path / "nf4", adapter, tmp_path / "out", verify=False)
    assert "4-bit" in " ".join(json.loads((out / RECORD).read_text())["checked"])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    reference = PeftModel.from_pretrained(llm, adapter).eval()
    with torch.inference_mode():
        expected = reference(ids()).logits.float()
        difference = load(out, torch.bfloat16)(ids()).logits.float() - expected
    assert difference.abs().max() < 0.03 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_base_in_fp32_passes_the_check_though_bitsandbytes_computes_it_in_bf16(tmp_path):
    from transformers import BitsAndBytesConfig

    base, adapter = make(tmp_path, KINDS["lora"])
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    llm = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation, dtype=torch.float32)
    llm.save_pretrained(tmp_path / "nf4")
    out = merge(tmp_path / "nf4", adapter, tmp_path / "out", verify=False)
    digests = {name: entry["sha256"] for name, entry in json.loads((out / RECORD).read_text())["tensors"].items()}
    change = read_adapter(adapter)
    tensors = dequantised(model_tensors(tmp_path / "nf4"), tmp_path / "nf4")
    origin = origin_of(tmp_path / "nf4", change, [piece_of(tensor, change, None) for tensor in tensors.values()])
    assert any("logits" in text for text in compare(origin, out, digests).checked)


@pytest.mark.filterwarnings("ignore")
def test_the_reload_compares_with_base_and_adapter(tmp_path):
    base, adapter = make(tmp_path, KINDS["dora"])
    out = merge(base, adapter, tmp_path / "out", verify=False)
    record = json.loads((out / RECORD).read_text())
    digests = {name: entry["sha256"] for name, entry in record["tensors"].items()}
    change = read_adapter(adapter)
    pieces = [piece_of(tensor, change, None) for tensor in model_tensors(base).values()]
    origin = origin_of(base, change, pieces)
    assert [text for text in compare(origin, out, digests).checked if "logits" in text] != []
    weights = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name][0, 0] += 1e-3
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=f"{name} differs"):
        compare(origin, out, digests)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_merged_is_one_line_and_writes_nothing(tmp_path):
    base, adapter = make(tmp_path, KINDS["lora"])
    LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 32})).save_pretrained(tmp_path / "narrow")
    LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 1})).save_pretrained(tmp_path / "short")

    def refuses(base, message, **changes):
        changed = shutil.copytree(adapter, tmp_path / "changed")
        config = {**json.loads((adapter / "adapter_config.json").read_text()), **changes}
        (changed / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message) as error:
            merge(base, changed, tmp_path / "out", verify=False)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(changed)

    refuses(tmp_path / "narrow", r"for another base than .*narrow \(model.*is \(32, 64\), the adapter's is \(64, 64\)")
    refuses(tmp_path / "short", "no model.layers.1.self_attn.q_proj.weight")
    refuses(base, "sets use_qalora, which merging", use_qalora=True)
    refuses(base, "changes the base model", init_lora_weights="pissa")
    refuses(base, "of the kind 'LOHA'", peft_type="LOHA")
    weights = load_file(adapter / "adapter_model.safetensors")
    lost = next(name for name in weights if "lora_B" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, adapter / "adapter_model.safetensors")
    refuses(base, "lacks a matrix")
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    refuses(base, "is damaged")


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_the_embedding_too_is_left_to_the_adapter(tmp_path):
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    base, adapter = make(tmp_path, KINDS["embedding"], config=tied)
    with pytest.raises(UserError, match="embedding and as head"):
        merge(base, adapter, tmp_path / "out", verify=False)
