"""Files to batches: each token counted, the same bytes from any number of processes, and made only once."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuner.constants import IGNORE_INDEX
from tuner.dataset import prepare, read, shards, sources
from tuner.dataset.build import PackedDataset, build_dataloader, build_shards
from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.formats import FORMATS
from tuner.dataset.tokenize import Encoder
from tuner.errors import UserError

TEMPLATE = CHAT_TEMPLATES["internlm2"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and the template's marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(list(TEMPLATE.special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files in these tests are young; outside of them two seconds pass before a digest is trusted."""
    monkeypatch.setattr(sources, "SETTLED_SECONDS", -10.0)


def row(number: int, words: int = 3) -> dict:
    answer = f"Answer {number}: " + "word " * words
    return {"messages": [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path, tokenizer):
    """`build_shards` with settings that a test may change."""

    def call(path, **changes):
        settings = {
            "data_format": "openai", "chat_template": "internlm2", "tokenizer": tokenizer, "max_length": 100,
            "cache_dir": tmp_path / "cache",
        }  # fmt: skip
        path = [str(part) for part in path] if isinstance(path, list) else str(path)
        return build_shards(path, **{**settings, **changes})

    return call


def shard_names(tmp_path: Path) -> set[str]:
    return {file.name for file in (tmp_path / "cache").iterdir() if file.is_dir()} - {"sources"}


def encode(rows: list[dict], tokenizer) -> list:
    encoder = Encoder.from_tokenizer(tokenizer, TEMPLATE)
    return encoder.encode([render(FORMATS["openai"](each), TEMPLATE) for each in rows])


def test_documents_are_what_the_encoder_gives_in_the_order_of_the_rows(tmp_path, make, tokenizer):
    rows = [row(n) for n in range(20)]
    made = make(write_rows(tmp_path / "a.jsonl", rows))
    assert len(made) == 20
    for index, document in enumerate(encode(rows, tokenizer)):
        assert np.array_equal(made.document(index).ids, document.ids)
        assert np.array_equal(made.document(index).trained, document.trained)
        assert made.source(index) == f"{tmp_path / 'a.jsonl'}:{index + 1}"


@pytest.mark.parametrize("too_long", ["truncate", "split", "drop"])
def test_the_ledger_adds_up_to_the_last_token(tmp_path, make, tokenizer, capsys, too_long):
    rows = [row(n, words) for n, words in enumerate([1, 3, 80, 20, 2, 300])]
    rows.append({"messages": [{"role": "user", "content": "long " * 50}, {"role": "assistant", "content": "yes"}]})
    made = make(write_rows(tmp_path / "a.jsonl", rows), too_long=too_long)
    lengths = [len(document.ids) for document in encode(rows, tokenizer)]
    ledger = made.ledger.check()
    assert ledger.read == (len(rows), sum(lengths))
    gone = ledger.dropped.tokens + ledger.untrained.tokens + ledger.truncated.tokens
    assert gone + ledger.masked + ledger.trained == sum(lengths)
    assert ledger.kept.tokens == made.lengths.sum()
    assert ledger.trained == made.num_loss_tokens.sum()
    assert made.lengths.max() <= 100
    assert (made.num_loss_tokens > 0).all()
    over = sum(length > 100 for length in lengths)
    assert over >= 3
    if too_long == "truncate":
        assert ledger.truncated.documents + ledger.untrained.documents == over, "the long question leaves no answer"
        assert ledger.untrained == (1, lengths[-1])
    if too_long == "split":
        assert ledger.split == over
        assert ledger.untrained.documents > 0
        assert ledger.dropped.tokens == ledger.truncated.tokens == 0
    if too_long == "drop":
        assert ledger.dropped == (over, sum(length for length in lengths if length > 100))
    assert f"{ledger.trained:,}" in capsys.readouterr().out


def test_one_and_several_processes_write_the_same_bytes(tmp_path, make, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [row(n, n % 40) for n in range(400)] + ["{bad"] * 3)
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(read, "CHUNK_BYTES", 2000)
    files = []
    for num_workers in (1, 3):
        monkeypatch.setattr(prepare, "num_cores", lambda number=num_workers: number)
        made = make(path, cache_dir=tmp_path / str(num_workers), on_bad_row="skip")
        files.append({file.name: file.read_bytes() for file in made.directories[0].iterdir()})
    assert files[0] == files[1]
    assert files[0]["bad_rows.jsonl"] == b"{bad\n" * 3


def test_a_second_run_neither_tokenises_nor_reads_the_data(tmp_path, make, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(5)])
    first = make(path)
    monkeypatch.setattr(prepare, "Workers", None)
    monkeypatch.setattr(sources, "hash_file", None)
    assert make(path).fingerprint == first.fingerprint


