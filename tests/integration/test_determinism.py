"""The same inputs give the same shards and the same order, whoever works on them and whatever befalls the work."""

import glob
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_samples import bytelevel, made_row

from tuner.dataset import prepare, read, sources
from tuner.dataset.build import PackedDataset, build_dataloader, build_shards
from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.fingerprint import callable_digest
from tuner.dataset.formats import FORMATS
from tuner.dataset.tokenize import Encoder

TEMPLATE = CHAT_TEMPLATES["internlm2"]
NUM_ROWS = 120
SCRIPT = """
import hashlib, os, sys, time
from types import SimpleNamespace
from tokenizers import Tokenizer
from tuner.dataset import prepare, read
from tuner.dataset.fingerprint import callable_digest
from tuner.dataset.formats import FORMATS
from tuner.dataset.packing import pack


def paced(row):
    with open(os.environ["COUNTER"], "ab") as file:
        file.write(b"x")
    time.sleep(float(os.environ["PACE"]))
    return FORMATS["openai"](row)


def main():
    data, cache, folder, num_workers = sys.argv[1:]
    prepare.num_cores = lambda: int(num_workers)
    prepare.SMALL_BYTES, read.CHUNK_BYTES = 0, 1000
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(f"{folder}/tokenizer.json"), name_or_path="")
    settings = dict(data_format=paced, chat_template="internlm2", tokenizer=tokenizer, max_length=1000)
    shards = prepare.build_shards(data, **settings, cache_dir=cache)
    packs = pack(shards.lengths, 1000, (5, 1))
    print(shards.fingerprint, hashlib.sha256(packs.documents.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def rows() -> list[dict]:
    rng = random.Random(0)
    return [made_row(rng, tools=True, interpreter=True) for _ in range(NUM_ROWS)]


@pytest.fixture
def data(tmp_path: Path, rows: list[dict]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`build_shards` on so many processes, into a cache of its own."""
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(sources, "SETTLED_SECONDS", -10.0)

    def call(path: Path | str, cache: str, num_workers: int = 1, **changes):
        monkeypatch.setattr(prepare, "num_cores", lambda: num_workers)
        settings = {"data_format": "openai", "chat_template": "internlm2", "max_length": 1000} | changes
        return build_shards(str(path), tokenizer=bytelevel("internlm2"), cache_dir=tmp_path / cache, **settings)

    return call


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    "too_long", ["truncate", *(pytest.param(way, marks=pytest.mark.slow) for way in ("split", "drop"))]
)
def test_neither_chunks_nor_processes_show_in_the_bytes_and_no_token_is_lost(data, rows, make, monkeypatch, too_long):
    made = {}
    for name, num_workers, chunk_bytes in (("whole", 1, 1 << 30), ("each", 1, 1), ("several", 2, 1500)):
        monkeypatch.setattr(read, "CHUNK_BYTES", chunk_bytes)
        made[name] = make(data, name, num_workers, too_long=too_long, max_length=300)
    first, *others = [contents(shards.directories[0]) for shards in made.values()]
    assert all(other == first for other in others)
    documents = Encoder.from_tokenizer(bytelevel("internlm2"), TEMPLATE).encode(
        [render(FORMATS["openai"](row), TEMPLATE) for row in rows]
    )
    ledger = made["several"].ledger
    assert ledger.read == (NUM_ROWS, sum(len(document.ids) for document in documents))
    lost = ledger.dropped.tokens + ledger.untrained.tokens + ledger.truncated.tokens
    assert ledger.kept.tokens == ledger.read.tokens - lost == made["several"].lengths.sum()
    if too_long == "split":
        assert ledger.kept.tokens + ledger.untrained.tokens == ledger.read.tokens


