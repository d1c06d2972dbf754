"""Shards: what goes in comes out, whatever the blocks; what is not whole is not opened."""

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tuner.dataset import cache
from tuner.dataset.cache import build_once, one_at_a_time, writing
from tuner.dataset.documents import BadRow, Block
from tuner.dataset.ledger import Count, Ledger
from tuner.dataset.loss_weights import SPAN, spans_of, surplus
from tuner.dataset.read import Row
from tuner.dataset.shards import Shards, ShardWriter, is_whole
from tuner.dataset.tokenize import Document
from tuner.errors import UserError


def random_documents(number: int, vocab_size: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 30, number)
    return [Document(rng.integers(0, vocab_size, n).astype(np.uint32), rng.random(n) < 0.6) for n in sizes]


def weighted_documents(number: int, seed: int = 0) -> list[Document]:
    """Every third has no weights; of the others some tokens weigh 1, some labels 0.5 or 2, in runs and alone."""
    rng = np.random.default_rng(seed)
    documents = []
    for index, document in enumerate(random_documents(number, 1000, seed)):
        weights = rng.choice(np.array([0.5, 1, 1, 2], np.float32), len(document.ids))
        weights[0] = 1  # which is never a label
        weights = np.where(document.trained, weights, np.float32(1))
        plain = index % 3 == 0 or (weights == 1).all()
        documents.append(document if plain else document._replace(weights=weights))
    return documents


def spans_by_hand(documents: list[Document]) -> list[tuple[int, int, float]]:
    """Token by token: runs of labels with one weight that is not 1."""
    spans: list[tuple[int, int, float]] = []
    place = 0
    for document in documents:
        open_at = None
        for index in range(len(document.ids)):
            weight = 1.0 if document.weights is None else float(document.weights[index])
            if weight != 1 and open_at == weight:
                spans[-1] = (spans[-1][0], place + 1, weight)
            elif weight != 1:
                spans.append((place, place + 1, weight))
            open_at = weight
            place += 1
    return spans


def block_of(documents: list[Document], first_line: int) -> Block:
    return Block(
        np.concatenate([np.empty(0, np.uint32), *(document.ids for document in documents)]),
        np.concatenate([np.empty(0, bool), *(document.trained for document in documents)]),
        np.array([len(document.ids) for document in documents], np.int64),
        np.array([document.trained[1:].sum() for document in documents], np.int64),
        np.arange(first_line, first_line + len(documents)),
        np.array(spans_by_hand(documents), SPAN),
    )


def ledger_of(documents: list[Document]) -> Ledger:
    count = Count(len(documents), sum(len(document.ids) for document in documents))
    trained = int(sum(document.trained[1:].sum() for document in documents))
    return Ledger(rows=len(documents), read=count, kept=count, trained=trained, masked=count.tokens - trained)


def write(directory: Path, documents: list[Document], block_size: int = 7) -> Path:
    directory.mkdir()
    writer = ShardWriter(directory)
    for start in range(0, len(documents), block_size):
        writer.append(block_of(documents[start : start + block_size], start + 1), [])
    writer.close(ledger_of(documents), {})
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (92544, "uint32")])
def test_documents_come_out_as_they_went_in(tmp_path, vocab_size, dtype):
    documents = random_documents(50, vocab_size)
    shards = Shards([write(tmp_path / "a", documents)], [Path("data.jsonl")])
    assert len(shards) == 50
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["tokens_dtype"] == dtype
    for index, document in enumerate(documents):
        read = shards.document(index)
        assert (read.ids.dtype, read.trained.dtype) == (np.uint32, np.bool_)
        assert np.array_equal(read.ids, document.ids)
        assert np.array_equal(read.trained, document.trained)
    assert shards.lengths.tolist() == [len(document.ids) for document in documents]
    assert shards.num_loss_tokens.tolist() == [document.trained[1:].sum() for document in documents]
    assert shards.source(12) == "data.jsonl:13"
    assert shards.ledger == ledger_of(documents)


def test_a_shard_is_the_same_bytes_however_it_was_cut_into_blocks(tmp_path):
    """Also where an id beyond 16 bits comes late, so that a writer has to begin again in 32."""
    documents = [*random_documents(40, 60_000), Document(np.array([5, 92_000], np.uint32), np.array([False, True]))]
    one, other = write(tmp_path / "a", documents, 1), write(tmp_path / "b", documents, 1000)
    assert contents(one) == contents(other)
    assert set(contents(one)) == {
        "tokens.bin", "trained.bin", "lengths.bin", "num_loss_tokens.bin", "lines.bin", "meta.json"
    }  # fmt: skip