def test_a_file_edited_with_its_time_put_back_is_read_again(tmp_path, make):
    path = write_rows(tmp_path / "a.jsonl", [row(1)])
    first = make(path)
    status = path.stat()
    path.write_text(path.read_text().replace("Answer", "Advice"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert make(path).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_length": 90}, "max_length (100 -> 90)"),
        ({"too_long": "split"}, "too_long (truncate -> split)"),
        ({"on_bad_row": "skip"}, "on_bad_row (raise -> skip)"),
        ({"chat_template": "chatml"}, "chat_template (internlm2 -> chatml), text of the chat template\n"),
        ({"data_format": lambda given: FORMATS["openai"](given)}, "data_format"),
    ],
    ids=lambda value: None,
)
def test_any_other_setting_makes_another_shard_and_says_why(tmp_path, make, capsys, changes, reason):
    path = write_rows(tmp_path / "a.jsonl", [row(1)])
    make(path)
    assert "changed" not in capsys.readouterr().out
    make(path, **changes)
    assert f"tokenised again; since the time before has changed: {reason}" in capsys.readouterr().out
    assert len(shard_names(tmp_path)) == 2
    make(path)
    assert len(shard_names(tmp_path)) == 2, "the first one is still there"
    assert "again" not in capsys.readouterr().out


def test_a_users_function_is_known_by_its_text_and_by_what_it_calls(tmp_path, make, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [{"q": "1+1?", "a": "2"}])
    monkeypatch.syspath_prepend(tmp_path)
    text = """
def turn(role, words):
    return {"role": role, "content": words}

def to_sample(row):
    return {"messages": [turn("user", row["q"]), turn("assistant", row["a"] + MARK)]}

MARK = "!"
"""
    for name, source in (("one", text), ("two", text), ("three", text.replace('words}', 'words + "."}')),
                         ("four", text.replace('"!"', '"?"'))):  # fmt: skip
        (tmp_path / f"{name}.py").write_text(source)
    functions = [__import__(name).to_sample for name in ("one", "two", "three", "four")]
    made = [make(path, data_format=function).fingerprint for function in functions]
    assert made[0] == made[1]
    assert len(set(made)) == 3
    assert len(shard_names(tmp_path)) == 3


def test_only_the_file_that_is_new_is_tokenised(tmp_path, make, monkeypatch):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [row(n) for n in range(3)]) for name in "ab"]
    make(str(paths[0]))
    written = []
    monkeypatch.setattr(prepare, "_write", lambda place, file, **_: written.append(file) or real(place, file=file, **_))
    made = make([str(path) for path in reversed(paths)])
    assert written == [], "the other file has the same content"
    write_rows(paths[1], [row(n) for n in range(9)])
    assert len(make(f"{tmp_path}/[ab].jsonl")) == 12
    assert written == [paths[1]]
    assert made.source(0).startswith(str(paths[1]))


real = prepare._write

