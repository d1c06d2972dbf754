"""Checks of all rows together, the report they go into, and schemas against values."""

import io
import json

import pytest
from lint_samples import PROSE, answer, call, function, result, talk

from tuner.dataset.json_schema import mismatches, unknown_names
from tuner.lint.findings import Finding, Report, redact
from tuner.lint.subject import NO_BOUND, Size, from_sample
from tuner.lint.together import MIN_SAME, TOGETHER, facts_of, join

FILES = ["a.jsonl", "b.jsonl"]
LONG = f"{PROSE}, and whoever follows it sees forests, fields, old towns and at last the harbour."


def found(samples: list[dict], *, sizes: list[Size | None] | None = None, chunk: int = 7) -> dict[str, list[tuple]]:
    """Check -> (row, severity, message) over rows that come in several chunks, all of the first file."""
    subjects = [from_sample(sample, size=size) for sample, size in zip(samples, sizes or [None] * len(samples))]
    starts = range(0, len(subjects), chunk)
    parts = [facts_of(subjects[at : at + chunk], list(range(at + 1, at + chunk + 1))) for at in starts]
    facts = join(parts)
    return {name: [(row, *problem) for row, problem in check(facts, FILES)] for name, check in TOGETHER.items()}


def others(number: int) -> list[dict]:
    """Rows that are all different and whole, of different lengths."""
    return [
        talk(f"What is number {n}?", f"{LONG} It is number {n}, {'very ' * (n % 30)}well known.") for n in range(number)
    ]


def test_whole_and_different_rows_are_passed():
    assert not any(found(others(60)).values())


def test_a_duplicate_names_the_row_that_came_first_whatever_its_ids_and_keys():
    twice = [
        talk("Weather?", call({"city": "Rome"}, label=label), result(LONG, label), LONG, tools=[function()])
        | {"id": label}
        for label in ("a", "b")
    ]
    rows = [*others(9), twice[0], *others(30)[9:], twice[1]]
    assert found(rows)["duplicate"] == [
        (31, "warning", "the same as line 10. Keep one of them, unless it shall weigh more.")
    ]
    other_argument = talk("Weather?", call({"city": "Oslo"}), result(LONG), LONG, tools=[function()])
    assert found([twice[0], other_argument])["duplicate"] == []


def test_short_rows_that_occur_twice_are_noted_and_many_of_them_warned_of():
    hello = talk("Hi", "Hello.")
    assert [severity for _, severity, _ in found([*others(60), hello, hello])["duplicate"]] == ["note"]
    assert {severity for _, severity, _ in found([*others(60), *[hello] * 9])["duplicate"]} == {"warning"}


def test_a_near_duplicate_differs_in_case_space_and_punctuation_only():
    rows = [
        answer("It is three to one."),
        talk("what can you  tell me", "It is THREE, to one!"),
        answer("It is three to two."),
    ]
    checked = found(rows)
    assert [(row, severity) for row, severity, _ in checked["near-duplicate"]] == [(1, "note")]
    assert checked["duplicate"] == []
    assert found([answer("3 - 4 = -1"), answer("3 + 4 = -1")])["near-duplicate"] == []
    assert found([answer("1.5"), answer("15")])["near-duplicate"] == []


def test_one_answer_to_many_questions_is_reported_once():
    asked = [talk(f"Question {n}?", LONG) for n in range(MIN_SAME)]
    [(row, severity, message)] = found([*others(20), *asked])["repeated-answer"]
    assert (row, severity) == (20, "warning")
    assert f"{MIN_SAME} different rows" in message
    assert "line 22, line 23, line 24" in message
    short = [talk(f"Question {n}?", "Yes.") for n in range(MIN_SAME)]
    assert [severity for _, severity, _ in found(short)["repeated-answer"]] == ["note"]
    assert found(asked[:-1])["repeated-answer"] == []
    assert found([*others(30), *[asked[0]] * MIN_SAME])["repeated-answer"] == []  # duplicates, and reported as such


def test_an_answer_that_just_stops_is_cut_off_where_nearly_all_others_end():
    stopped = answer(f"{PROSE} and on its way it passes")
    [(row, severity, message)] = found([*others(40), stopped])["cut-off"]
    assert (row, severity) == (40, "warning")
    assert "on its way it passes" in message
    assert found([*others(10), stopped])["cut-off"] == []  # too few to tell
    told_by_itself = answer(f"{PROSE} and on its way it passes the")
    assert found([*others(40), told_by_itself])["cut-off"] == []
    begun = answer(f"{PROSE}. However, the harbour is wher")
    assert [row for row, _, _ in found([*others(40), begun])["cut-off"]] == [40]
    signed = [
        answer(f"{PROSE}. {words}") for words in ("Best wishes, your old friend", "Yours, Maria Rossi", "Good luck")
    ]
    assert found([*others(40), *signed])["cut-off"] == []
    casual = [answer(f"{PROSE} and number {n} is what it passes") for n in range(30)]
    assert found([*others(40), *casual, stopped])["cut-off"] == []  # these people write without full stops
    assert found([*others(40), answer(f"{PROSE}.\n- towns and villages with many old houses in them")])["cut-off"] == []


def test_answers_beyond_those_whose_words_are_kept_are_found_all_the_same():
    stopped = [answer(f"{PROSE} and on its way it passes number {'x' * n}") for n in range(3)]
    facts = facts_of([from_sample(row) for row in [*others(60), *stopped]], list(range(1, 64)))
    assert len(facts.open_answers) == 3
    del facts.open_answers[1:]
    told = {row: problem.message for row, problem in TOGETHER["cut-off"](facts, FILES)}
    assert sorted(told) == [60, 61, 62]
    assert told[60].startswith("message 1, an answer, ends in ...")
    assert told[62].startswith("an answer stops without the end of a sentence")