def test_a_token_takes_four_bytes_and_a_bit_at_most(tmp_path):
    documents = random_documents(400, 92_544)
    directory = write(tmp_path / "a", documents)
    tokens = sum(len(document.ids) for document in documents)
    assert (directory / "tokens.bin").stat().st_size == 4 * tokens
    assert (directory / "trained.bin").stat().st_size == -(-tokens // 8)


def test_weights_come_out_as_they_went_in_whatever_the_blocks(tmp_path):
    documents = weighted_documents(60)
    one, other = write(tmp_path / "a", documents, 1), write(tmp_path / "b", documents, 1000)
    assert contents(one) == contents(other)
    spans = spans_by_hand(documents)
    assert len(spans) > 50
    assert (one / "weights.bin").stat().st_size == SPAN.itemsize * len(spans)
    shards = Shards([one], [Path("x")])
    for index, document in enumerate(documents):
        weights = shards.document(index).weights
        assert (weights is None) == (document.weights is None)
        assert document.weights is None or weights.tolist() == document.weights.tolist()
        assert weights is None or weights.dtype == np.float32
    sums = [
        float((np.ones(len(d.ids)) if d.weights is None else d.weights)[1:][d.trained[1:]].sum()) for d in documents
    ]
    assert shards.loss_weight.tolist() == sums, "halves are exact"
    assert shards.num_loss_tokens.tolist() == [document.trained[1:].sum() for document in documents]


def test_a_file_with_weights_and_one_without_are_one_row_of_documents(tmp_path):
    parts = [random_documents(4, 1000), weighted_documents(5), weighted_documents(0)]
    directories = [write(tmp_path / str(n), part) for n, part in enumerate(parts)]
    assert [(directory / "weights.bin").exists() for directory in directories] == [False, True, False]
    shards = Shards(directories, [Path("x")] * 3)
    assert shards.loss_weight.tolist()[:4] == shards.num_loss_tokens.tolist()[:4]
    assert [shards.document(index).weights is None for index in range(9)] == [
        document.weights is None for part in parts for document in part
    ]
    assert Shards(directories[:1], [Path("x")]).loss_weight is None


def test_the_fingerprint_knows_weights_and_is_the_old_one_without(tmp_path):
    documents = weighted_documents(9)
    plain = [document._replace(weights=None) for document in documents]
    prints = []
    for name, part in (("a", documents), ("b", plain), ("c", documents)):
        directory = write(tmp_path / name, part)
        prints.append(Shards([directory], [Path("x")]).fingerprint)
    assert prints[0] == prints[2] != prints[1]
    assert set(json.loads((tmp_path / "b" / "meta.json").read_text())["content"]) == {"ids", "trained", "lengths"}


@pytest.mark.parametrize("seed", range(10))
def test_spans_are_the_runs_of_labels_that_do_not_weigh_1(seed):
    documents = weighted_documents(12, seed)
    weights = np.concatenate([np.ones(len(d.ids), np.float32) if d.weights is None else d.weights for d in documents])
    labels = np.concatenate([np.arange(len(d.ids)) > 0 for d in documents])
    labels &= np.concatenate([d.trained for d in documents])
    noisy = np.where(labels, weights, np.float32(7))  # what is no label weighs nothing, whatever stands there
    for given in (weights, noisy):
        assert spans_of(given, labels).tolist() == spans_by_hand(documents)
    assert surplus(spans_of(weights, labels)).sum() == (weights[labels].astype(float) - 1).sum()


def test_several_files_are_one_row_of_documents(tmp_path):
    parts = [random_documents(n, 1000, seed=n) for n in (3, 0, 5)]
    directories = [write(tmp_path / str(n), part) for n, part in enumerate(parts)]
    shards = Shards(directories, [Path(f"{n}.jsonl") for n in range(3)])
    joined = [document for part in parts for document in part]
    assert [shards.document(i).ids.tolist() for i in range(8)] == [document.ids.tolist() for document in joined]
    assert [shards.source(i) for i in (0, 2, 3, 7)] == ["0.jsonl:1", "0.jsonl:3", "2.jsonl:1", "2.jsonl:5"]
    assert shards.ledger.read.documents == 8
    for outside in (-1, 8):
        with pytest.raises(IndexError):
            shards.document(outside)


def test_the_fingerprint_is_of_the_documents_and_not_of_their_place(tmp_path):
    documents = random_documents(9, 1000)
    here, there = write(tmp_path / "a", documents, 2), write(tmp_path / "b", documents, 5)
    other = write(tmp_path / "c", [*documents[:-1], documents[0]])
    prints = [Shards([place], [Path("x")]).fingerprint for place in (here, there, other)]
    assert prints[0] == prints[1] != prints[2]


def test_shards_travel_to_another_process_as_paths(tmp_path):
    shards = Shards([write(tmp_path / "a", random_documents(2000, 1000))], [Path("x")])
    sent = pickle.dumps(shards)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).document(1999).ids, shards.document(1999).ids)


