"""`data_format = "auto"`: the format that rows show, or the candidates where that is not certain."""

from typing import Any

import pytest

from tuner.dataset.formats import EXAMPLES, FORMATS
from tuner.dataset.formats.detection import SIGNS, detect
from tuner.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PLAIN = {"messages": [USER, ANSWER]}
TURNS = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
WITH_CALLS = EXAMPLES["openai"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_each_format_is_known_for_what_it_is(name: str):
    assert detect([EXAMPLES[name]]) == (name, SIGNS[name].words)
    assert detect([EXAMPLES[name]] * 3).name == name


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([PLAIN], "openai"),
        ([[USER, ANSWER]], "openai"),
        ([PLAIN, WITH_CALLS], "openai"),
        ([PLAIN, EXAMPLES["ftdp"]], "ftdp"),
        ([[USER, ANSWER], EXAMPLES["ftdp"]["messages"]], "ftdp"),
        ([PLAIN, EXAMPLES["interpreter"], PLAIN], "interpreter"),
        ([TURNS], "sharegpt"),
        ([TURNS, EXAMPLES["sharegpt"]], "sharegpt"),
        ([TURNS, EXAMPLES["msagent"]], "msagent"),
        ([{"prompt": "a", "messages": [USER, ANSWER]}], "openai"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}], "qa"),
        ([{"instruction": "a", "input": "", "output": "b"}], "alpaca"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference"),
        ([{"conversations": TURNS["conversations"], "chosen": {}, "rejected": {}}], "preference"),
        ([{"id": 1, "text": "x", "url": "u"}], "text"),
        ([{"input_ids": [1, 2]}], "tokens"),
    ],
)
def test_rows_show_their_format(rows: list[Any], name: str):
    assert detect(rows).name == name


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there are no rows to look at"),
        ([{}], "row 1 is in no known format: it is empty"),
        ([PLAIN, {"a": 1, "b": 2}], "row 2 is in no known format: it has the keys 'a', 'b'"),
        ([{str(key): 0 for key in range(20)}], "it has the keys '0', '1', '2', '3', '4', '5', '6', '7', ..."),
        ([3], "row 1 is in no known format: it is of type int"),
        ([None], "it is of type NoneType"),
        ([{"messages": []}], "it has the keys 'messages'"),
        ([{"messages": [{"role": "narrator", "content": "x"}]}], "row 1 is in no known format"),
        (
            [{"text": "x", "instruction": "a", "output": "b"}],
            "the rows may be alpaca or text, which read them differently",
        ),
        ([{"text": "x", "messages": [USER, ANSWER]}], "may be openai or text"),
        (
            [PLAIN, {"text": "x"}],
            "the rows differ: up to row 1 they look like openai or ftdp or interpreter, row 2 like text",
        ),
        ([WITH_CALLS, EXAMPLES["ftdp"]], "up to row 1 they look like openai, row 2 like ftdp"),
        ([EXAMPLES["sharegpt"], EXAMPLES["msagent"]], "up to row 1 they look like sharegpt, row 2 like msagent"),
    ],
)
def test_what_is_not_certain_is_refused_with_the_candidates(rows: list[Any], said: str):
    with pytest.raises(UserError) as caught:
        detect(rows)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "Set data_format to one of openai, sharegpt, " in message
    assert "`tuner list-formats`" in message


def test_every_format_has_a_sign():
    assert list(SIGNS) != []
    assert set(SIGNS) == set(FORMATS) == set(EXAMPLES)
