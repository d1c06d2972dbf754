"""Checks of all rows together, on a few numbers and hashes of each: no text is kept."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.lint.answers import broken_off, ending
from tuner.lint.findings import Problem, excerpt, note, warning
from tuner.lint.subject import Subject, called_words

ROW = np.dtype([("file", "<u4"), ("line", "<u8"), ("exact", "<u8"), ("near", "<u8"), ("size", "<u4")])
ANSWER = np.dtype([("row", "<u4"), ("hash", "<u8"), ("size", "<u4"), ("tokens", "<i4"), ("ending", "u1")])
ENDINGS = ("sentence", "open", "other", "broken")  # broken: open, and reported with its own row
MAX_OPEN_KEPT = 100_000  # open answers whose place and last words are remembered, some 20 MB
SHORT_ROW, SHORT_ANSWER = 200, 100  # characters: shorter ones occur twice by chance
MAX_SHORT, MAX_SHORT_SHARE = 4, 0.05  # rows that are short and duplicates: more of them are no chance
MIN_SENTENCE_SHARE = 0.95  # so at least 19 others
MIN_SAME, MIN_SAME_SHARE = 10, 0.01
MIN_PILE, MIN_PILE_SIZE = 5, 64
WORD = re.compile(r"[^\W_]+|[^\w\s.,!?;:'\"“”‘’…。，！？；：、]")


class Open(NamedTuple):
    """An answer of prose that just stops: which one of its row, and its last words."""

    where: str
    tail: str


@dataclass
class Facts:
    """What is remembered of rows: arrays of ROW and ANSWER, whose `row` counts from the first one, and open answers."""

    rows: NDArray[Any] = field(default_factory=lambda: np.empty(0, ROW))
    answers: NDArray[Any] = field(default_factory=lambda: np.empty(0, ANSWER))
    open_answers: list[Open] = field(default_factory=list)
    """of the answers whose ending is "open", in their order; the last ones may be missing"""


def facts_of(subjects: list[Subject], lines: list[int]) -> Facts:
    """The facts of a chunk of rows, as if it were of file 0."""
    rows = np.empty(len(subjects), ROW)
    answers: list[tuple[int, int, int, int, int]] = []
    open_answers = []
    for place, subject in enumerate(subjects):
        size = sum(len(text.content) for text in subject.texts)
        rows[place] = (0, lines[place], digest(exact_form(subject)), digest(near_form(subject)), size)
        said = list(subject.answers)
        tokens = subject.size.answer_tokens if subject.size else ()
        counted = tokens if len(tokens) == len(said) else (-1,) * len(said)
        for answer, count in zip(said, counted):
            how = ending(answer.content)
            code = ENDINGS.index("broken" if how == "open" and broken_off(answer.content) else how)
            answers.append((place, digest(answer.content.strip()), len(answer.content), count, code))
            if ENDINGS[code] == "open":
                text = answer.content.rstrip()
                open_answers.append(Open(answer.where, excerpt(text, max(0, len(text) - 40))))
    return Facts(rows, np.array(answers, ANSWER), open_answers)


def join(parts: list[Facts]) -> Facts:
    """The facts of all chunks as one."""
    if not parts:
        return Facts()
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    answers = [part.answers.copy() for part in parts]
    for start, own in zip(starts, answers):
        own["row"] += np.uint32(start)
    open_answers = [kept for part in parts for kept in part.open_answers]
    return Facts(np.concatenate([part.rows for part in parts]), np.concatenate(answers), open_answers)


def exact_form(subject: Subject) -> str:
    """All of a row that is trained on: ids of calls, and what the format leaves out, do not matter."""
    if not subject.messages:
        return (subject.document or subject.raw) + subject.rest
    turns = [(m["role"], m["content"], m.get("name"), list(called_words(m)), _names(m)) for m in subject.messages]
    return json.dumps([turns, subject.tools, subject.rest], sort_keys=True, default=str)


def near_form(subject: Subject) -> str:
    """The words of a row in one case and width, without punctuation between them."""
    words = "\n".join(text.content for text in subject.texts) + subject.rest or subject.raw
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", words).casefold()))


def _names(message: dict[str, Any]) -> list[str]:
    return [str(call.get("function", {}).get("name")) for call in message.get("tool_calls") or []]


def digest(words: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest(), "little")


Located = Iterator[tuple[int, Problem]]  # number of the row, problem


def duplicates(facts: Facts, files: list[str]) -> Located:
    """Rows that are trained on more than once."""
    first, later = repeats(facts.rows["exact"])
    short = facts.rows["size"] < SHORT_ROW
    many_short = short[later].sum() > max(MAX_SHORT, MAX_SHORT_SHARE * len(short))
    for row, original in zip(later.tolist(), first.tolist()):
        told = f"the same as {place(facts, files, original, row)}. Keep one of them, unless it shall weigh more."
        yield row, note(told) if short[row] and not many_short else warning(told)


def near_duplicates(facts: Facts, files: list[str]) -> Located:
    """Rows that differ from an earlier one in case, spaces or punctuation only."""
    first, later = repeats(facts.rows["near"])
    is_new = ~np.isin(later, repeats(facts.rows["exact"])[1])
    for row, original in zip(later[is_new].tolist(), first[is_new].tolist()):
        yield row, note(f"the same as {place(facts, files, original, row)} but for case, spaces or punctuation.")


def repeats(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, later): for each row whose hash occurred before, in order, the row where it occurred first."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[group]
    later = np.flatnonzero(original != np.arange(len(hashes)))
    return original[later], later


def repeated_answers(facts: Facts, files: list[str]) -> Located:
    """One answer in many rows, reported where it stands first."""
    answers = facts.answers
    enough = max(MIN_SAME, MIN_SAME_SHARE * len(answers))  # at most a hundred answers are that common
    hashes, first, counts = np.unique(answers["hash"], return_index=True, return_counts=True)
    common = np.flatnonzero(counts >= enough)
    for group in common[np.argsort(-counts[common], kind="stable")].tolist():
        owners = answers["row"][answers["hash"] == hashes[group]]
        number = len(np.unique(facts.rows["exact"][owners]))  # duplicates of whole rows are reported as such
        if number < enough:
            continue
        lines = ", ".join(place(facts, files, row, int(owners[0])) for row in owners[1:4].tolist())
        share = number / len(answers)
        told = f"its answer is that of {number:,} different rows ({share:.1%} of all answers), among them {lines}."
        is_short = answers["size"][first[group]] < SHORT_ANSWER
        yield (
            int(owners[0]),
            note(told) if is_short else warning(f"{told} Thin them out: the model would learn it by heart."),
        )


def cut_off_among_whole(facts: Facts, files: list[str]) -> Located:
    """Answers that just stop, in a file whose answers end with the end of a sentence otherwise."""
    file_of = facts.rows["file"][facts.answers["row"]]
    prose = facts.answers["ending"] != ENDINGS.index("other")
    whole = facts.answers["ending"] == ENDINGS.index("sentence")
    num_prose, num_whole = (np.bincount(file_of[chosen], minlength=len(files)) for chosen in (prose, whole))
    endless = facts.answers["row"][facts.answers["ending"] == ENDINGS.index("open")]
    for number, row in enumerate(endless.tolist()):
        share = num_whole[facts.rows["file"][row]] / num_prose[facts.rows["file"][row]]
        if share < MIN_SENTENCE_SHARE:
            continue
        told = "an answer stops"
        if number < len(facts.open_answers):
            where, tail = facts.open_answers[number]
            told = f"{where}, an answer, ends in {tail}"
        yield (
            row,
            warning(
                f"{told} without the end of a sentence, as {share:.1%} of the file's answers have."
                " Complete it or drop the row."
            ),
        )


def cut_at_limit(facts: Facts, files: list[str]) -> Located:
    """Answers that all have the same greatest length, and no end: whoever wrote them was stopped there."""
    for unit, name in (("tokens", "tokens"), ("size", "characters")):
        sizes = facts.answers[unit]
        longest = int(sizes.max(initial=0))
        at_limit = np.flatnonzero(sizes == longest)
        endless = facts.answers["ending"][at_limit] != ENDINGS.index("sentence")
        distinct = len(np.unique(facts.answers["hash"][at_limit]))
        if longest < MIN_PILE_SIZE or distinct < MIN_PILE or endless.mean() < 0.5:
            continue
        for row in facts.answers["row"][at_limit[endless]].tolist():
            yield (
                row,
                warning(
                    f"its answer has {longest:,} {name}, the most of all and as many as {len(at_limit) - 1:,} others,"
                    " and no end: it was probably cut off there. Generate it anew with more room, or drop the row."
                ),
            )


def place(facts: Facts, files: list[str], row: int, beside: int) -> str:
    """Where a row is, as told in a message about another one: its line, with its file where that is another."""
    file, line = facts.rows["file"][row], facts.rows["line"][row]
    return f"line {line}" if file == facts.rows["file"][beside] else f"{files[file]}:{line}"


TOGETHER: dict[str, Callable[[Facts, list[str]], Located]] = {
    "duplicate": duplicates,
    "near-duplicate": near_duplicates,
    "repeated-answer": repeated_answers,
    "cut-off": cut_off_among_whole,
    "cut-at-limit": cut_at_limit,
}