def test_bad_rows_are_kept_as_they_came_with_the_reason_beside_them(tmp_path):
    (tmp_path / "a").mkdir()
    writer = ShardWriter(tmp_path / "a")
    writer.append(block_of([], 1), [BadRow(Row(7, b'{"x": \xff}\r\n'), "not UTF-8")])
    writer.close(Ledger(rows=1, skipped=1), {})
    assert (tmp_path / "a" / "bad_rows.jsonl").read_bytes() == b'{"x": \xff}\n'
    reasons = json.loads((tmp_path / "a" / "bad_rows.reasons.jsonl").read_text())
    assert reasons == {"line": 7, "reason": "not UTF-8"}


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "lengths.bin", "lines.bin", "weights.bin", "meta.json"])
def test_a_shard_with_a_missing_or_short_file_is_not_whole(tmp_path, name):
    directory = write(tmp_path / "a", weighted_documents(9))
    assert is_whole(directory)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])
    assert not is_whole(directory)
    (directory / name).unlink()
    assert not is_whole(directory)


def touch(directory: Path) -> None:
    (directory / "x").write_text("whole")


def exists(directory: Path) -> bool:
    return (directory / "x").exists()


def test_a_disk_that_fills_up_leaves_nothing_and_says_so(tmp_path):
    def fill(directory: Path) -> None:
        touch(directory)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"disk is full.*cache_dir"):
        build_once(tmp_path / "cache" / "abc", fill, exists)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["abc.lock"]
    assert build_once(tmp_path / "cache" / "abc", touch, exists), "and the next run makes it"


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), writing(tmp_path / "file" / "cache"):
        pass


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted(directory: Path) -> None:
        touch(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "abc", interrupted, exists)
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]


def slowly(directory: Path) -> None:
    (directory / "x").write_text("ha")
    (directory.parent / "started").touch()
    time.sleep(60)


def test_what_a_killed_writer_leaves_is_never_opened_and_is_cleared_away(tmp_path):
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=build_once, args=(tmp_path / "abc", slowly, exists))
    writer.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert not (tmp_path / "abc").exists()
    assert len(list(tmp_path.glob("abc.tmp-*"))) == 1
    assert build_once(tmp_path / "another", touch, exists)
    assert not list(tmp_path.glob("*.tmp-*")), "any later build clears what no process holds"
    assert build_once(tmp_path / "abc", touch, exists)
    assert (tmp_path / "abc" / "x").read_text() == "whole"


def write_and_count(directory: Path) -> None:
    with open(directory.parent / "count", "a") as file:
        file.write("x")
    time.sleep(0.2)
    touch(directory)


def test_of_several_runs_at_once_one_writes_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=build_once, args=(tmp_path / "abc", write_and_count, exists)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 4
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "abc" / "x").read_text() == "whole"


def hold(folder: Path) -> None:
    with one_at_a_time(folder, "work") as tell:
        tell("40% is tokenised")
        (folder / "held").touch()
        time.sleep(1)
        (folder / "done").touch()


def test_who_waits_hears_how_far_the_other_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache, "SAY_SECONDS", 0.3)
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with one_at_a_time(tmp_path, "work"):
        assert (tmp_path / "done").exists()
    holder.join()
    told = capsys.readouterr().out
    assert told.startswith("Another process is preparing the same data; waiting for it")
    assert "s: 40% is tokenised\n" in told


def test_a_file_system_without_locks_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"has no locks .*Set cache_dir to another one"):
        build_once(tmp_path / "abc", touch, exists)


def test_machines_that_see_no_locks_of_each_other_do_not_disturb_each_other(tmp_path):
    (tmp_path / "xyz.tmp-another-7").mkdir()
    stale = tmp_path / "xyz.tmp-third-7"
    stale.mkdir()
    os.utime(stale, (0, 0))

    def overtaken(directory: Path) -> None:
        touch(directory)
        (directory.parent / "abc").mkdir()
        touch(directory.parent / "abc")

    assert build_once(tmp_path / "abc", overtaken, exists)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"abc", "xyz.tmp-another-7"}


def test_a_damaged_directory_is_made_again(tmp_path, capsys):
    (tmp_path / "abc").mkdir()
    assert build_once(tmp_path / "abc", touch, exists)
    assert "damaged" in capsys.readouterr().out
    assert not build_once(tmp_path / "abc", touch, exists)
