"""The text of `make demo-long`: whom it asks about, and that what it asks can be answered."""

import json
import random
import re
from collections import Counter

import pytest

from tuner.demo import lockers
from tuner.model.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The tokenizer, and the files that are made with it."""
    directory = tmp_path_factory.mktemp("lockers")
    lockers.write_model(directory / "model")
    tokenizer = build_tokenizer(str(directory / "model"))

    def write(folder, seed):
        folder.mkdir(exist_ok=True)
        texts = lockers.Writer(lambda text: tokenizer.encode(text, add_special_tokens=False), seed)
        texts.write_copies(folder / "copies.jsonl", 20_000)
        texts.write_short(folder / "short.jsonl", 50_000)
        texts.write_long(folder / "long.jsonl", 20_480, 4096)
        lockers.write_needles(folder / "needles.jsonl", seed)
        lockers.write_haystack(folder / "haystack.txt", 4096, seed)
        return folder

    return tokenizer, write(directory / "first", 0), write(directory / "again", 0), write(directory / "other", 1)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(text):
    """(name, number, whether it is a question) of all that speaks of a locker, in order."""
    found = re.findall(r"(Again: t|T)he locker of (\w\w \w\w) (\d\d \d\d)\n", text)
    return [(name, number, opening != "T") for opening, name, number in found]


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(written):
    _, first, again, other = written
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
        assert path.read_bytes() != (other / path.name).read_bytes()


def test_nobody_who_is_asked_about_was_ever_seen_in_training(written):
    tokenizer, first, *_ = written
    held_out = {person.name.strip() for person in lockers.people(True)}
    needles = rows(first / "needles.jsonl")
    assert {name for row in needles for name, _, _ in asked(row["needle"])} == held_out
    assert len(held_out) == len(needles) == 320
    met = Counter(
        name
        for path in ("short.jsonl", "long.jsonl")
        for row in rows(first / path)
        for name, *_ in asked(tokenizer.decode(row["input_ids"]))
    )
    assert sum(met.values()) > 500
    assert not held_out & set(met)
    halves = [{name.split()[place] for name in met} for place in (0, 1)]
    assert all({name.split()[place] for name in held_out} <= half for place, half in enumerate(halves))
    assert lockers.STATEMENT not in (first / "haystack.txt").read_text(encoding="utf-8")


def test_every_question_has_one_answer_that_stands_before_it_and_alone_is_trained(written):
    tokenizer, first, *_ = written
    for path, length in (("short.jsonl", None), ("long.jsonl", 4096)):
        for row in rows(first / path):
            ids, mask = row["input_ids"], row["loss_mask"]
            assert len(ids) == len(mask) == (length or len(ids))
            numbers, lines = {}, asked(tokenizer.decode(ids))
            for name, number, is_question in lines:
                assert is_question == (name in numbers)  # stated once, before all that is asked
                assert numbers.setdefault(name, number) == number
            trained = [token for token, is_trained in zip(ids, mask) if is_trained]
            answers = [number for _, number, is_question in lines if is_question]
            assert tokenizer.decode(trained).split() == " ".join(answers).split()


def test_copies_are_trained_where_they_can_be_known(written):
    _, first, *_ = written
    for row in rows(first / "copies.jsonl"):
        ids, start = row["input_ids"], row["loss_mask"].index(1)
        assert len(ids) == lockers.COPY_LENGTH
        assert row["loss_mask"] == [0] * start + [1] * (len(ids) - start)
        assert ids[start:] == ids[1 : len(ids) - start + 1] or ids[start:] == (ids[1:start] * 4)[: len(ids) - start]


def test_every_piece_is_a_token_wherever_it_stands(written):
    tokenizer, *_ = written
    rng = random.Random(0)
    for fact in lockers.facts(300, True, rng):
        parts = [lockers.STATEMENT, *fact.person.name.replace(" ", "| ").split("|")[1:]]
        parts += [*fact.answer.replace(" ", "| ").split("|")[1:], lockers.END, *lockers.sentence(rng)]
        ids = tokenizer.encode("".join(parts), add_special_tokens=False)
        assert [tokenizer.decode([token]) for token in ids] == parts
