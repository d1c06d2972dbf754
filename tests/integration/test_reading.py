"""Files of every kind to the same shards; bad rows cost themselves; weights reach the batches and the ledger."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuner.dataset import prepare, token_files
from tuner.dataset.build import PackedDataset, build_dataloader, build_shards
from tuner.dataset.chat_template import CHAT_TEMPLATES
from tuner.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and the template's marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(list(CHAT_TEMPLATES["internlm2"].special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def make(tmp_path, tokenizer):
    """`build_shards` with settings that a test may change."""

    def call(path, **changes):
        settings = {"data_format": "openai", "chat_template": "internlm2", "tokenizer": tokenizer, "max_length": 100}
        path = str(path) if isinstance(path, Path) else path
        return build_shards(path, **{**settings, "cache_dir": tmp_path / "cache", **changes})

    return call


def row(number: int, words: int = 3) -> dict:
    answer = f"Answer {number}: " + "word " * words
    return {"messages": [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": answer}]}


ROWS = [row(number, number % 9) for number in range(300)]


def write(path: Path) -> Path:
    """The rows in a file of the kind that its ending says."""
    text = "\n".join(map(json.dumps, ROWS))
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            separator = "," if path.suffix == ".csv" else "\t"
            csv.writer(file, delimiter=separator).writerows(
                [["messages"], *([json.dumps(r["messages"])] for r in ROWS)]
            )
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"])
def test_the_same_rows_in_a_file_of_any_kind_give_the_same_documents(tmp_path, make, name):
    plain = make(write(tmp_path / "plain.jsonl"))
    made = make(write(tmp_path / name))
    assert made.fingerprint == plain.fingerprint
    assert made.ledger == plain.ledger


BAD = [
    b'{"text": "\xff"}',
    b'{"a": 1, "a": 2}',
    b'{"a": NaN}',
    b"\0" * 9,
    b'{"a": ' + b"[" * 999,
    b"{}",
    b"[]",
    b"null",
]


def test_every_bad_row_costs_itself_alone_on_any_number_of_workers(tmp_path, make, monkeypatch):
    lines = []
    for number, good in enumerate(ROWS):
        lines += [json.dumps(good).encode(), BAD[number % len(BAD)]]
    (tmp_path / "bad.jsonl").write_bytes(b"\r\n".join(lines))
    clean = make(write(tmp_path / "clean.jsonl"))
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(prepare, "num_cores", lambda: 2)
    made = make(tmp_path / "bad.jsonl", on_bad_row="skip")
    assert made.ledger.skipped == len(ROWS)
    assert [made.source(n) for n in range(3)] == [f"{tmp_path}/bad.jsonl:{line}" for line in (1, 3, 5)]
    assert made.fingerprint == clean.fingerprint
    kept = (made.directories[0] / "bad_rows.jsonl").read_bytes().splitlines()
    assert kept == [BAD[number % len(BAD)] for number in range(len(ROWS))]


def test_bad_rows_of_a_table_are_written_aside_as_rows_that_can_be_mended(tmp_path, make):
    (tmp_path / "a.csv").write_text('instruction,output\nSay 1,One\nSay 2\n"Say"x,y\nSay 3,Three\n')
    made = make(tmp_path / "a.csv", data_format="alpaca", on_bad_row="skip")
    assert len(made) == 2
    directory = made.directories[0]
    assert [json.loads(line) for line in (directory / "bad_rows.jsonl").read_bytes().splitlines()] == [
        {"instruction": "Say 2"}, {}
    ]  # fmt: skip
    reasons = [json.loads(line) for line in (directory / "bad_rows.reasons.jsonl").read_bytes().splitlines()]
    assert [reason["line"] for reason in reasons] == [3, 4]
    with pytest.raises(UserError, match=r"a.csv:3: bad row: 1 cells, but the header has 2"):
        make(tmp_path / "a.csv", data_format="alpaca")


def test_documents_written_as_a_pair_come_back_as_they_were(tmp_path, make):
    made = make(write(tmp_path / "a.jsonl"))
    documents = [made.document(index) for index in range(len(made))]
    token_files.write(tmp_path / "pair.bin", documents)
    again = make(tmp_path / "pair.bin", data_format="tokens")
    assert again.fingerprint == made.fingerprint
    rows = [
        {"input_ids": d.ids.tolist(), "labels": np.where(d.trained, d.ids.astype(np.int64), -100).tolist()}
        for d in documents
    ]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert make(tmp_path / "ids.jsonl", data_format="tokens").fingerprint == made.fingerprint


def test_ids_of_another_tokenizer_are_refused_with_file_and_line(tmp_path, make, tokenizer):
    (tmp_path / "a.jsonl").write_text(f'{{"tokens": [1, 2]}}\n{{"tokens": [1, {len(tokenizer)}]}}\n')
    with pytest.raises(UserError, match=rf"a.jsonl:2: bad row: Expected ids below {len(tokenizer)}, .* got"):
        make(tmp_path / "a.jsonl", data_format="tokens")
    (tmp_path / "b.jsonl").write_text(f'{{"tokens": [1, {len(tokenizer) - 1}]}}\n')
    assert len(make(tmp_path / "b.jsonl", data_format="tokens")) == 1


@pytest.fixture
def weighted(tmp_path, make):
    """A large and a small source, of which the small one is to have three quarters of the tokens."""
    for name, number in (("large", 900), ("small", 60)):
        rows = [row(n, n % 9) for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def call(large: float = 1, small: float = 3) -> PackedDataset:
        path = [
            {"path": f"{tmp_path}/large.jsonl", "weight": large},
            {"path": f"{tmp_path}/small.jsonl", "weight": small},
        ]
        return PackedDataset(make(path), max_length=400, seed=7)

    return call


def test_weights_are_shares_of_the_tokens_of_every_epoch(weighted, capsys):
    dataset = weighted()
    ledger = dataset.ledger
    large, small = dataset.contributions
    assert large["share"] == pytest.approx(0.25, abs=0.01)
    assert small["share"] == pytest.approx(0.75, abs=0.01)
    assert small["passes"] > 8 > 1 > large["passes"]
    assert large["tokens"] + small["tokens"] == ledger.kept.tokens
    assert large["drawn_tokens"] + small["drawn_tokens"] == ledger.drawn.tokens
    assert large["drawn_documents"] + small["drawn_documents"] == ledger.drawn.documents
    assert 0.9 < ledger.efficiency <= 1
    out = capsys.readouterr().out
    assert "large.jsonl" in out
    assert f"{small['share']:.2%}" in out
    assert type(ledger).from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger
    json.dumps(dataset.contributions)


def test_a_run_over_weighted_sources_resumes_with_the_batches_that_would_have_come(weighted):
    whole = [step.packs for step in build_dataloader(weighted(), num_accumulation_steps=4, num_epochs=3).sampler]
    again = build_dataloader(weighted(), num_accumulation_steps=4, num_epochs=3).sampler
    again.seek(len(whole) // 2)
    assert [step.packs for step in again] == whole[len(whole) // 2 :]
    loader = build_dataloader(weighted(), num_accumulation_steps=4, num_workers=2, max_steps=2)
    assert [len(batches) for batches in loader] == [4, 4]


def test_other_weights_are_another_run(weighted):
    assert weighted().shards.fingerprint == weighted().shards.fingerprint
    assert weighted().shards.fingerprint != weighted(small=2).shards.fingerprint


def test_a_weighted_source_without_a_document_left_is_refused(tmp_path, make):
    (tmp_path / "a.jsonl").write_text(json.dumps(row(1)))
    (tmp_path / "b.jsonl").write_text(json.dumps(row(1, 400)))
    path = [{"path": f"{tmp_path}/{name}.jsonl", "weight": 1} for name in "ab"]
    with pytest.raises(UserError, match=r"No document is left of .*b.jsonl, which has a weight"):
        PackedDataset(make(path, too_long="drop"), max_length=100, seed=0)


def test_without_weights_every_file_is_gone_through_once(tmp_path, make):
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps(row(1)))
    dataset = PackedDataset(make(f"{tmp_path}/[ab].jsonl"), max_length=400, seed=7)
    assert [(entry["passes"], entry["documents"]) for entry in dataset.contributions] == [(1.0, 300), (1.0, 1)]
    assert dataset.ledger.drawn.tokens == 0