BAD_ROWS = [
    ("{bad", "not JSON"),
    ({"message": []}, "'messages'"),
    ({"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}, "Expected message 0"),
    ("[1]", "Expected: one JSON object"),
    ('{"messages": "\\ud800"}', "surrogate"),
]


@pytest.mark.parametrize(("bad", "expected"), BAD_ROWS)
def test_a_bad_row_stops_the_work_with_its_file_its_line_and_what_is_expected(tmp_path, make, bad, expected):
    path = write_rows(tmp_path / "a.jsonl", [row(1), row(2), bad, row(4), "{worse"])
    with pytest.raises(UserError) as error:
        make(path)
    assert str(error.value).startswith(f"{path}:3: bad row: ")
    assert expected in str(error.value)
    assert 'on_bad_row = "skip"' in str(error.value)
    assert shard_names(tmp_path) == set()


def test_skipped_rows_are_counted_and_written_down_so_that_they_can_be_mended(tmp_path, make, capsys):
    given = [row(1), *(bad for bad, _ in BAD_ROWS), row(2)]
    made = make(write_rows(tmp_path / "a.jsonl", given), on_bad_row="skip")
    assert (made.ledger.rows, made.ledger.skipped, len(made)) == (7, 5, 2)
    assert made.source(1).endswith(":7")
    kept = made.directories[0] / "bad_rows.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()[1:3]] == [BAD_ROWS[1][0], BAD_ROWS[2][0]]
    reasons = [json.loads(line) for line in (kept.parent / "bad_rows.reasons.jsonl").read_text().splitlines()]
    assert [reason["line"] for reason in reasons] == [2, 3, 4, 5, 6]
    assert str(kept) in capsys.readouterr().out


def test_an_error_in_a_users_function_names_the_row(tmp_path, make):
    path = write_rows(tmp_path / "a.jsonl", [{"q": "x"}])
    with pytest.raises(UserError, match=r"a.jsonl:1: bad row: the data_format function raised KeyError: 'a'"):
        make(path, data_format=lambda given: {"messages": given["a"]})


def test_data_in_which_nothing_is_left_is_an_error_after_the_ledger(tmp_path, make, capsys):
    path = write_rows(tmp_path / "a.jsonl", [row(1, words=500)])
    with pytest.raises(UserError, match=r"No document is left of .*: 1 documents are too long: raise max_len"):
        make(path, too_long="drop")
    assert "dropped, too long" in capsys.readouterr().out
    bad = write_rows(tmp_path / "bad.jsonl", ["{"])
    with pytest.raises(UserError, match=r"No document is left of .*: 1 rows are bad: why is in the file"):
        make(bad, on_bad_row="skip")


def test_paths_that_lead_nowhere_are_named_with_a_remedy(tmp_path, make):
    write_rows(tmp_path / "train.jsonl", [row(1)])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    cases = {
        "trian.jsonl": r"no data file .*trian.jsonl. Did you mean train.jsonl",
        "nowhere/a.jsonl": "no directory .*nowhere",
        "empty.jsonl": "is empty",
        "folder": r"is a directory. Name its files",
        "*.parquet": "No file matches",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            make(tmp_path / name)
    with pytest.raises(UserError, match="more than once"):
        make([str(tmp_path / "train.jsonl"), str(tmp_path / "t*.jsonl")])
    with pytest.raises(UserError, match="empty list"):
        make([])


def test_all_wrong_settings_are_told_at_once(tmp_path, make):
    with pytest.raises(UserError) as error:
        make(tmp_path, data_format="opnai", chat_template="internlm", too_long="cut", on_bad_row="ignore", max_length=1)
    parts = ("'opnai'", "Did you mean openai", "'internlm2'", "too_long='cut'", "on_bad_row='ignore'", "max_length=1")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("late", [False, True])
def test_a_file_that_changes_after_its_digest_was_taken_is_refused(tmp_path, make, monkeypatch, late):
    path = write_rows(tmp_path / "a.jsonl", [row(1)])

    def chunks(file):
        if not late:
            write_rows(file, [row(1), row(2)])
        yield from read.read_chunks(file)
        if late:
            write_rows(file, [row(1), row(2)])

    monkeypatch.setattr(prepare, "read_chunks", chunks)
    with pytest.raises(UserError, match="changed while it was being read"):
        make(path)
    assert shard_names(tmp_path) == set()


def test_a_full_disk_is_an_error_that_leaves_no_shard(tmp_path, make, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(50)])

    def full(self, name, values):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_write", full)
        with pytest.raises(UserError, match=r"disk is full"):
            make(path)
    assert shard_names(tmp_path) == set()
    assert len(make(path)) == 50


def test_a_cache_that_may_not_be_entered_is_told_with_a_remedy(tmp_path, make, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [row(1)])
    make(path)
    read_bytes = Path.read_bytes

    def forbidden(file):
        if file.parent.name == "sources":
            raise PermissionError(13, "Permission denied", str(file))
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(UserError, match=r"Shards cannot be written to .*sources \(Permission denied\). Set cache_dir"):
        make(path)


RUN_WITH_LIMIT = """
import resource, signal, sys
from types import SimpleNamespace
from tokenizers import Tokenizer
from tuner.dataset.prepare import build_shards
from tuner.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(sys.argv[2]), name_or_path="")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    build_shards(sys.argv[1], data_format="openai", chat_template="internlm2", tokenizer=tokenizer, max_length=100,
                 cache_dir=sys.argv[3])
except UserError as error:
    print("UserError:", error)
"""


def test_a_write_that_the_system_refuses_is_caught_where_it_happens(tmp_path, tokenizer):
    """No pretended error: the kernel refuses to let any file of this process grow over 20,000 bytes."""
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(500)])
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", RUN_WITH_LIMIT, path, tmp_path / "tokenizer.json", tmp_path / "cache"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "UserError: The disk is full" in run.stdout
    assert shard_names(tmp_path) == set()


def test_preparing_imports_neither_torch_nor_transformers_nor_mmengine():
    """So that worker processes start fast, and a machine without them can prepare data."""
    code = "import sys, tuner.dataset.prepare; print({'torch', 'transformers', 'mmengine'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.gz"])
