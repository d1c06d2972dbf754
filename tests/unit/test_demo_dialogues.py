"""The demo's dialogues are true, varied, the same for a seed, and nothing held out is ever trained on."""

import ast
import json
import operator
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest

from tuner.dataset.formats import FORMATS
from tuner.demo import exchanges, world
from tuner.demo.dialogues import LANGUAGES, dialogues, split_of
from tuner.demo.files import NUM_HELDOUT, NUM_TRAIN, SEED
from tuner.demo.plain_text import paragraphs

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return dialogues(NUM_TRAIN, "train", SEED)


@pytest.fixture(scope="module")
def heldout() -> list[dict]:
    return dialogues(NUM_HELDOUT, "heldout", SEED)


def user_requests(rows: list[dict]) -> set[str]:
    """Requests without the little words before them, which mean nothing."""
    openers = sorted({opener for wording in LANGUAGES for opener in wording.openers if opener}, key=len, reverse=True)
    found = set()
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "user":
                used = next((opener for opener in openers if message["content"].startswith(opener)), "")
                found.add(message["content"].removeprefix(used))
    return found


def calls_with_results(rows: list[dict]) -> list[tuple[dict, str, str, str]]:
    """(call, result, request, answer) of every call."""
    found = []
    for row in rows:
        for place, message in enumerate(row["messages"]):
            for call in message.get("tool_calls", ()):
                request, result, answer = (row["messages"][place + step]["content"] for step in (-1, 1, 2))
                found.append((call, result, request, answer))
    return found


def named_calls(rows: list[dict], name: str) -> list[tuple[dict, str, str, str]]:
    return [
        (json.loads(call["function"]["arguments"]), *rest)
        for call, *rest in calls_with_results(rows)
        if call.get("function", {}).get("name") == name
    ]


