"""Conversion: what is written is what was trained, in any dtype, or nothing is written."""

import errno
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import write_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.cli import run as cli
from tuner.config import render
from tuner.convert import output, reload, sharding, to_hf
from tuner.convert.record import RECORD, Checks
from tuner.convert.reload import MismatchError, Origin, check_reload, compare
from tuner.convert.shard import shard
from tuner.convert.to_hf import origin_of
from tuner.dataset.chat_template import find_template
from tuner.engine.checkpoint import find_checkpoint, read_manifest, write_manifest
from tuner.errors import UserError
from tuner.train import train

convert = partial(to_hf.convert, verify=False)  # the reload is a claim of its own
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


@pytest.mark.parametrize("run", [False], indirect=True, ids=["untied"])
def test_what_is_written_is_loaded_again_and_compared(run, tmp_path, capsys):
    """The whole default: a fresh process, then a record of what it found."""
    out = to_hf.convert(run, tmp_path / "hf", dtype="bfloat16", max_shard_size=100_000)
    record = json.loads((out / RECORD).read_text())
    assert record["not_checked"] == []
    for words in ("sha256 of all 2", "RoPE", "tokenizer ids", "of training", "text of 16 tokens", "text of 64 tokens"):
        assert sum(words in text for text in record["checked"]) == 1, words
    assert capsys.readouterr().out.count("checked: ") == len(record["checked"])
    weights = {name: tensor for path in out.glob("model-*") for name, tensor in load_file(path).items()}
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == {
        name: entry["shape"] for name, entry in record["tensors"].items()
    }
    again = shard(out, tmp_path / "one", verify=False)
    assert json.loads((again / RECORD).read_text())["tensors"] == record["tensors"]
    assert [path.name for path in again.glob("*.safetensors*")] == ["model.safetensors"]
    assert json.loads((again / RECORD).read_text())["not_checked"] != []


def test_the_reload_finds_what_differs(run, tmp_path):
    """Each part of the comparison can fail; in this process, for the fresh one is the test above."""
    origin = origin_of(find_checkpoint(run))
    out = convert(run, tmp_path / "hf")
    digests = {name: entry["sha256"] for name, entry in json.loads((out / RECORD).read_text())["tensors"].items()}
    assert compare(origin, out, digests).not_checked == []

    def fails(name, change, message):
        kept = (out / name).read_bytes()
        change(out / name)
        with pytest.raises(MismatchError, match=message):
            compare(origin, out, digests)
        (out / name).write_bytes(kept)

    def change_json(path, **values):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def change_weights(path, *, drop):
        weights = load_file(path)
        name = next(iter(weights))
        weights = {key: tensor for key, tensor in weights.items() if key != name or not drop}
        save_file(weights if drop else {**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})

    fails("model.safetensors", partial(change_weights, drop=False), "differs from what it was made from")
    fails("model.safetensors", partial(change_weights, drop=True), "was not written")
    fails("config.json", partial(change_json, rope_scaling={"type": "dynamic", "factor": 4.0}), "RoPE")
    fails("config.json", partial(change_json, rms_norm_eps=0.5), "logits of a text of 16 tokens differ")
    own = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    other = partial(change_json, chat_template=own.replace("<|im_end|>", "<|im_end|> "))
    fails("tokenizer_config.json", other, "chat template gives other")


def unreadable(_):
    os._exit(9)


