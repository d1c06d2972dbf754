"""Held-out loss: every bucket is what a loop over transformers' own float64 logits, document by document, gives."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from small_tokenizer import made_text, write_directory
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.cli import cli
from tuner.dataset.prepare import build_shards
from tuner.errors import UserError
from tuner.evaluate import loss
from tuner.evaluate.buckets import Buckets
from tuner.evaluate.loss import evaluate_loss, measure
from tuner.method.sft import SFT
from tuner.model.build import build_llm
from tuner.model.tokenizer import build_tokenizer

WIDTH = 16  # of the first bucket
EDGES = [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers and a tokenizer; beside it held.jsonl, 30 texts of many lengths."""
    directory = write_directory(tmp_path_factory.mktemp("loss"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = len(build_tokenizer(str(directory)))
    config = LlamaConfig(vocab_size=size, max_position_embeddings=1024, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    lines, rng = made_text(1, 400), random.Random(0)
    texts = ["".join(rng.choices(lines, k=rng.choice([1, 2, 3, 5, 12, 16]))) for _ in range(30)]
    (directory / "held.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return directory


def expected(model: Path, max_length: int) -> dict[str, Any]:
    """By definition: one document after the other, one token after the other."""
    tokenizer = build_tokenizer(str(model))
    llm = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    found: dict[Any, dict[int, list[tuple[float, bool]]]] = defaultdict(lambda: defaultdict(list))
    for number, line in enumerate((model / "held.jsonl").read_text().splitlines()):
        text = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
        ids = [tokenizer.bos_token_id, *text, tokenizer.eos_token_id][:max_length]
        with torch.no_grad():
            logits = llm(torch.tensor([ids])).logits[0]
        (of_length,) = [edges for edges in EDGES if edges[0] < len(ids) <= edges[1]]
        for place in range(1, len(ids)):
            value = -logits[place - 1].log_softmax(0)[ids[place]].item()
            (of_place,) = [edges for edges in EDGES if edges[0] <= place < edges[1]]
            for key in ("all", ("place", *of_place), ("length", *of_length), (of_length, of_place)):
                found[key][number].append((value, int(logits[place - 1].argmax()) == ids[place]))
    return {key: numbers_of(documents) for key, documents in found.items()}


def numbers_of(documents: dict[int, list[tuple[float, bool]]]) -> dict[str, Any]:
    values = [pair for found in documents.values() for pair in found]
    mean = math.fsum(value for value, _ in values) / len(values)
    error = None
    if len(documents) > 1:
        spread = sum((sum(value for value, _ in found) - mean * len(found)) ** 2 for found in documents.values())
        error = math.sqrt(len(documents) / (len(documents) - 1) * spread) / len(values)
    return {
        "tokens": len(values),
        "documents": len(documents),
        "loss": mean,
        "standard_error": error,
        "accuracy": sum(hit for _, hit in values) / len(values),
    }


def by_key(values: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """loss.json, under the names that `expected` has."""
    found: dict[Any, dict[str, Any]] = {"all": values}
    found |= {("place", row["from"], row["to"]): row for row in values["by_position"]}
    for row in values["by_length"]:
        found["length", row["above"], row["to"]] = row
        found |= {((row["above"], row["to"]), (part["from"], part["to"])): part for part in row["by_position"]}
    return found


def no_picture(*_: Any) -> None:
    """A second for each."""


def run_loss(model: Path, out: Path, *options: str) -> Result:
    command = ["evaluate", "loss", str(model), str(model / "held.jsonl"), "--bucket", "16", "--out", str(out)]
    command += ["--template", "internlm2"]
    return CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)


@pytest.mark.parametrize("max_length", [None, 100])
def test_every_number_is_that_of_transformers_document_by_document(
    model: Path, tmp_path: Path, tuner_cache: Path, monkeypatch: pytest.MonkeyPatch, max_length: int | None
):
    if max_length:
        monkeypatch.setattr(loss, "draw", no_picture)
    options = ["--max-length", str(max_length)] if max_length else []
    result = run_loss(model, tmp_path / "out", *options, "--pack-tokens", "200")
    found = by_key(json.loads((tmp_path / "out" / "loss.json").read_text()))
    reference = expected(model, max_length or 10**9)
    assert found.keys() == reference.keys()
    assert len(found) > 12
    for key, row in reference.items():
        assert (found[key]["standard_error"] is None) == (row["documents"] == 1)
        told = {name: value for name, value in row.items() if value is not None}
        assert {name: found[key][name] for name in told} == pytest.approx(told, rel=2e-5, abs=1e-6), key
        assert found[key]["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-3)
    assert f"{reference['all']['tokens']:,}" in result.output
    if not max_length:
        assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="exists already"):
        run_loss(model, tmp_path / "out")


def test_in_float64_they_are_exact_however_documents_are_packed(model: Path, tuner_cache: Path):
    reference = expected(model, 10**9)
    shards = build_shards(
        [str(model / "held.jsonl")],
        data_format="text",
        chat_template="internlm2",
        tokenizer=build_tokenizer(str(model)),
        max_length=10**6,
    )
    for pack_tokens in (1, 300, 10**6):
        buckets = Buckets(WIDTH)
        measure(SFT(build_llm(str(model)).double()), shards, buckets, pack_tokens=pack_tokens)
        for edges, row in buckets.positions().items():
            expected_row = reference[("place", *edges)]
            assert {name: getattr(row, name) for name in expected_row} == pytest.approx(expected_row, rel=1e-11, abs=0)


def test_only_what_training_would_train_is_scored(
    model: Path, tmp_path: Path, tuner_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss, "draw", no_picture)
    messages = [("user", "what"), ("assistant", "ba ne"), ("user", "and"), ("assistant", "shi")]
    row = {"messages": [{"role": role, "content": text} for role, text in messages]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    tokens = {}
    for loss_on in ("assistant", "last"):
        out = tmp_path / loss_on
        command = ["evaluate", "loss", str(model), str(tmp_path / "chat.jsonl"), "--loss-on", loss_on]
        CliRunner().invoke(cli, [*command, "--template", "internlm2", "--out", str(out)], catch_exceptions=False)
        values = json.loads((out / "loss.json").read_text())
        tokens[loss_on] = values["tokens"]
        assert values["standard_error"] is None
    count = {text: len(build_tokenizer(str(model)).encode(text, add_special_tokens=False)) for _, text in messages}
    assert tokens == {"assistant": count["ba ne"] + count["shi"] + 2, "last": count["shi"] + 1}  # with their end marks


def test_mistakes_are_told_before_weights_are_loaded(model: Path, tmp_path: Path, tuner_cache: Path):
    (tmp_path / "empty.jsonl").write_text("")
    cases = {
        "--max-length 1: a document needs at least 2 tokens": {"max_length": "1"},
        "--bucket 1k,2k: expected one number": {"bucket": "1k,2k"},
        "--max-length many: expected token counts": {"max_length": "many"},
        "nope.jsonl": {"data": [str(tmp_path / "nope.jsonl")]},
        "empty.jsonl": {"data": [str(tmp_path / "empty.jsonl")]},
    }
    for message, wrong in cases.items():
        given = {"data": [str(model / "held.jsonl")], "data_format": "auto", "loss_on": "assistant"}
        given |= {"max_length": None, "bucket": "1k", "out": tmp_path / "out"}
        with pytest.raises(UserError, match=message):
            evaluate_loss(str(model), **(given | wrong))
    assert not (tmp_path / "out").exists()
