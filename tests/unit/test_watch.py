"""Who is said to be lost, when, and what is said: on stores and threads of one process."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tuner.engine import watch
from tuner.engine.progress import CHECKPOINT, COMPUTE, DATA, HOOKS, SUM, Progress
from tuner.engine.tally import Own, gather_rows, tally
from tuner.engine.watch import LONG_FACTOR, Beat, Lost, Patience, Seen, Watch, find_lost
from tuner.engine.world import World
from tuner.errors import LostRankError
from tuner.failures import place_path
from tuner.launch.processes import Processes

TEN = Patience(10.0)


def seen(number: int, phase: str = COMPUTE, *, silent: float = 0.1, num_calls: int = 0, **others: Any) -> Seen:
    slow = others.pop("is_slow", phase in watch.LONG)
    return Seen(Beat(1, number, 5, phase, num_calls, slow, "", **others), silent)


def test_a_timeout_of_ten_seconds_is_kept_within_fifteen():
    assert TEN.timeout + TEN.silence + 3 * TEN.between_beats <= 15
    assert Patience(1800).of_groups > LONG_FACTOR * 1800, "a message that names nobody must not come first"


def test_nobody_is_lost_before_the_timeout():
    assert find_lost({0: seen(8), 1: seen(7, silent=9.0)}, 9.9, TEN) is None


@pytest.mark.parametrize(
    ("ranks", "lost"),
    [
        ([seen(8), seen(7, DATA)], [1]),
        ([seen(8, num_calls=3), seen(8, num_calls=2)], [1]),
        ([seen(8), seen(9, silent=4.0)], [1]),
        ([seen(8), Seen(None, 4.0), seen(7)], [1]),
        ([seen(8, CHECKPOINT), seen(8, CHECKPOINT, silent=4.0)], [1]),
        ([seen(7, DATA), seen(8), seen(7, DATA)], [0, 2]),
        ([seen(8), seen(8)], [0, 1]),
    ],
    ids=["behind", "in a call before", "silent", "never came", "silent in a checkpoint", "several", "all wait"],
)
def test_whom_the_others_wait_for(ranks: list[Seen], lost: list[int]):
    found = find_lost(dict(enumerate(ranks)), 11.0, TEN)
    assert found is not None
    assert found.ranks == lost


@pytest.mark.parametrize("phase", [CHECKPOINT, HOOKS, "start"])
def test_a_rank_that_lives_has_more_time_for_what_may_take_long(phase: str):
    ranks = {0: seen(8, phase), 1: seen(9, COMPUTE)}
    assert find_lost(ranks, 19.0, TEN) is None
    assert find_lost(ranks, 21.0, TEN) == Lost([0], "lives, but does not come to where the others wait for it")


def test_a_rank_that_has_left_is_not_waited_for():
    assert find_lost({0: seen(9, HOOKS), 1: seen(2, has_left=True, silent=300.0)}, 15.0, TEN) is None


class Ranks:
    """Two ranks' progress and watches in this process; what would end it is kept."""

    def __init__(self, folder: Path, stores: list[dist.Store], patch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        patch.setattr(watch, "end", lambda error: self.said.append(str(error)))
        patch.setattr(Patience, "silence", 0.6)
        self.progress = [Progress() for _ in stores]
        options = {"timeout": 0.5, "documents": documents, "work_dir": folder}
        self.watches = [
            Watch(World(rank, 2), self.progress[rank], store, **options) for rank, store in enumerate(stores)
        ]

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)


def documents(step: int, rank: int) -> list[str]:
    return [f"rows.jsonl:{number}" for number in range(10 * rank + 100 * step, 10 * rank + 100 * step + 9)]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = dist.HashStore()
    pair = Ranks(tmp_path, [store, store], monkeypatch)
    yield pair
    for one in pair.watches:
        one._ended.set()


def test_a_rank_that_is_stuck_is_named_with_step_phase_line_and_documents(ranks: Ranks, tmp_path: Path):
    for rank, phases in enumerate([(DATA, COMPUTE, SUM), (DATA,)]):
        ranks.progress[rank].enter(DATA, step=4)
        ranks.progress[rank].enter(DATA, step=5)
        for phase in phases[1:]:
            ranks.progress[rank].enter(phase)
    for one in ranks.watches:
        one.start()
    ranks.until(lambda: len(ranks.said) > 1)
    assert "Rank 1: lives, but does not come to where the others wait for it.\n" in ranks.said[0]
    assert "rank 1 in step 5 (data) at " in ranks.said[0]
    assert "test_watch.py:" in ranks.said[0]
    assert "Documents of step 5: rows.jsonl:410, rows.jsonl:411" in ranks.said[0]
    assert "and 1 more" in ranks.said[0]
    assert "rows.jsonl:418" in (tmp_path / "lost_rank_step_5.json").read_text()