@pytest.mark.parametrize("run", [False], indirect=True, ids=["untied"])
def test_a_check_that_dies_or_fails_keeps_nothing(run, tmp_path, monkeypatch):
    checkpoint = find_checkpoint(run)
    origin = Origin(checkpoint / "hf", partial(unreadable, None), unreadable, 64)
    with pytest.raises(UserError, match="ended without a word"):
        check_reload(origin, tmp_path, {}, Checks(), verify=True)

    def refuse(*args, **kwargs):
        raise MismatchError("w differs")

    monkeypatch.setattr(to_hf, "check_reload", refuse)
    with pytest.raises(RuntimeError, match="w differs"):
        to_hf.convert(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


class Sent(list):
    """A pipe's end that keeps what is sent."""

    send = list.append


@pytest.mark.parametrize("run", [False], indirect=True, ids=["untied"])
def test_what_the_user_can_mend_is_told_as_such(run, tmp_path, monkeypatch):
    """Of a template, in the fresh process; of a config, before anything is written."""
    origin, out = origin_of(find_checkpoint(run)), convert(run, tmp_path / "hf")
    digests = {name: entry["sha256"] for name, entry in json.loads((out / RECORD).read_text())["tensors"].items()}
    for template in ("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ 1 + '1' }}"):
        config = json.loads((out / "tokenizer_config.json").read_text())
        (out / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        sent = Sent()
        reload._answer(sent, origin, out, digests)
        [(problem, found)] = sent
        assert found is None
        assert isinstance(problem, UserError)
        assert "cannot be rendered" in str(problem)
        assert isinstance(pickle.loads(pickle.dumps(problem)), UserError)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "intermediate_size": 40}))
    with pytest.raises(UserError, match=r"do not fit its config.json: .*w1.weight is \(48, 32\), not \(40, 32\)"):
        shard(out, tmp_path / "shards")
    (out / "config.json").write_text(json.dumps({**settings, "model_type": "other"}))
    with pytest.raises(UserError, match=r"no model type 'other'.*never run"):
        shard(out, tmp_path / "shards")
    assert cli(["convert", str(run), str(tmp_path / "x"), "--dtype", "int3"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_card_tells_the_run_and_no_path_or_text_of_the_user(run, tmp_path):
    card = (convert(run, tmp_path / "mine") / "README.md").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ledger = json.loads((run / "ledger.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert all(f"| {line['step']} | {line['loss']:.4f} |" in card for line in metrics)
    assert f"| trained |  | {ledger['trained']} |" in card
    assert "| train.jsonl | 8 |" in card
    assert "| lr | 2e-05 |" in card
    assert str(run.parent) not in card
    assert "/" not in card.partition("## Recipe")[2].replace("application/", "").replace("https://", "")
    checkpoint = shutil.copytree(find_checkpoint(run), tmp_path / "step_00000002")
    assert card_without_work_dir(checkpoint, tmp_path).count("Not recorded") == 2


def card_without_work_dir(checkpoint: Path, folder: Path) -> str:
    return (convert(checkpoint, folder / "alone" / "hf") / "README.md").read_text()


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
def test_a_disk_that_refuses_any_write_leaves_nothing(run, tmp_path, monkeypatch, after):
    """Weights, then the files beside them: the n-th write or forced write fails."""
    calls = iter(range(1000))

    def refuse(function, *args):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args)

    monkeypatch.setattr(sharding, "write_fully", partial(refuse, sharding.write_fully))
    monkeypatch.setattr(output, "sync", partial(refuse, output.sync))
    with pytest.raises(UserError, match="was not written: No space left") as error:
        convert(run, tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_without_room_or_a_place_nothing_is_begun(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "hf"):
        with pytest.raises(UserError, match=r"not empty|was not written: File exists"):
            convert(run, out)
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="not empty"):
        convert(run, tmp_path / "link")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs 0\.00 GB, its disk has 0\.00 GB left"):
        convert(run, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_no_reference_to_remote_code_that_nobody_has(run, tmp_path):
    work = shutil.copytree(run, tmp_path / "work")
    checkpoint = find_checkpoint(work)
    manifest = read_manifest(checkpoint)
    for path in (checkpoint / "hf").glob("*.py"):
        path.unlink()
        del manifest["files"][f"hf/{path.name}"]
    write_manifest(checkpoint, manifest.pop("files"), manifest)
    (checkpoint / "hf" / "unknown.py").write_text("not of this checkpoint")
    out = convert(work, tmp_path / "hf")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not (out / "unknown.py").exists()


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


def test_nothing_is_overwritten_and_a_wrong_path_is_named(run, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        convert(run, tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"
    with pytest.raises(UserError, match="nowhere is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "hf")