def test_answers_of_the_same_greatest_length_without_an_end_hit_a_limit():
    limited = [answer(f"{n}{n}{n} {LONG}"[:120]) for n in range(6)]
    reported = found([*[answer(f"Number {n}.") for n in range(20)], *limited])["cut-at-limit"]
    assert [row for row, _, _ in reported] == list(range(20, 26))
    assert "120 characters" in reported[0][2]
    whole = [answer(f"{n}{n}{n} {LONG}"[:119] + ".") for n in range(6)]
    assert found(whole)["cut-at-limit"] == []
    assert found(limited[:3])["cut-at-limit"] == []
    assert found([*limited[:2], *whole[2:]])["cut-at-limit"] == []  # most of them end, so the length is no limit


def test_the_limit_may_be_one_of_tokens():
    said = [f"{'so ' * n}{PROSE}" for n in range(1, 7)]
    sizes: list[Size | None] = [Size(140, 128, 128, (128,), NO_BOUND)] * 6
    reported = found([answer(text) for text in said], sizes=sizes)["cut-at-limit"]
    assert [row for row, _, _ in reported] == list(range(6))
    assert "128 tokens" in reported[0][2]


def test_a_row_in_another_file_is_named_with_its_file():
    parts = [facts_of([from_sample(answer(LONG))], [line]) for line in (4, 9)]
    parts[1].rows["file"] = 1
    [(row, problem)] = TOGETHER["duplicate"](join(parts), FILES)
    assert row == 1
    assert "a.jsonl:4" in problem.message


def test_no_rows_are_nothing_to_compare():
    assert [list(check(join([]), FILES)) for check in TOGETHER.values()] == [[]] * len(TOGETHER)


def test_the_report_counts_all_keeps_the_worst_and_writes_every_one():
    written = io.StringIO()
    report = Report(2, written)
    for line, severity in enumerate(["note", "warning", "warning", "warning", "error"], start=1):
        report.add(Finding("a.jsonl", line, "loop", severity, f"text {line}"))
    report.add(Finding("a.jsonl", 0, "unreadable", "error", "broken"))
    lines = list(report.lines())
    assert lines[:4] == [
        "loop: 1 error, 3 warnings, 1 note",
        "  a.jsonl:5: loop: text 5",
        "  a.jsonl:2: loop: text 2",
        "  ... and 3 more",
    ]
    assert "  a.jsonl: unreadable: broken" in lines
    assert lines[-1].split() == ["all", "2", "3", "1"]
    assert [json.loads(line)["line"] for line in written.getvalue().splitlines()] == [1, 2, 3, 4, 5, 0]
    assert not report.is_clean
    notes = Report(2)
    notes.add(Finding("a.jsonl", 1, "loop", "note", "text"))
    assert notes.is_clean


def test_redaction_hides_every_piece_of_a_secret():
    assert (
        redact("the key abcdefghij, its end defghij and abc", ["abcdefghij"])
        == "the key **********, its end ******* and abc"
    )


SCHEMA = {
    "type": "object",
    "required": ["city"],
    "properties": {
        "city": {"type": "string", "minLength": 2, "pattern": "^[A-Z]"},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "tags": {"type": "array", "items": {"enum": ["sun", "rain"]}, "maxItems": 2},
        "place": {"$ref": "#/$defs/place"},
        "note": {"type": ["string", "null"]},
        "flag": {"const": True},
        "share": {"type": "float", "exclusiveMaximum": 1},
    },
    "$defs": {"place": {"type": "object", "required": ["x"], "properties": {"next": {"$ref": "#/$defs/place"}}}},
}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "'city' is required and missing"),
        ({"city": "rome"}, "must match the pattern"),
        ({"city": "R"}, "at least 2 characters"),
        ({"city": "Rome", "days": 2.5}, "'days' must be integer, got 2.5"),
        ({"city": "Rome", "days": True}, "must be integer, got true"),
        ({"city": "Rome", "days": "3"}, 'must be integer, got "3"'),
        ({"city": "Rome", "days": 9}, "at most 7"),
        ({"city": "Rome", "tags": ["sun", "fog"]}, "'tags'[1] must be one of"),
        ({"city": "Rome", "tags": ["sun", "sun", "sun"]}, "at most 2 items"),
        ({"city": "Rome", "place": {"x": 1, "next": {}}}, "'place'.next.x is required"),
        ({"city": "Rome", "note": 3}, "string or null"),
        ({"city": "Rome", "flag": 1}, "must be true, got 1"),
        ({"city": "Rome", "share": 1.0}, "less than 1"),
    ],
)
def test_a_mismatch_is_named_with_its_place(value: dict, words: str):
    [told] = mismatches(value, SCHEMA)
    assert words in told


def test_what_fits_passes():
    whole = {"city": "Rome", "days": 3.0, "tags": ["sun"], "place": {"x": 1}, "note": None, "flag": True, "share": 0.5}
    assert list(mismatches(whole, SCHEMA)) == []
    assert unknown_names(whole, SCHEMA) == []
    assert list(mismatches({"a": 1}, {"oneOf": [{"required": ["b"]}, {"required": ["a"]}]})) == []
    assert list(mismatches(3, {"type": "integer", "pattern": "("})) == []
    assert list(mismatches("x", {"pattern": "("})) == []


def test_a_schema_that_refers_to_itself_ends():
    assert list(mismatches({}, {"$ref": "#"})) == []
