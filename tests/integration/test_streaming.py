"""A streamed set: what a step sees follows from rows, settings and seed, whoever tokenises and whatever befalls it."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_samples import bytelevel, made_row

from tuner.dataset import ahead, prepare, read, sources, windows
from tuner.dataset.build import StreamedDataset, build_dataloader, build_shards, build_stream
from tuner.dataset.packing import pack
from tuner.dataset.read import read_chunks
from tuner.dataset.sampler import StepSampler
from tuner.errors import UserError

MAX_LENGTH, SEED = 400, 7
SETTINGS = {"data_format": "openai", "chat_template": "internlm2", "max_length": MAX_LENGTH}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Chunks and windows so small that a few rows fill several; files are trusted as soon as they are written."""
    monkeypatch.setattr(read, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(windows, "SMALL_BYTES", 0)
    monkeypatch.setattr(sources, "SETTLED_SECONDS", -10.0)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Three files of which the last is tiny: windows begin in one and end in another."""
    rng = random.Random(0)
    sizes = {"b.jsonl": 70, "a.jsonl.gz": 50, "c.json": 3}
    paths = []
    for name, size in sizes.items():
        lines = [json.dumps({**made_row(rng, tools=False), "id": id}, ensure_ascii=False) for id in range(size)]
        text = "[" + ",\n".join(lines) + "]" if name == "c.json" else "\n\n".join(lines) + "\n"
        content = gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    return paths


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """A StreamedDataset of so many tokenising processes, with its cache where a test says."""

    def call(paths, cache: str = "cache", num_workers: int = 1, *, packs_per_window: int = 4, **changes):
        monkeypatch.setattr(prepare, "num_cores", lambda: num_workers)
        path = [str(path) for path in paths] if isinstance(paths, list) else str(paths)
        made = build_stream(path, tokenizer=bytelevel("internlm2"), cache_dir=tmp_path / cache, **SETTINGS | changes)
        return StreamedDataset(made, max_length=MAX_LENGTH, seed=SEED, packs_per_window=packs_per_window)

    return call


def sampler(dataset, num_steps: int = 60, **changes) -> StepSampler:
    return StepSampler(dataset, num_accumulation_steps=3, max_steps=num_steps, **changes)


def seen(dataset, steps) -> list[tuple]:
    """All that training gets of these steps: the plans, and their batches to the last id and label."""
    plans = map(sampler(dataset).plan, steps)
    return [(plan, [as_values(batch) for batch in dataset[plan]], dataset.document_ids(plan)) for plan in plans]


def as_values(batch) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def made_windows(dataset) -> list[Path]:
    return sorted(path for path in dataset.shards.directory.iterdir() if path.is_dir() and ".tmp-" not in path.name)


def wait_for_windows(dataset, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(dataset.shards.epoch.windows) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def expected_packs(paths, shards, num_packs: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """(epoch, window, documents of an epoch) of each pack of the endless row, from all shards and the definition."""
    by_row = {}
    for number in range(len(shards)):
        by_row.setdefault(shards.source(number), []).append(number)
    edges, tokens, number = [0], 0, 0
    for path in paths:
        for chunk in read_chunks(path):
            own = [document for row in chunk.rows for document in by_row.pop(f"{path}:{row.line}", [])]
            tokens, number = tokens + int(shards.lengths[own].sum()), number + len(own)
            if tokens >= 4 * MAX_LENGTH:
                edges.append(number)
                tokens = 0
    edges += [len(shards)] if edges[-1] < len(shards) else []
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for epoch in range(1000):
        for window, (start, end) in enumerate(pairwise(edges)):
            packs = pack(shards.lengths[start:end], MAX_LENGTH, (SEED, epoch, window))
            found += [(epoch, window, tuple((packs[place] + start).tolist())) for place in range(len(packs))]
        if len(found) >= num_packs:
            return found[:num_packs]
    raise AssertionError


def test_steps_take_the_documents_of_build_shards_in_windows_of_the_rows_order_epoch_after_epoch(
    tmp_path, files, stream
):
    dataset = stream(files)
    shards = build_shards(
        [str(path) for path in files], tokenizer=bytelevel("internlm2"), cache_dir=tmp_path / "other", **SETTINGS
    )
    plans = list(sampler(dataset))
    expected = expected_packs(files, shards, 3 * len(plans))
    assert {epoch for epoch, *_ in expected} >= {0, 1, 2}
    assert max(window for _, window, _ in expected) >= 4
    taken = [documents for plan in plans for documents in plan.packs]
    assert taken == [tuple(len(shards) * epoch + own for own in documents) for epoch, _, documents in expected]
    assert [plan.epoch for plan in plans] == [epoch for epoch, *_ in expected[::3]]
    for index in range(2 * len(shards)):
        ours, theirs = dataset.shards.document(index), shards.document(index % len(shards))
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.trained, theirs.trained)
        assert dataset.shards.source(index) == shards.source(index % len(shards))
    for plan in plans:
        own = [index % len(shards) for documents in plan.packs for index in documents]
        assert plan.num_loss_tokens == shards.num_loss_tokens[own].sum()
        assert type(plan.num_loss_tokens) is int
    whole = sorted(index for documents in taken for index in documents if index < 2 * len(shards))
    assert whole == list(range(2 * len(shards))), "every document once in each of the first two epochs"


def test_ledger_and_contributions_count_each_window_once_that_a_step_was_planned_from(tmp_path, files, stream):
    dataset = stream(files)
    first = dataset.ledger
    assert 0 < first.kept.documents < 60
    shards = build_shards(
        [str(path) for path in files], tokenizer=bytelevel("internlm2"), cache_dir=tmp_path / "other", **SETTINGS
    )
    list(sampler(dataset))
    ledger = dataset.ledger
    assert (ledger.kept, ledger.trained, ledger.rows) == (shards.ledger.kept, shards.ledger.trained, 123)
    assert [(row["source"], row["documents"]) for row in dataset.contributions] == [
        (str(path), number) for path, number in zip(files, np.diff(shards.starts))
    ]
    assert sum(row["share"] for row in dataset.contributions) == pytest.approx(1)
    assert dataset.sizes[0].sum() == ledger.kept.tokens


def test_processes_and_restarts_do_not_show(files, stream):
    whole = seen(stream(files, "one"), range(30))
    assert seen(stream(files, "three", num_workers=3), range(30)) == whole
    for start in (1, 4, 9, 10, 25):
        assert seen(stream(files, f"from {start}"), range(start, 30)) == whole[start:], "with nothing made"
        assert seen(stream(files, "one"), range(start, 30)) == whole[start:], "with all made"
    half = stream(files, "half")
    seen(half, range(5))
    before = len(made_windows(half))
    again = stream(files, "half")
    assert seen(again, range(5, 30)) == whole[5:], "with some made"
    assert 2 <= before < len(made_windows(again))
    for ours, theirs in zip(made_windows(again), made_windows(stream(files, "one")), strict=True):
        assert {file.name: file.read_bytes() for file in ours.iterdir() if file.name != "meta.json"} == {
            file.name: file.read_bytes() for file in theirs.iterdir() if file.name != "meta.json"
        }


def test_windows_that_are_there_are_opened_and_their_rows_not_read(files, stream, monkeypatch):
    first = seen(stream(files), range(30))
    monkeypatch.setattr(windows, "read_chunks", None)
    monkeypatch.setattr(windows, "Workers", None)
    assert seen(stream(files), range(30)) == first


def test_no_more_is_made_than_a_little_ahead_of_the_step(files, stream):
    dataset = stream(files)
    plan = sampler(dataset).plan(4)
    used = 1 + max(dataset.shards.epoch.find(index, dataset.shards.epoch.documents).window for index in plan.packs[-1])
    wait_for_windows(dataset, used + ahead.NUM_AHEAD)
    time.sleep(0.3)
    assert len(made_windows(dataset)) == used + ahead.NUM_AHEAD
    assert not dataset.shards.epoch.is_complete


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_each_step_and_agree_on_its_labels(files, stream, num_ranks):
    dataset = stream(files)
    ranks = [
        StepSampler(dataset, num_accumulation_steps=3, max_steps=12, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    one = StepSampler(dataset, num_accumulation_steps=3 * num_ranks, max_steps=12)
    for step in range(12):
        plans = [rank.plan(step) for rank in ranks]
        assert all(len(plan.packs) == 3 for plan in plans)
        mixed = [plans[place % num_ranks].packs[place // num_ranks] for place in range(3 * num_ranks)]
        assert tuple(mixed) == one.plan(step).packs
        assert {plan.num_loss_tokens for plan in plans} == {one.plan(step).num_loss_tokens}
        labels = sum((np.array(batch["labels"]) >= 0).sum() for plan in plans for batch in dataset[plan])
        assert labels == plans[0].num_loss_tokens


def test_a_loader_with_processes_of_its_own_gives_the_same_batches(files, stream):
    expected = [batches for _, batches, _ in seen(stream(files, "one"), range(12))]
    loader = build_dataloader(stream(files, "two"), num_accumulation_steps=3, max_steps=12, num_workers=2)
    assert [[as_values(batch) for batch in batches] for batches in loader] == expected


def test_single_documents_where_nothing_is_packed_and_weights_where_labels_weigh(tmp_path, stream):
    rng = random.Random(1)
    rows = [made_row(rng, tools=False) for _ in range(30)]
    rows[20]["messages"][-1]["loss"] = 0.5
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = build_stream(
        str(tmp_path / "w.jsonl"), tokenizer=bytelevel("internlm2"), cache_dir=tmp_path / "cache", **SETTINGS
    )
    dataset = StreamedDataset(made, max_length=MAX_LENGTH, seed=SEED, pack=False, packs_per_window=4)
    plans = list(sampler(dataset, 20))
    assert all(len(documents) == 1 for plan in plans for documents in plan.packs)
    taken = [documents[0] for plan in plans for documents in plan.packs]
    assert sorted(index for index in taken if index < 60) == list(range(60))
    totals = {}
    for plan in plans:
        weights = [batch["loss_weights"] for batch in dataset[plan]]
        labels = [(batch["labels"] >= 0).double() for batch in dataset[plan]]
        total = sum(float((w if w is not None else ones).sum()) for w, ones in zip(weights, labels))
        assert plan.num_loss_tokens == pytest.approx(total)
        totals[type(plan.num_loss_tokens)] = total
    assert float in totals


# bad rows, files that change or break


def replaced(path: Path, number: int, line: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n\n")
    lines[number] = line
    path.write_text("\n\n".join(lines), encoding="utf-8")


def until_it_stops(steps: StepSampler) -> list:
    plans = []
    try:
        for plan in steps:
            plans.append(plan)
    except UserError:
        return plans
    raise AssertionError("nothing stopped it")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_bad_row_stops_the_first_step_that_needs_its_window_and_no_earlier_one(files, stream, num_workers):
    good = seen(stream(files, "good"), range(30))
    replaced(files[0], 40, '{"messages": 3}')
    steps = sampler(stream(files, "bad", num_workers))
    plans = until_it_stops(steps)
    assert 2 <= len(plans) < 10
    assert plans == [plan for plan, *_ in good[: len(plans)]]
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{files[0]}:81: bad row: .*\n.*on_bad_row"):
            steps.plan(len(plans))
    assert steps.plan(len(plans) - 1) == plans[-1], "what is whole can be asked for again"


def test_the_row_mended_training_goes_on_where_it_stopped(files, stream):
    line = files[0].read_text(encoding="utf-8").split("\n\n")[40]
    good = seen(stream(files, "good"), range(30))
    replaced(files[0], 40, "{" + line[1:-1])
    with pytest.raises(UserError, match=":81: bad row"):
        seen(stream(files), range(30))
    replaced(files[0], 40, line)
    assert seen(stream(files), range(30)) == good


def test_bad_rows_are_skipped_counted_and_kept_with_file_and_line(files, stream, capsys):
    replaced(files[0], 40, "{bad")
    dataset = stream(files, on_bad_row="skip")
    list(sampler(dataset, 30))
    assert (dataset.ledger.rows, dataset.ledger.skipped) == (123, 1)
    [quarantine] = [path / "bad_rows.jsonl" for path in made_windows(dataset) if (path / "bad_rows.jsonl").exists()]
    assert f"1 bad rows skipped; they are in {quarantine}" in capsys.readouterr().out
    assert quarantine.read_bytes() == b"{bad\n"
    reason = json.loads((quarantine.parent / "bad_rows.reasons.jsonl").read_text())
    assert reason["line"] == 81
    assert reason["reason"].startswith(f"{files[0]}: not JSON")


def test_a_file_that_is_cut_off_stops_where_it_is_cut_on_any_number_of_processes(files, stream):
    good = seen(stream(files, "good"), range(30))
    files[1].write_bytes(files[1].read_bytes()[:-30])
    plans = until_it_stops(sampler(stream(files, "one", 1)))
    three = sampler(stream(files, "three", 3))
    assert plans == until_it_stops(three) == [plan for plan, *_ in good[: len(plans)]]
    assert len(plans) > 5
    with pytest.raises(UserError, match="is not a whole gzip file"):
        three.plan(len(plans))


def test_an_edit_is_seen_though_its_time_is_put_back_and_costs_no_window_before_it(files, stream):
    first = seen(stream(files), range(12))
    kept = {path.name: path.stat().st_mtime_ns for path in made_windows(stream(files))}
    status = files[0].stat()
    row = json.loads(files[0].read_text(encoding="utf-8").split("\n\n")[60])
    row["messages"][-1]["content"] = row["messages"][-1]["content"][::-1]
    replaced(files[0], 60, json.dumps(row, ensure_ascii=False))
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files[0].stat().st_size == status.st_size
    edited = stream(files)
    again = seen(edited, range(12))
    assert again == seen(stream(files, "fresh"), range(12))
    same = [ours == theirs for ours, theirs in zip(first, again)]
    assert same[0]
    assert not all(same)
    untouched = [path for path in made_windows(edited) if path.stat().st_mtime_ns == kept.get(path.name)]
    assert 1 <= len(untouched) < len(kept)


def test_rows_appended_keep_the_windows_of_those_before_but_for_the_last(tmp_path, files, stream):
    text = files[0].read_text(encoding="utf-8").split("\n\n")
    number = sum(len(chunk.rows) for chunk in list(read_chunks(files[0]))[:6])
    files[0].write_text("\n\n".join(text[:number]) + "\n", encoding="utf-8")
    short = stream(files[0])
    before = seen(short, range(3))
    list(sampler(short))
    num_windows = len(made_windows(short))
    files[0].write_text("\n\n".join(text), encoding="utf-8")
    longer = stream(files[0])
    assert seen(longer, range(3)) == before
    assert seen(longer, range(30)) == seen(stream(files[0], "fresh"), range(30))
    assert len(made_windows(longer)) > num_windows


def test_a_file_that_changes_while_it_is_read_stops_training_at_the_next_window(files, stream):
    dataset = stream(files[0])
    wait_for_windows(dataset, 1 + ahead.NUM_AHEAD)
    with open(files[0], "a", encoding="utf-8") as file:
        file.write(files[0].read_text(encoding="utf-8").split("\n\n")[0] + "\n")
    with pytest.raises(UserError, match=f"{files[0]} changed while it was being read"):
        list(sampler(dataset))
    assert len(made_windows(dataset)) == 1 + ahead.NUM_AHEAD
    assert not dataset.shards.epoch.is_complete


def test_what_a_stream_cannot_do_is_refused_in_one_message(tmp_path, files, stream):
    with pytest.raises(UserError, match=r"gives .*b\.jsonl a weight.*Leave the weights out"):
        build_stream(
            [{"path": str(files[0]), "weight": 2}], tokenizer=bytelevel("internlm2"), cache_dir=tmp_path, **SETTINGS
        )
    with pytest.raises(UserError, match="Give max_steps"):
        build_dataloader(stream(files), num_accumulation_steps=3)
    made = build_stream(str(files[0]), tokenizer=bytelevel("internlm2"), cache_dir=tmp_path, **SETTINGS)
    with pytest.raises(UserError, match="max_length=99 of the packs is not the 400"):
        StreamedDataset(made, max_length=99, seed=0)
    untrained = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]}
    (tmp_path / "no.jsonl").write_text((json.dumps(untrained) + "\n") * 50, encoding="utf-8")
    with pytest.raises(UserError, match=r"No document is left of .*no\.jsonl"):
        stream(tmp_path / "no.jsonl", on_bad_row="skip")


# other processes

SCRIPT = """
import hashlib, os, sys, time
from types import SimpleNamespace
from tokenizers import Tokenizer
from tuner.dataset import prepare, read, windows
from tuner.dataset.build import StreamedDataset, build_dataloader, build_stream
from tuner.dataset.formats import FORMATS


def paced(row):
    with open(os.environ["COUNTER"], "ab") as file:
        file.write(b"x")
    time.sleep(1000 if row["id"] == int(os.environ["HANGS_AT"]) else float(os.environ["PACE"]))
    return FORMATS["openai"](row)


def main():
    data, cache, folder, num_workers = sys.argv[1:]
    prepare.num_cores = lambda: int(num_workers)
    windows.SMALL_BYTES, read.CHUNK_BYTES = 0, 2000
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(f"{folder}/tokenizer.json"), name_or_path="")
    settings = dict(data_format=paced, chat_template="internlm2", tokenizer=tokenizer, max_length=400)
    stream = build_stream(data, **settings, cache_dir=cache)
    dataset = StreamedDataset(stream, max_length=400, seed=7, packs_per_window=4)
    loader = build_dataloader(dataset, num_accumulation_steps=3, max_steps=15)
    for plan, batches in zip(loader.sampler, loader):
        ids = b"".join(batch["input_ids"].numpy().tobytes() + batch["labels"].numpy().tobytes() for batch in batches)
        print("step", plan, hashlib.sha256(ids).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def run(tmp_path, files):
    """Start the script in another process; it sleeps for `pace` seconds in each row, and for ever in one."""
    bytelevel("internlm2").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)

    def call(cache: str, pace: float = 0.0, *, hangs_at: int = -1, num_workers: int = 1) -> subprocess.Popen:
        environment = os.environ | {"COUNTER": str(tmp_path / f"{cache}.count")}
        environment |= {"PACE": str(pace), "HANGS_AT": str(hangs_at)}
        words = [str(tmp_path / "script.py"), str(files[0]), str(tmp_path / cache), str(tmp_path / "tokenizer")]
        return subprocess.Popen(
            [sys.executable, *words, str(num_workers)], env=environment, stdout=subprocess.PIPE, text=True
        )

    return call


