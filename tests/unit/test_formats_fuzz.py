"""Rows with anything in any place: each is read, or refused in one line; nothing else is ever raised."""

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.formats import EXAMPLES, FORMATS
from tuner.dataset.formats.detection import detect
from tuner.dataset.messages import PARALLEL_TOOL_CALLS
from tuner.errors import UserError

TEMPLATE = CHAT_TEMPLATES["internlm2"]
DEEP = "[" * 5_000 + "]" * 5_000
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 7, -1, 1.5, float("nan"), float("inf"), 10**400),
    *(
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "{}",
        "[]",
        "[1]",
        '{"name": 3}',
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        DEEP,
        "x" * 10_000,
    ),
    *([], [[]], [[[]]], [None], [0], [{}], {}, {"": None}, {"name": []}, {"role": "tool"}, {1: 2}),
)
Path = tuple[Any, ...]


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in a row, from the row itself down."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def put(row: Any, path: Path, odd: Any) -> Any:
    """A copy of the row with something else in one place."""
    if not path:
        return odd
    changed = copy.deepcopy(row)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = odd
    return changed


def without(row: Any, path: Path) -> Any:
    """A copy of the row that lacks one place."""
    changed = copy.deepcopy(row)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return changed


def convert(name: str, row: Any) -> dict[str, Any] | None:
    """The sample of a row, None where the row is refused."""
    try:
        return FORMATS[name](row)
    except UserError:
        return None


def complaint(name: str, row: Any) -> str:
    """What is said of a row that is read, rendered and has its calls arranged; nothing where all goes well."""
    try:
        sample = FORMATS[name](row)
        for part in (sample["chosen"], sample["rejected"]) if "chosen" in sample else (sample,):
            if "ids" in part:
                continue
            render(part, TEMPLATE)
            for arrange in PARALLEL_TOOL_CALLS.values():
                arrange(part.get("messages", []))
    except UserError as error:
        return str(error)
    return ""


def detection(row: Any) -> str:
    """The format that a row shows, or what is said where it shows none."""
    try:
        return detect([row]).name
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", FORMATS)
def test_anything_in_any_place_is_read_or_refused(name: str):
    example = dict(EXAMPLES[name])
    refused = 0
    assert complaint(name, example) == ""
    for path in places(example):
        rows = [put(example, path, odd) for odd in ODD if path or isinstance(odd, dict)]
        for row in rows + ([without(example, path)] if path else []):
            said = complaint(name, row)
            assert said == "" or ("\n" not in said and 10 < len(said) < 700)
            refused += said != ""
    assert refused > 10


@pytest.mark.parametrize("name", FORMATS)
def test_detection_never_fails_but_in_one_line(name: str):
    example = dict(EXAMPLES[name])
    for path in places(example):
        for odd in ODD:
            said = detection(put(example, path, odd))
            assert said in FORMATS or ("\n" not in said and "data_format" in said)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_one_format_is_refused_by_others_or_says_the_same_in_them(name: str):
    """No format takes another's row for what it is not, but sharegpt, to which ReAct's steps are plain words."""
    taken = {other: sample for other in FORMATS if (sample := convert(other, EXAMPLES[name])) is not None}
    different = {other for other in taken if json.dumps(taken[other]) != json.dumps(taken[name])}
    assert different == ({"sharegpt"} if name == "msagent" else set())


BLANKS, SIZE = " " * 300_000, 20_000
HOSTILE = {
    "blanks in a step": ("msagent", f"Action: f\nAction Input: {BLANKS}x"),
    "blanks behind a step": ("msagent", f"Action: f{BLANKS}\n\nAction Input:{BLANKS}\nObservation:{BLANKS}x{BLANKS}"),
    "lines of blanks": ("msagent", "\n" * 300_000),
    "actions without an input": ("msagent", "Action: f\n" * SIZE),
    "observations": ("msagent", "Action: f\nAction Input: {}\n" + "Observation: x\n" * SIZE),
    "steps": ("msagent", "Action: f\nAction Input: {}\nObservation: x\n" * SIZE),
    "thoughts begun": ("msagent", "<|startofthink|>" * SIZE),
    "thoughts": ("msagent", '<|startofthink|>{"api_name": "f"}<|endofthink|><|startofexec|>x<|endofexec|>' * SIZE),
    "a fence of blanks": ("msagent", f"<|startofthink|>```{BLANKS}<|endofthink|>"),
    "actions begun": ("ftdp", "<|action_start|><|plugin|>" * SIZE),
    "actions ended, then begun": ("ftdp", "<|action_end|>" * SIZE + "<|action_start|><|plugin|>" * SIZE),
    "marks without a kind": ("ftdp", "<|action_start|>" * SIZE + "<|action_end|>"),
    "fences": ("interpreter", "```python\nx\n" * SIZE),
    "fences closed": ("interpreter", "```python\nx\n```\n" * SIZE + BLANKS + "x"),
    "blanks in a fence": ("interpreter", f"```python\n{BLANKS}\n```{BLANKS}x"),
    "blanks before a fence": ("interpreter", f"{BLANKS}```python\n1\n```"),
    "humans": ("preference", "\n\nHuman: a" * SIZE),
    "blank lines": ("preference", "\n" * 300_000),
}


def hostile_row(name: str, text: str) -> dict[str, Any]:
    """A row with the text wherever the format looks for patterns."""
    if name == "preference":
        return {"chosen": text, "rejected": text + "x"}
    if name == "msagent":
        apis = f"1. f: d Parameters: []\n1. g:{text[:1000]}\n{BLANKS}1. h:{BLANKS}\n" + "1. {" * 1000
        spoken = (("system", apis if text.startswith("Action: f\nA") else text), ("user", "a"), ("assistant", text))
        return {"conversations": [{"from": speaker, "value": words} for speaker, words in spoken]}
    said = {"role": "assistant", "content": text}
    return {"messages": [{"role": "user", "content": "a"}, said, {"role": "environment", "content": "x"}]}


@pytest.mark.parametrize("case", HOSTILE)
def test_no_text_makes_a_reader_slow(case: str):
    name, text = HOSTILE[case]
    row = hostile_row(name, text)
    start = time.process_time()
    detection(row)
    convert(name, row)
    assert time.process_time() - start < 5  # seconds; a pattern that goes back over it would take hours