def value(node: ast.expr) -> Fraction:
    """An expression's value in exact arithmetic, independent of the generator."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    return OPERATORS[type(node.op)](value(node.left), value(node.right))


def test_no_heldout_request_and_no_heldout_call_occurs_in_training(train: list[dict], heldout: list[dict]) -> None:
    assert not user_requests(train) & user_requests(heldout)
    contents = [
        {json.dumps(call.get("function") or call["code_interpreter"]) for call, *_ in calls_with_results(rows)}
        for rows in (train, heldout)
    ]
    assert contents[1]
    assert not contents[0] & contents[1]


def test_pretraining_text_tells_no_heldout_request(heldout: list[dict]) -> None:
    lines = "\n".join(row["text"] for row in paragraphs(800, SEED))
    assert not [request for request in user_requests(heldout) if request in lines]


def test_heldout_has_over_200_calls_of_every_tool_in_both_languages(heldout: list[dict]) -> None:
    calls = calls_with_results(heldout)
    assert len(calls) >= 200
    chinese = re.compile("[\u4e00-\u9fff]")
    counts = Counter(
        (call.get("function", {}).get("name", "interpreter"), bool(chinese.search(request)))
        for call, _, request, _ in calls
    )
    # a sum such as "3 + 4 = ?" counts as English here; no cell may be a handful
    assert {name for name, _ in counts} == set(world.SCHEMAS)
    assert min(counts[name, language] for name in world.SCHEMAS for language in (True, False)) >= 8


def test_there_are_several_thousand_different_training_dialogues(train: list[dict]) -> None:
    assert len({json.dumps(row) for row in train}) > 3000


def test_a_seed_gives_the_same_dialogues_and_another_seed_others(train: list[dict]) -> None:
    assert dialogues(50, "train", SEED) == train[:50]
    assert dialogues(50, "train", SEED + 1) != train[:50]


def test_every_row_is_a_valid_openai_row(train: list[dict], heldout: list[dict]) -> None:
    for row in (*train[:500], *heldout):
        assert FORMATS["openai"](json.loads(json.dumps(row)))["messages"]


def test_the_calculator_is_right_in_exact_arithmetic(train: list[dict]) -> None:
    calls = named_calls(train, "calculator")
    assert len(calls) > 500
    for arguments, result, _, answer in calls:
        assert value(ast.parse(arguments["expression"], mode="eval").body) == Fraction(result)
        assert result in answer


def test_the_calculator_is_asked_with_the_numbers_of_the_request(train: list[dict]) -> None:
    for arguments, _, request, _ in named_calls(train, "calculator"):
        assert Counter(re.findall(r"\d+", arguments["expression"])) == Counter(re.findall(r"\d+", request))


def test_the_interpreter_printed_what_python_prints(train: list[dict]) -> None:
    calls = [entry for entry in calls_with_results(train) if entry[0]["type"] == "code_interpreter"][:300]
    codes = [call["code_interpreter"]["input"] for call, *_ in calls]
    script = "import json, sys\nfor code in json.load(sys.stdin):\n    exec(code, {})\n    print('\\0')"
    run = subprocess.run([sys.executable, "-c", script], input=json.dumps(codes), capture_output=True, text=True)
    printed = [output.strip() for output in run.stdout.split("\0")[:-1]]
    assert printed == [result for _, result, _, _ in calls]
    assert all(result in answer for _, result, _, answer in calls)


def zeller(iso_date: str) -> int:
    """Day of the week by Zeller's congruence, Monday = 0."""
    year, month, day = (int(part) for part in iso_date.split("-"))
    if month < 3:
        year, month = year - 1, month + 12
    saturday_first = (day + 13 * (month + 1) // 5 + year + year // 4 - year // 100 + year // 400) % 7
    return (saturday_first + 5) % 7


def iso_date(spoken: str) -> str:
    """A date as the demo says it, in either language, as ISO: 'August 24', '8月24日' -> '2026-08-24'."""
    (day,) = re.findall(r"\d+", re.sub(r"\d+月", "", spoken))
    wording = next(wording for wording in LANGUAGES if any(month in spoken for month in wording.months))
    month = max((name for name in wording.months if name in spoken), key=len)  # "12月" holds "2月"
    return f"{world.YEAR}-{wording.months.index(month) + 1:02d}-{int(day):02d}"


def test_the_calendar_knows_its_weekdays(train: list[dict]) -> None:
    calls = named_calls(train, "add_event")
    assert len(calls) > 500
    weekdays = [wording.weekdays for wording in LANGUAGES]
    for arguments, result, _, answer in calls:
        told = json.loads(result)["weekday"]
        assert told in {names[zeller(iso_date(arguments["date"]))] for names in weekdays}
        assert arguments["title"].lower() in answer.lower()


def test_what_a_dialogue_adds_is_listed_later(train: list[dict]) -> None:
    num_checked = 0
    for row in train:
        added: list[dict] = []
        for call, result, *_ in calls_with_results([row]):
            if call["type"] != "function":
                continue
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "add_event":
                added.append(arguments)
            elif call["function"]["name"] == "list_events":
                expected = [(event["time"], event["title"]) for event in added if event["date"] == arguments["date"]]
                listed = [(event["time"], event["title"]) for event in json.loads(result)]
                assert set(expected) <= set(listed)
                assert listed == sorted(listed)
                num_checked += bool(expected)
    assert num_checked > 20


def test_the_weather_of_a_city_and_day_is_the_same_in_both_languages(train: list[dict]) -> None:
    english, chinese = LANGUAGES
    seen: dict[tuple[int, int], set] = {}
    for arguments, result, _, answer in named_calls(train, "get_weather"):
        found = json.loads(result)
        wording = english if arguments["city"] in english.cities else chinese
        key = (wording.cities.index(arguments["city"]), wording.days.index(arguments["day"]))
        condition = wording.conditions.index(found["condition"])
        seen.setdefault(key, set()).add((condition, found["low"], found["high"]))
        assert found["low"] < found["high"]
        assert all(str(told).lower() in answer.lower() for told in found.values())
    assert len(seen) >= 0.8 * len(english.cities) * len(english.days)  # the others are held out
    assert all(len(facts) == 1 for facts in seen.values())


def test_languages_name_the_same_things_in_the_same_order() -> None:
    english, chinese = LANGUAGES
    for names in ("cities", "days", "day_phrases", "conditions", "weekdays", "months", "titles", "talk", "greetings"):
        assert len(getattr(english, names)) == len(getattr(chinese, names)), names
    assert set(english.calculator) == set(chinese.calculator)
    assert set(english.interpreter) == set(chinese.interpreter) == set(world.PROGRAMS)


@pytest.mark.parametrize("wording", LANGUAGES, ids=lambda wording: wording.code)
def test_every_tool_is_asked_for_in_dozens_of_ways(wording: exchanges.Wording) -> None:
    for lines in (wording.weather, wording.add_event, wording.list_events):
        assert len(set(lines)) >= 24
    for forms, least in ((wording.calculator, 24), (wording.interpreter, 15)):
        assert len({line for lines in forms.values() for line in lines}) >= least


def test_the_split_depends_on_the_arguments_alone() -> None:
    first = exchanges.Exchange("calculator", {"expression": "1+2"}, "1 + 2 = ?", "3", "3")
    second = exchanges.Exchange("calculator", {"expression": "1+2"}, "Add 1 and 2.", "3", "It is 3.")
    assert split_of(first) == split_of(second)
    splits = Counter(
        split_of(exchanges.Exchange("calculator", {"expression": f"{n}+2"}, "", "", "")) for n in range(2000)
    )
    assert 120 < splits["heldout"] < 280