def steps_of(process: subprocess.Popen) -> list[str]:
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0
    return [line for line in lines if line.startswith("step")]


def expected_steps(dataset) -> list[str]:
    """What the script prints, from a run in this process."""
    lines = []
    for plan in sampler(dataset, 15):
        content = b"".join(b["input_ids"].numpy().tobytes() + b["labels"].numpy().tobytes() for b in dataset[plan])
        lines.append(f"step {plan} {hashlib.sha256(content).hexdigest()}")
    return lines


def num_tokenised(tmp_path: Path, cache: str) -> int:
    return (tmp_path / f"{cache}.count").stat().st_size


@pytest.mark.slow
def test_one_is_killed_amid_a_window_and_the_other_goes_on_and_sees_the_same(tmp_path, files, stream, run):
    first = run("cut", hangs_at=40)
    while not (list(tmp_path.glob("cut/*/00000001")) and list(tmp_path.glob("cut/*/*.tmp-*"))):
        assert first.poll() is None
        time.sleep(0.01)
    second = run("cut", num_workers=2)
    while "Another run makes the windows of this stream" not in second.stdout.readline():
        assert second.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/*/0*/meta.json")}
    expected = expected_steps(stream(files[0], "own"))
    assert steps_of(second) == expected
    assert not list(tmp_path.glob("cut/*/*.tmp-*")), "what was half made is removed"
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was whole is used"
    before = num_tokenised(tmp_path, "cut")
    assert steps_of(run("cut")) == expected
    assert num_tokenised(tmp_path, "cut") == before


def test_two_runs_at_once_share_the_windows(tmp_path, files, stream, run):
    both = [run("shared", pace=0.01), run("shared", pace=0.01)]
    expected = expected_steps(stream(files[0], "own"))
    assert [steps_of(process) for process in both] == [expected, expected]
    assert 70 <= num_tokenised(tmp_path, "shared") < 140, "not each of them made all"
