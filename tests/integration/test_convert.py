"""Conversion: what is written is what was trained, in any dtype, or nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import write_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.config import render
from tuner.convert.to_hf import compare_weights, convert
from tuner.dataset.chat_template import find_template
from tuner.engine.checkpoint import find_checkpoint
from tuner.errors import UserError
from tuner.train import train

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bias": True,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "torch_dtype": "float32",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def run(request, tmp_path_factory):
    """A work dir after two steps, from a model directory with the published remote code beside it."""
    folder = tmp_path_factory.mktemp("run")
    model = write_directory(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **MODEL, "tie_word_embeddings": request.param}))
    names = {reference.split(".")[0] for reference in MODEL["auto_map"].values()}
    for name in names:
        (model / f"{name}.py").write_text("raise SystemExit('remote code ran')\n")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(8)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_path": str(model),
        "weights": "random",
        "data_path": str(folder / "train.jsonl"),
        "cache_dir": str(folder / "cache"),
        "max_length": 64,
        "max_steps": 2,
        "num_accumulation_steps": 1,
        "precision": "fp32",
        "sample_interval": 0,
    }
    return train(render("internlm2_chat_7b-sft_full", settings), work_dir=folder / "work")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_every_tensor_is_the_trained_one(run, tmp_path, dtype, expected):
    out = convert(run, tmp_path / "hf", dtype=dtype)
    trained = load_file(next(find_checkpoint(run).glob("model-*.safetensors")))
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert {tensor.dtype for tensor in exported.values()} == {expected}
    assert all(torch.equal(trained[name].to(expected), exported[name]) for name in trained)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == expected


def test_the_directory_reads_as_the_published_ones_do(run, tmp_path):
    out = convert(run, tmp_path / "hf")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    assert (out / "modeling_internlm2.py").is_file()
    assert (out / "configuration_internlm2.py").is_file()
    assert config["auto_map"] == MODEL["auto_map"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    template = find_template("internlm2")
    assert set(stops) == set(tokenizer.convert_tokens_to_ids(list(template.stop_tokens)))
    messages = [{"role": "user", "content": "3?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n"


def test_no_reference_to_remote_code_that_nobody_has(run, tmp_path):
    work = shutil.copytree(run, tmp_path / "work")
    checkpoint = find_checkpoint(work)
    for path in (checkpoint / "hf").glob("*.py"):
        path.unlink()
    forget_in_manifest(checkpoint)
    assert "auto_map" not in json.loads((convert(work, tmp_path / "hf") / "config.json").read_text())


def forget_in_manifest(checkpoint):
    """Seal the checkpoint again, as if it had been saved without the files that are gone."""
    from tuner.engine.checkpoint import seal

    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)


def test_a_damaged_checkpoint_is_not_converted(run, tmp_path):
    work = shutil.copytree(run, tmp_path / "work")
    weights = next(find_checkpoint(work).glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is damaged"):
        convert(work, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert list(tmp_path.iterdir()) == [work]  # no draft is left behind


def test_a_written_tensor_that_differs_or_is_missing_is_found(run, tmp_path):
    out = convert(run, tmp_path / "hf")
    weights = load_file(out / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"{name} differs"):
        compare_weights(find_checkpoint(run), out)
    weights.pop(name)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"{name} was trained but not written"):
        compare_weights(find_checkpoint(run), out)


def test_nothing_is_overwritten_and_a_wrong_path_is_named(run, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        convert(run, tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"
    with pytest.raises(UserError, match="nowhere is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "hf")