@pytest.mark.slow
def test_sixteen_processes_write_what_one_writes(data, make, monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", 500)
    one, sixteen = (make(data, str(number), number) for number in (1, 16))
    assert contents(one.directories[0]) == contents(sixteen.directories[0])


def test_the_order_in_which_a_directory_lists_its_files_does_not_show(tmp_path, rows, make, monkeypatch):
    for number, name in enumerate(["b", "é", "a10", "a9", "C"]):
        part = rows[number * 10 : number * 10 + 10]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    listed = glob.glob
    orders = {
        "as it is": list,
        "reversed": lambda names: names[::-1],
        "by length": lambda names: sorted(names, key=len),
    }
    made = []
    for name, order in orders.items():
        monkeypatch.setattr(glob, "glob", lambda *args, order=order, **options: order(sorted(listed(*args, **options))))
        made.append(make(tmp_path / "*.jsonl", name))
    assert len(made[0]) == 50
    assert made[0].fingerprint == made[1].fingerprint == made[2].fingerprint
    assert [made[1].source(n) for n in range(50)] == [made[0].source(n) for n in range(50)]


def test_the_order_of_an_epoch_depends_on_the_seed_alone(data, make):
    shards = make(data, "one")

    def order(shards, seed: int, step: int = 3) -> list:
        dataset = PackedDataset(shards, max_length=1000, seed=seed)
        loader = build_dataloader(dataset, num_accumulation_steps=2, num_epochs=9, rank=1, num_ranks=2)
        plans = [loader.sampler.plan(each) for each in (step, step + loader.sampler.steps_per_epoch)]
        return [sorted(dataset.document_ids(plan)) for plan in plans]

    first = order(shards, seed=1)
    np.random.seed(7)
    torch.manual_seed(7)
    random.seed(7)
    assert order(make(data, "other"), seed=1) == first, "neither the cache nor other generators matter"
    assert first[0] != first[1], "nor is one epoch like another"
    assert order(shards, seed=2) != first


class Run:
    """A process that prepares `data`; `pace` seconds pass over each row, which is counted."""

    def __init__(self, data: Path, cache: str, *, pace: float = 0.0, num_workers: int = 2, hash_seed: int = 0) -> None:
        folder = data.parent
        bytelevel("internlm2").backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "script.py").write_text(SCRIPT)
        self.cache, self._counter = folder / cache, folder / f"{cache}.count"
        self._counter.touch()
        environment = {**os.environ, "COUNTER": str(self._counter), "PACE": str(pace), "PYTHONHASHSEED": str(hash_seed)}
        command = [sys.executable, folder / "script.py", data, self.cache, folder, str(num_workers)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def num_rows(self) -> int:
        """Rows that have been read so far, by all runs with this cache."""
        return self._counter.stat().st_size

    def wait_for_rows(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while self.num_rows() < number:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> str:
        """What it printed last; fails if it failed."""
        output, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return output.splitlines()[-1]

    def stop(self, *, kill: bool) -> None:
        """Kill this process alone, or press Ctrl-C, which all of its group get."""
        if kill:
            self.process.kill()
        else:
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.communicate(timeout=60)
        assert self.process.returncode != 0
        deadline = time.monotonic() + 30
        while group_lives(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not group_lives(self.process.pid), "a worker was left behind"

    def names(self) -> list[str]:
        """Directories in the cache, in which shards are or might be mistaken to be."""
        return sorted(entry.name for entry in self.cache.iterdir() if entry.is_dir() and entry.name != "sources")


def group_lives(group: int) -> bool:
    """Whether a process of the group runs; those that wait to be reaped by nobody do not."""
    for status in glob.glob("/proc/[0-9]*/stat"):
        try:
            state, _, its_group = Path(status).read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def digest_of(cache: Path) -> str:
    """All bytes of all shards of a cache."""
    files = sorted(file for file in cache.glob("*/*") if file.parent.name != "sources")
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("kill", [True, False], ids=["kill -9", "Ctrl-C"])
def test_what_was_being_written_is_never_used(data: Path, kill: bool):
    stopped = Run(data, "cache", pace=0.05)
    stopped.wait_for_rows(20)
    stopped.stop(kill=kill)
    left = stopped.names()
    assert [name for name in left if ".tmp-" not in name] == []
    assert len(left) == (1 if kill else 0), "only a killed process leaves anything"
    again, clean = Run(data, "cache"), Run(data, "clean")
    assert again.end() == clean.end()
    assert digest_of(again.cache) == digest_of(clean.cache)
    assert len(again.names()) == 1, "and what was left is cleared away"


def test_two_runs_at_once_share_one_result_and_hashes_do_not_matter(data: Path):
    one = Run(data, "cache", pace=0.02, hash_seed=1)
    one.wait_for_rows(1)
    other = Run(data, "cache", pace=0.02, hash_seed=2)
    printed = one.end()
    assert other.end() == printed
    assert other.num_rows() == NUM_ROWS, "each row was read once, by one of the two"
    assert len(one.names()) == 1
    assert Run(data, "alone", hash_seed=3, num_workers=1).end() == printed


HANDLERS = """
import json
def first(row):
    return row["a"]
def second(row):
    return WORDS
WORDS = {"x", "y"}
TABLE = {"a": [first, (second,)], "b": json.loads, 3: {None: 1.5}}
def to_sample(row):
    return TABLE["a"][0](row)
"""


def test_what_a_users_function_finds_in_tables_belongs_to_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Functions are known by name and text there, not by where they happen to lie in memory."""
    monkeypatch.syspath_prepend(tmp_path)
    changed = {"same": ("", ""), "inner": ('row["a"]', 'row["b"]'), "deep": ('"y"', '"z"'), "number": ("1.5", "2.5")}
    digests = []
    for name, (old, new) in {"base": ("", ""), **changed}.items():
        (tmp_path / f"handlers_{name}.py").write_text(HANDLERS.replace(old, new) if old else HANDLERS)
        digests.append(callable_digest(__import__(f"handlers_{name}").to_sample))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
