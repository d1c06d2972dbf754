"""From rows to batches: what a setting or a row says of the loss is what the step trains and the ledger counts."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import WEATHER, bytelevel

from tuner.constants import IGNORE_INDEX
from tuner.dataset import prepare, read, token_files
from tuner.dataset.build import PackedDataset, build_dataloader, build_shards
from tuner.dataset.collate import Batch
from tuner.dataset.rendering import Rendering
from tuner.dataset.shards import Shards
from tuner.errors import UserError

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = {"messages": [USER, said("One."), USER, said("Two.")]}
CALLING = {
    "messages": [USER, said("Wait.", tool_calls=[CALL]), {"role": "tool", "content": "22"}, said("Warm.")],
    "tools": [{"type": "function", "function": WEATHER}],
}


def shards_of(folder: Path, rows: list[dict[str, Any]], rendering: Rendering | str, **changes: Any) -> Shards:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "data_format": "openai",
        "chat_template": rendering,
        "tokenizer": bytelevel("qwen2.5"),
        "max_length": 2000,
        "cache_dir": folder / "cache",
    }
    return build_shards(str(folder / "rows.jsonl"), **settings | changes)


def trained_texts(shards: Shards) -> list[str]:
    tokenizer = bytelevel("qwen2.5")
    documents = map(shards.document, range(len(shards)))
    return [tokenizer.decode(document.ids[document.trained]) for document in documents]


CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("rendering", "expected"),
    [
        ("qwen2.5", ["One.<|im_end|>Two.<|im_end|>", f"Wait.\n{CALL_TEXT}Warm.<|im_end|>"]),
        (Rendering("qwen2.5", "last"), ["Two.<|im_end|>", "Warm.<|im_end|>"]),
        (Rendering("qwen2.5", "last", train_newline=True), ["Two.<|im_end|>\n", "Warm.<|im_end|>\n"]),
        (Rendering("qwen2.5", "calls"), [CALL_TEXT]),
        (Rendering("qwen2.5", "thoughts"), ["Wait.\n"]),
    ],
)
def test_a_choice_reaches_the_shards(tmp_path: Path, rendering: Rendering | str, expected: list[str]):
    shards = shards_of(tmp_path, [TALK, CALLING], rendering)
    assert trained_texts(shards) == expected
    left_out = 2 - len(expected)
    assert shards.ledger.untrained.documents == left_out, "without calls there is nothing to train: counted, no error"
    assert shards.ledger.kept.documents == len(expected)


def test_a_choice_has_shards_of_its_own_and_the_default_is_the_name_alone(tmp_path: Path):
    plain = shards_of(tmp_path, [TALK], "qwen2.5")
    named = shards_of(tmp_path, [TALK], Rendering("qwen2.5"))
    last = shards_of(tmp_path, [TALK], Rendering("qwen2.5", "last"))
    newline = shards_of(tmp_path, [TALK], Rendering("qwen2.5", train_newline=True))
    assert named.directories == plain.directories
    assert len({shards.directories[0] for shards in (plain, last, newline)}) == 3
    assert len({shards.fingerprint for shards in (plain, last, newline)}) == 3
    assert all(np.array_equal(plain.document(0).ids, other.document(0).ids) for other in (last, newline))


def test_a_choice_that_leaves_nothing_of_all_rows_says_so(tmp_path: Path):
    message = r'1 documents have nothing to train: loss_on = "calls" finds nothing in them, or max_length'
    with pytest.raises(UserError, match=rf"No document is left of .*: {message}"):
        shards_of(tmp_path, [TALK], Rendering("qwen2.5", "calls"))


def test_a_choice_that_is_none_is_told_with_the_nearest(tmp_path: Path):
    with pytest.raises(UserError, match=r"loss_on='call' is not known. Allowed: assistant, last, calls, thoughts\..*"):
        shards_of(tmp_path, [TALK], Rendering("qwen2.5", "call"))


def weighted_rows(number: int) -> list[dict[str, Any]]:
    """Of every three rows one has no weights, one has an answer of 0.5, one has 2 and 0.25."""
    rows = []
    for index in range(number):
        first, second = [({}, {}), ({}, {"loss": 0.5}), ({"loss": 2}, {"loss": 0.25})][index % 3]
        messages = [USER, said(f"One {index}. " * (index % 7 + 1), **first), USER, said(f"Two {index}.", **second)]
        rows.append({"messages": messages})
    return rows


def epoch_of(shards: Shards, max_length: int = 2000, num_accumulation_steps: int = 3) -> list[list[Batch]]:
    dataset = PackedDataset(shards, max_length=max_length, seed=1)
    return list(build_dataloader(dataset, num_accumulation_steps=num_accumulation_steps))


@pytest.mark.parametrize("too_long", ["truncate", "split", "drop"])
@pytest.mark.parametrize("max_length", [41, 64, 2000])
def test_weights_stay_with_their_tokens_through_cuts_packs_and_batches(tmp_path: Path, too_long: str, max_length: int):
    """Each label of each batch, beside the documents as the encoder alone gives them."""
    rows = weighted_rows(40)
    whole = shards_of(tmp_path, rows, "chatml")
    shards = shards_of(tmp_path, rows, "chatml", too_long=too_long, max_length=max_length)
    expected = cut(list(map(whole.document, range(len(whole)))), too_long, max_length)
    got = []
    total = 0.0
    for step in epoch_of(shards, max_length):
        in_step = 0.0
        for batch in step:
            labels = batch["labels"][0].numpy()
            weights = batch["loss_weights"]
            weights = (labels != IGNORE_INDEX) * 1.0 if weights is None else weights[0].numpy()
            assert ((weights > 0) == (labels != IGNORE_INDEX)).all()
            edges = batch["cu_seqlens"].tolist()
            ids = batch["input_ids"][0].numpy()
            got += [(ids[a:b].tolist(), weights[a:b].tolist()) for a, b in pairwise(edges)]
            in_step += float(weights.sum(dtype=np.float64))
        assert {batch["num_loss_tokens"] for batch in step} == {in_step}, "quarters are exact"
        total += in_step
    assert sorted(got) == sorted(expected)
    assert total == shards.ledger.trained + shards.ledger.weight_surplus
    kept = [len(ids) for ids, _ in expected]
    assert (max_length < 2000) == (sorted(kept) != sorted(whole.lengths.tolist())), "some are cut, or none"


def cut(documents: list[Any], too_long: str, max_length: int) -> list[tuple[list[int], list[float]]]:
    """Ids and, shifted to the labels, weights of what is left of each document; token by token."""
    left = []
    for document in documents:
        weights = np.ones(len(document.ids)) if document.weights is None else document.weights
        ids, weights = document.ids.tolist(), (weights * document.trained).tolist()
        if too_long == "drop" and len(ids) > max_length:
            continue
        ends = len(ids) if too_long == "split" else min(len(ids), max_length)
        for start in range(0, ends, max_length):
            stop = min(start + max_length, ends)
            piece = (ids[start:stop], [*weights[start + 1 : stop], 0.0])
            left += [piece] if any(piece[1]) else []
    return left


def test_rows_say_what_their_tokens_weigh(tmp_path: Path):
    row = {"messages": [USER, said("One.", loss=0.5), USER, said("Two.", weight=2), USER, said("Three.")]}
    shards = shards_of(tmp_path, [row, TALK], Rendering("qwen2.5", train_newline=True))
    document = shards.document(0)
    tokenizer = bytelevel("qwen2.5")
    texts = {w: tokenizer.decode(document.ids[document.trained & (document.weights == w)]) for w in (0.5, 1, 2)}
    assert texts == {0.5: "One.<|im_end|>\n", 1: "Three.<|im_end|>\n", 2: "Two.<|im_end|>\n"}
    assert shards.document(1).weights is None


def test_without_other_weights_batches_are_as_ever(tmp_path: Path):
    """`loss: 1`, `weight: 1.0` and `loss: true` are no weights: the shards, and so the steps, are the very same."""
    rows = [row for row in weighted_rows(12) if "loss" not in json.dumps(row)]
    said_so = json.loads(json.dumps(rows))
    for index, row in enumerate(said_so):
        row["messages"][1] |= [{"loss": 1}, {"weight": 1.0}, {"loss": True}][index % 3]
    plain, same = shards_of(tmp_path / "a", rows, "qwen2.5"), shards_of(tmp_path / "b", said_so, "qwen2.5")
    assert plain.fingerprint == same.fingerprint
    assert plain.loss_weight is same.loss_weight is None
    assert not list(same.directories[0].glob("weights*"))
    for one, other in zip(epoch_of(plain), epoch_of(same), strict=True):
        for batch, twin in zip(one, other, strict=True):
            assert batch["loss_weights"] is twin["loss_weights"] is None
            assert type(batch["num_loss_tokens"]) is int
            assert batch["num_loss_tokens"] == twin["num_loss_tokens"]


def test_weights_are_the_same_bytes_from_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = []
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(read, "CHUNK_BYTES", 2000)
    for num_workers in (1, 2):
        monkeypatch.setattr(prepare, "num_cores", lambda number=num_workers: number)
        shards = shards_of(tmp_path, weighted_rows(60), "qwen2.5", cache_dir=tmp_path / str(num_workers))
        files.append({file.name: file.read_bytes() for file in shards.directories[0].iterdir()})
    assert files[0] == files[1]
    assert len(files[0]["weights.bin"]) == 20 * 3 * 20  # a row of two answers that weigh 0.5, or 2 and 0.25


def test_a_bin_file_cannot_hold_weights_and_says_so(tmp_path: Path):
    plain, weighted = weighted_rows(2)
    shards = shards_of(tmp_path, [plain, weighted], "qwen2.5")
    assert token_files.write(tmp_path / "a.bin", [shards.document(0)]) == 1
    with pytest.raises(
        UserError, match=r"document 1: tokens whose loss weighs other than 1, which a \.bin file cannot"
    ):
        token_files.write(tmp_path / "b.bin", map(shards.document, range(2)))