def test_a_rank_without_a_sign_of_life_is_named(ranks: Ranks):
    ranks.progress[0].enter(DATA, step=2)
    ranks.watches[1]._beat()
    ranks.watches[0].start()
    ranks.until(lambda: ranks.said)
    assert ranks.said[0].startswith("Rank 1: gives no sign of life: stopped, out of memory")
    assert "Documents of step 2: rows.jsonl:110" in ranks.said[0]


def test_no_alarm_while_one_saves_or_samples_for_longer_than_the_timeout(ranks: Ranks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "LONG_FACTOR", 20)  # the timeout is half a second here, and the machine may be busy
    for progress in ranks.progress:
        progress.enter(DATA, step=1)
        progress.enter(HOOKS)
    for one in ranks.watches:
        one.start()
    with ranks.progress[0].during(CHECKPOINT):
        ranks.progress[1].enter(CHECKPOINT)
        ranks.progress[1].enter(HOOKS)
        ranks.progress[1].enter(DATA, step=2)
        ranks.progress[1].enter(COMPUTE)
        time.sleep(1.3)
    assert not ranks.said
    for one in ranks.watches:
        one.stop(has_left=True)
    assert '"checkpoint"' not in ranks.watches[0].store.get("beat_0").decode()


def test_a_job_that_was_suspended_has_its_time_anew(ranks: Ranks):
    one = ranks.watches[0]
    ranks.progress[0].enter(DATA, step=2)
    one._changed = {rank: (seen(8 - rank).beat, time.monotonic()) for rank in range(2)}
    time.sleep(0.7)
    assert one._find() is not None
    one._woken = time.monotonic()
    assert one._find() is None


def test_a_store_that_hangs_ends_the_wait_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    is_over = threading.Event()
    hanging = SimpleNamespace(set=lambda key, value: is_over.wait(20), check=lambda keys: False)
    pair = Ranks(tmp_path, [hanging], monkeypatch)
    pair.progress[0].enter(DATA, step=3)
    pair.watches[0].start()
    pair.until(lambda: pair.said)
    is_over.set()
    pair.watches[0]._ended.set()
    assert pair.said[0].startswith("The store of the first node, where ranks find each other, does not answer")


def test_a_killed_rank_leaves_the_place_and_documents_it_had(tmp_path: Path):
    progress = Progress()
    progress.write_to(place_path(tmp_path, 1))
    place = SimpleNamespace(first_rank=0)
    processes = Processes(place, 2, tmp_path, tmp_path)
    processes._ended = {1: 0.0}
    assert processes._obituary(1, -signal.SIGKILL).message.endswith("It was before its first step (start).")
    progress.enter(DATA, step=3)
    progress.documents = ["a.jsonl:1", "b.jsonl:2"]
    progress.enter(COMPUTE)
    words = "It was in step 3 (forward and backward) with the documents a.jsonl:1, b.jsonl:2."
    assert processes._obituary(1, -signal.SIGKILL).message.endswith(words)


def test_waiting_counts_as_idle_and_computing_does_not():
    progress = Progress()
    progress.enter(DATA, step=1)
    time.sleep(0.05)
    progress.enter(COMPUTE)
    started = time.thread_time()
    while time.thread_time() - started < 0.05:
        pass
    time.sleep(0.1)
    progress.enter(HOOKS)
    time.sleep(0.1)
    assert progress.data_seconds >= 0.05
    assert progress.take_idle_seconds() >= 0.1
    assert progress.take_idle_seconds() == 0.0


def test_a_tally_sums_counts_and_compares_ranks():
    import torch

    rows = [Own(0.5, 3, 10, 300, 0.2, 1.0, 7), Own(0.25, 3, 10, 300, 0.1, 3.0, 9, 15), Own(1.0, 1, 8, 100, 0, 2.0, 8)]
    table = [number for row in rows for number in gather_rows(row, torch.tensor(row.loss), World()).flatten().tolist()]
    one = tally(table, 1)
    assert (one.loss, one.num_loss_tokens, one.num_tokens, one.sum_squared_lengths) == (1.75, 7, 28, 700)
    assert one.imbalance == pytest.approx(900 / 700)
    assert (one.data_seconds, one.wait_seconds, one.least_wait_seconds) == (0.2, 2.0, 1.0)
    assert (one.memory_bytes, one.memory_rank) == (9, 1)
    assert (one.stop, one.stop_rank, one.nonfinite_ranks) == (15, 1, ())
    assert tally([float("nan"), *table[1:]], 1).nonfinite_ranks == (0,)
    assert tally(table[:16], 2).num_tokens == 10, "two ranks that share a sequence have its tokens once"


def test_the_error_is_told_whole_and_has_a_code_of_its_own():
    from tuner.failures import exit_code, message_of

    error = LostRankError("Rank 1: gone.\n  Documents: a")
    assert (exit_code(error), message_of(error)) == (3, "Error: Rank 1: gone.\n  Documents: a")
