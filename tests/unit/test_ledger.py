"""The ledger: whatever is cut, every token is in exactly one column."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tuner.dataset.documents import fit
from tuner.dataset.ledger import Count, Ledger


def slow_fit(documents: list[list[bool]], max_length: int, too_long: str) -> list[list[bool]]:
    """The documents that are left, by the words of the setting, one at a time."""
    left = []
    for marks in documents:
        if too_long == "truncate":
            pieces = [marks[:max_length]]
        elif too_long == "drop":
            pieces = [marks] if len(marks) <= max_length else []
        else:
            pieces = [marks[start : start + max_length] for start in range(0, len(marks), max_length)]
        left += [piece for piece in pieces if any(piece[1:])]
    return left


@pytest.mark.parametrize("too_long", ["truncate", "split", "drop"])
@pytest.mark.parametrize("seed", range(20))
def test_cuts_equal_a_slow_loop_and_the_ledger_adds_up_to_the_last_token(too_long, seed):
    rng = np.random.default_rng(seed)
    documents = [(rng.random(n) < rng.choice([0.0, 0.2, 0.9])).tolist() for n in rng.integers(0, 40, 30)]
    lengths = np.array([len(marks) for marks in documents])
    trained = np.concatenate([np.array(marks, bool) for marks in documents])
    cuts, ledger = fit(lengths, trained, 11, too_long)
    pieces = [trained[start:end].tolist() for start, end in zip(cuts.starts, cuts.ends)]
    assert pieces == slow_fit(documents, 11, too_long)
    assert cuts.num_loss_tokens.tolist() == [sum(piece[1:]) for piece in pieces]
    assert ledger.kept == Count(len(pieces), sum(map(len, pieces)))
    assert ledger.trained == sum(sum(piece[1:]) for piece in pieces)
    assert ledger.unpredicted == sum(piece[0] for piece in pieces)
    assert ledger.read == Count(30, int(lengths.sum()))
    replace(ledger, rows=30).check()


def test_each_way_to_lose_a_token_has_its_own_column():
    lengths = np.array([4, 12, 12, 3])
    trained = np.zeros(31, bool)
    trained[[2, 6, 27]] = True  # document 0: yes; 1: within the first 10; 2: only beyond the first 10; 3: none
    _, cut = fit(lengths, trained, 10, "truncate")
    assert (cut.truncated, cut.untrained, cut.trained, cut.kept) == (Count(1, 2), Count(2, 15), 2, Count(2, 14))
    _, dropped = fit(lengths, trained, 10, "drop")
    assert (dropped.dropped, dropped.untrained, dropped.trained) == (Count(2, 24), Count(1, 3), 1)
    _, split = fit(lengths, trained, 10, "split")
    assert (split.split, split.pieces, split.trained, split.unpredicted) == (2, 4, 3, 0)
    assert split.untrained == Count(3, 2 + 10 + 3)


def test_a_wrong_count_is_noticed():
    ledger = Ledger(rows=1, read=Count(1, 10), kept=Count(1, 10), masked=4, trained=6).check()
    for wrong in ({"masked": 5}, {"rows": 2}, {"read": Count(1, 11)}, {"pieces": 1}, {"truncated": Count(1, 1)}):
        with pytest.raises(AssertionError):
            replace(ledger, **wrong).check()


def test_ledgers_add_and_survive_json():
    one = Ledger(rows=2, skipped=1, read=Count(1, 10), kept=Count(1, 8), truncated=Count(1, 2), masked=3, trained=5)
    two = (one + one).check()
    assert (two.rows, two.read, two.trained) == (4, Count(2, 20), 10)
    assert Ledger.from_dict(json.loads(json.dumps(two.to_dict()))) == two


def test_weights_add_and_are_told_where_they_are_not_1():
    one = Ledger(rows=1, read=Count(1, 10), kept=Count(1, 10), masked=4, trained=6, weight_surplus=-1.5).check()
    assert (one + one).weight_surplus == -3
    assert Ledger.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert "the trained tokens weigh 4.5 in the loss" in one.table()
    assert "weigh" not in replace(one, weight_surplus=0.0).table()


def test_the_table_shows_every_column_and_the_packs():
    ledger = Ledger(
        rows=4, skipped=1, read=Count(3, 2000), dropped=Count(1, 600), truncated=Count(1, 400), kept=Count(2, 1000),
        masked=300, unpredicted=2, trained=700, packs=2, max_length=512, padding=24,
    ).check()  # fmt: skip
    table = ledger.table()
    for shown in ("2,000", "600", "400", "300", "700", "24", "30.00%", "bad and skipped 1", "2 packs of 512", "97.66%"):
        assert shown in table
