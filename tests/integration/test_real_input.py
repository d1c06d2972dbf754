"""Real conversations with InternLM2's real tokenizer: trains, adds up, converts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.config import render
from tuner.convert.checkpoint_files import load_trained
from tuner.convert.to_hf import convert
from tuner.engine.checkpoint import find_checkpoint
from tuner.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
NUM_ROWS = 12  # of each language


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    """Work dir of a short training on Chinese and English tool conversations, through the recipe."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(shared_data / "internlm2-7b-hub", folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config.update(SMALL, num_key_value_heads=2, torch_dtype="float32")
    (folder / "model" / "config.json").chmod(0o644)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for language in ("en", "zh"):
        rows = json.loads((shared_data / "glaive_toolcall" / f"glaive_toolcall_{language}_demo.json").read_text())
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[:NUM_ROWS]]
        (folder / f"{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "model_path": str(folder / "model"),
        "weights": "random",
        "data_path": [str(folder / "en.jsonl"), str(folder / "zh.jsonl")],
        "cache_dir": str(folder / "cache"),
        "max_length": 1024,
        "num_accumulation_steps": 1,
        "num_epochs": 2,
        "lr": 2e-2,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "sample_interval": 0,
    }
    source = render("internlm2_chat_7b-sft_full", settings)
    source = source.replace("# settings: the model", "from examples.sharegpt import to_sample\n\n# settings: the model")
    source = source.replace("data_format=data_format", "data_format=to_sample")
    sys.path.insert(0, str(ROOT))
    try:
        return train(source, work_dir=folder / "run")
    finally:
        sys.path.remove(str(ROOT))


def test_the_loss_falls(run):
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(11.4, abs=0.3)  # ln(92,544) of an untrained model
    assert losses[-1] < losses[0] - 2


def test_the_ledger_adds_up_to_the_last_token(run):
    """Against a count made another way: one encoding of every rendered conversation as a whole."""
    from examples.sharegpt import to_sample
    from tuner.dataset.chat_template import find_template
    from tuner.dataset.chat_template import render as render_segments
    from tuner.dataset.tokenize import Encoder
    from tuner.model.tokenizer import build_tokenizer

    template = find_template("internlm2")
    encoder = Encoder.from_tokenizer(build_tokenizer(str(run.parent / "model")), template)
    rows = [json.loads(line) for name in ("en", "zh") for line in (run.parent / f"{name}.jsonl").open(encoding="utf-8")]
    documents = [encoder.encode([render_segments(to_sample(row), template)])[0] for row in rows]
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["rows"] == ledger["read"]["documents"] == len(rows) == 2 * NUM_ROWS
    assert ledger["read"]["tokens"] == sum(len(document.ids) for document in documents)
    lost = sum(ledger[name]["tokens"] for name in ("dropped", "untrained", "truncated"))
    assert ledger["read"]["tokens"] == lost + ledger["masked"] + ledger["trained"]
    assert ledger["trained"] == sum(int(document.trained[1:1024].sum()) for document in documents)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["num_loss_tokens"] for line in metrics) == 2 * ledger["trained"]  # two epochs


def test_the_conversion_is_what_was_trained(run):
    out = convert(run, run.parent / "hf", verify=False)
    checkpoint = find_checkpoint(run)
    trained = load_file(next(checkpoint.glob("model-*.safetensors")))
    exported = load_file(out / "model.safetensors")
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)
    ids = torch.tensor([[1, 92543, 1008, 364, 77230, 60353, 92542, 364]])
    with torch.inference_mode():
        expected = load_trained(checkpoint)(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("你好，世界", add_special_tokens=False)["input_ids"] == [77230, 60353, 68339]
    config = json.loads((out / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (1000000, None)


def test_the_same_conversion_through_the_command_line_refuses_to_overwrite(run):
    command = [
        sys.executable,
        "-c",
        "from tuner.cli import main; main()",
        "convert",
        str(run),
        str(run.parent / "model"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert "Traceback" not in done.stderr