def test_other_endings_give_the_same_documents(tmp_path, make, name):
    rows = [row(n) for n in range(9)]
    text = json.dumps(rows, indent=1) if ".json" in Path(name).with_suffix("").suffixes or name == "a.json" else None
    content = (text or "\n".join(map(json.dumps, rows))).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    plain = make(write_rows(tmp_path / "plain.jsonl", rows))
    assert make(tmp_path / name).fingerprint == plain.fingerprint


def test_a_text_file_is_one_document(tmp_path, make):
    (tmp_path / "a.txt").write_text("你好\nHello\n" * 30)
    made = make(tmp_path / "a.txt", data_format="text", too_long="split")
    assert made.ledger.read.documents == 1
    assert made.ledger.pieces == len(made) > 1
    assert made.source(len(made) - 1) == f"{tmp_path / 'a.txt'}:1"


def test_a_fractional_loss_mask_weighs_as_the_loss_of_a_message_does(tmp_path, make, tokenizer):
    said = row(1)
    said["messages"][1]["loss"] = 0.25
    spoken = make(write_rows(tmp_path / "a.jsonl", [said, row(2)]))
    given = []
    for document in map(spoken.document, range(2)):
        weights = np.ones(len(document.ids)) if document.weights is None else document.weights
        given.append({"input_ids": document.ids.tolist(), "loss_mask": (weights * document.trained).tolist()})
    masked = make(write_rows(tmp_path / "ids.jsonl", given), data_format="tokens")
    assert masked.fingerprint == spoken.fingerprint
    assert masked.loss_weight.tolist() == spoken.loss_weight.tolist()
    assert masked.ledger.weight_surplus == spoken.ledger.weight_surplus < 0


@pytest.fixture
def dataset(tmp_path, make):
    rows = [row(n, n % 13) for n in range(60)]
    return PackedDataset(make(write_rows(tmp_path / "a.jsonl", rows)), max_length=100, seed=3, pad_to_multiple_of=16)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_every_label_of_the_epoch_exactly_once(dataset, num_workers):
    loader = build_dataloader(dataset, num_accumulation_steps=3, num_epochs=2, num_workers=num_workers)
    steps = list(loader)
    assert len(steps) == len(loader) == len(loader.sampler) == 2 * -(-dataset.num_packs // 3)
    for batches in steps:
        labels = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        assert {batch["num_loss_tokens"] for batch in batches} == {labels}
        assert all(batch["input_ids"].shape[1] % 16 == 0 for batch in batches)
    first_epoch = [batch for batches in steps[: len(steps) // 2] for batch in batches]
    ledger = dataset.ledger
    assert sum(batch["input_ids"].numel() for batch in first_epoch) == ledger.masked + ledger.trained + ledger.padding
    assert sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in first_epoch) == ledger.trained
    assert ledger.packs == len(first_epoch)


def test_resuming_gives_the_batches_that_would_have_come(dataset):
    whole = list(build_dataloader(dataset, num_accumulation_steps=2, num_epochs=2))
    resumed = build_dataloader(dataset, num_accumulation_steps=2, num_epochs=2)
    resumed.sampler.seek(7)
    for expected, batches in zip(whole[7:], resumed, strict=True):
        for one, other in zip(expected, batches, strict=True):
            assert one["loss_weights"] is other["loss_weights"] is None
            keys = one.keys() - {"loss_weights"}
            assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in keys)


def test_two_ranks_share_the_steps_of_one(dataset):
    one = build_dataloader(dataset, num_accumulation_steps=4)
    two = [build_dataloader(dataset, num_accumulation_steps=2, rank=rank, num_ranks=2) for rank in range(2)]
    for whole, *halves in zip(one, *two, strict=True):
        assert len(halves[0]) == len(halves[1])
        joined = sorted(batch["input_ids"].tolist() for half in halves for batch in half if batch["labels"].max() >= 0)
        assert joined == sorted(batch["input_ids"].tolist() for batch in whole)


def test_the_documents_of_a_step_can_be_asked_for(dataset):
    plan = build_dataloader(dataset, num_accumulation_steps=2).sampler.plan(1)
    named = [int(name.rsplit(":", 1)[1]) - 1 for name in dataset.document_ids(plan)]
    assert named == [document for documents in plan.packs for document in documents]


def test_without_packing_each_document_is_a_batch(dataset):
    unpacked = PackedDataset(dataset.shards, max_length=100, seed=0, pack=False)
    batches = [batch for step in build_dataloader(unpacked, num_accumulation_steps=7) for batch in step]
    assert len(batches) == len(dataset.shards)
    assert all(len(batch["cu_seqlens"]) == 2 for batch in batches)
    assert unpacked.ledger.padding == 0


def test_packs_smaller_than_the_documents_are_refused(dataset):
    with pytest.raises(UserError, match="over max_length=20"):
        PackedDataset(dataset.shards, max_length=20, seed=0)
