"""What `tuner chat` talks to: a base with an adapter computes what peft computes with it, or it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_tokenizer import write_directory
from transformers import AutoModelForCausalLM

from tuner.chat.loading import find_source, load_llm, load_template, load_tokenizer, with_adapter
from tuner.errors import UserError
from tuner.model.fingerprint import Base
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM

WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[1, 5, 7, 9, 11]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small InternLM2 with tokenizer."""
    directory = write_directory(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    InternLM2ForCausalLM(InternLM2Config(vocab_size=320, **sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A LoRA of it that changes something, as peft saves it."""
    llm = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    settings = LoraConfig(r=2, target_modules=["wqkv", "w2"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(llm, settings)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory


@torch.inference_mode()
def logits(llm) -> torch.Tensor:
    return llm(IDS).logits


def test_a_base_with_an_adapter_computes_what_peft_computes(base, adapter):
    plain = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, dtype=torch.float32).eval()
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, adapter).eval())
    given = logits(load_llm(find_source(str(base), adapter)))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    assert (given - before).abs().max() > 1e-3


def test_an_adapter_alone_names_its_base_and_tokenizer_and_template_are_found(base, adapter, tmp_path):
    source = find_source(str(adapter), None)
    assert (source.base, source.adapter, source.is_named_by_adapter) == (str(base), adapter, True)
    tokenizer = load_tokenizer(source)
    assert load_template(source, tokenizer, None).name == "internlm2"
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    (own / "template.json").write_text('{"chat_template": "chatml"}')  # what the adapter was trained with
    assert load_template(find_source(str(own), None), tokenizer, None).name == "chatml"
    assert load_template(find_source(str(base), own), tokenizer, None).name == "chatml"
    (own / "template.json").write_text("{")
    with pytest.raises(UserError, match=r"template\.json cannot be read.*--template"):
        load_template(find_source(str(base), own), tokenizer, None)
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name its base"):
        find_source(str(own), None)
    with pytest.raises(UserError, match="is an adapter itself"):
        find_source(str(adapter), own)


def in_place(name: str) -> str:
    """What the model that was trained calls a tensor of peft's file."""
    return (
        name.removeprefix("base_model.model.")
        .replace("lora_A.", "lora_A.default.")
        .replace("lora_B.", "lora_B.default.")
    )


def test_an_adapter_in_a_checkpoint_is_read_as_the_one_that_peft_saves(base, adapter, tmp_path):
    tensors = {in_place(name): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    (tmp_path / "hf").mkdir()
    shutil.copy(adapter / "adapter_config.json", tmp_path / "hf")
    (tmp_path / "manifest.json").touch()
    file = tmp_path / "model-00000-of-00001.safetensors"
    save_file(tensors, file)
    source = with_adapter(str(base), tmp_path / "hf")
    assert source.checkpoint == tmp_path
    assert torch.equal(logits(load_llm(source)), logits(load_llm(find_source(str(base), adapter))))
    for wrong in damaged(tensors).values():
        save_file(wrong, file)
        with pytest.raises(UserError, match="does not fit this model"):
            load_llm(source)


def damaged(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    first, second, *_ = tensors
    return {
        "a weight without a place": {**tensors, first.replace("layers.0", "layers.7"): tensors[first].clone()},
        "a place without a weight": {name: tensor for name, tensor in tensors.items() if name != second},
        "a weight of another shape": {**tensors, first: torch.zeros(3, 5)},
    }


def test_an_adapter_that_does_not_fit_is_refused(base, adapter, tmp_path):
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    for tensors in damaged(load_file(adapter / WEIGHTS)).values():
        save_file(tensors, own / WEIGHTS)
        with pytest.raises(UserError, match="does not fit this model"):
            load_llm(find_source(str(base), own))
    (own / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(UserError, match="does not fit this model"):
        load_llm(find_source(str(base), own))


def test_the_base_must_be_that_of_training_by_its_values(base, adapter, tmp_path):
    own, other = Path(shutil.copytree(adapter, tmp_path / "own")), Path(shutil.copytree(base, tmp_path / "other"))
    note = {**Base(str(base)).note(), "quantise": None, "compute_dtype": "float32"}
    (own / "base.json").write_text(json.dumps(note))
    expected = logits(load_llm(find_source(str(base), adapter)))
    assert torch.equal(logits(load_llm(find_source(str(base), own))), expected)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"own is an adapter for another base than .*other"):
        load_llm(find_source(str(other), own))
    (own / "base.json").write_text("{}")
    with pytest.raises(UserError, match=r"base\.json cannot be read"):
        load_llm(find_source(str(base), own))


def test_a_base_of_4_bits_has_their_values(base, adapter, tmp_path, capsys):
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    note = {**Base(str(base)).note(), "quantise": "nf4", "compute_dtype": "bfloat16"}
    (own / "base.json").write_text(json.dumps(note))
    found = load_llm(find_source(str(base), own))
    assert "4 weights of the base have the values of nf4" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, dtype=torch.float32).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith(("wqkv.weight", "w2.weight")):
            packed, state = quantize_4bit(parameter.data, quant_type="nf4", compress_statistics=True, blocksize=64)
            parameter.data = dequantize_4bit(packed, state)
    torch.testing.assert_close(
        logits(found), logits(PeftModel.from_pretrained(plain, adapter).eval()), rtol=0, atol=1e-5
    )
