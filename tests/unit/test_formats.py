"""Rows of each format become samples, and a bad row's error says what is expected."""

import copy
import json
from typing import Any

import pytest

from tuner.dataset.formats import FORMATS, RowError
from tuner.errors import UserError

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any = "22", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def openai(*messages: Any, tools: Any = None) -> dict[str, Any]:
    return FORMATS["openai"]({"messages": list(messages), "tools": tools})


def test_alpaca_asks_with_instruction_and_input_and_remembers_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]}
    assert FORMATS["alpaca"](row)["messages"] == [
        {"role": "system", "content": "Be brief."},
        user("a"),
        assistant("b"),
        user("Add.\n1 2"),
        assistant("3"),
    ]


def test_alpaca_takes_response_for_output_and_an_empty_input_for_none():
    for extra in ({"input": ""}, {"input": None}, {}):
        sample = FORMATS["alpaca"]({"instruction": "Add.", "response": "3", **extra})
        assert sample["messages"] == [user("Add."), assistant("3")]


def test_text_is_kept_as_it_is():
    assert FORMATS["text"]({"text": " \n白日", "id": 7}) == {"text": " \n白日"}


def test_openai_keeps_what_the_conversation_says():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b", "name": "style"},
        user([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]),
        assistant(None, tool_calls=[CALL], refusal=None),
        tool(tool_call_id="c1"),
        assistant("It is 22.", weight=0),
        assistant("Anything else?"),
    ]
    sample = openai(*copy.deepcopy(messages), tools=[WEATHER])
    said = sample["messages"]
    assert [message["content"] for message in said] == ["a", "b", "one two", "", "22", "It is 22.", "Anything else?"]
    assert said[1]["name"] == "style"
    assert said[3]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert said[4]["tool_call_id"] == "c1"
    assert [message.get("loss") for message in said] == [None, None, None, None, None, False, None]
    assert sample["tools"] == [WEATHER]


def test_a_sample_without_tools_says_nothing_of_tools():
    for none in (None, [], "[]"):
        assert "tools" not in openai(user(), assistant(), tools=none)


def test_tools_may_be_json_text_or_bare_functions():
    bare = WEATHER["function"]
    called = [user(), assistant(None, tool_calls=[CALL]), tool(), assistant()]
    assert openai(*called, tools=json.dumps([bare]))["tools"] == [bare]


def test_the_last_calls_may_wait_for_their_results():
    assert openai(user(), assistant("", tool_calls=[CALL]), tools=[WEATHER])


def test_keys_that_are_like_none_of_ours_are_let_through():
    assert openai({**user(), "timestamp": 5, "score": 1}, {**assistant(), "model": "x"})


TWO_CALLS = assistant(None, tool_calls=[CALL, {**CALL, "id": "c2"}])
BAD_CONVERSATIONS = {
    "role that is none": ([{"role": "asistant", "content": "x"}], ["message 0", "'asistant'", "'assistant'"]),
    "role that is missing": ([{"content": "x"}], ["'role'", "message 0"]),
    "message that is none": (["hi"], ["message 0", "object", "str 'hi'"]),
    "content that is missing": ([{"role": "user"}], ["'content'", "message 0"]),
    "content that is misspelt": ([{"role": "user", "contents": "x"}], ["'contents'", "'content'"]),
    "content that is no text": ([user({"a": 1})], ["message 0", "text", "dict"]),
    "content that is null": ([user(None)], ["message 0", "text", "NoneType"]),
    "image": ([user([{"type": "image_url", "image_url": {}}])], ["message 0", "type text", "image_url"]),
    "assistant that says nothing": ([user(), assistant("")], ["message 1", "tool_calls", "''"]),
    "assistant first": ([assistant()], ["message 0", "system or user", "'assistant'"]),
    "two users": ([user(), user()], ["message 1", "assistant", "'user'"]),
    "two assistants": ([user(), assistant(), assistant()], ["message 2", "user", "'assistant'"]),
    "system in the middle": ([user(), {"role": "system", "content": "x"}], ["message 1", "'system'"]),
    "result without a call": ([user(), assistant(), tool()], ["message 2", "tool call before it"]),
    "user in place of a result": ([user(), TWO_CALLS, user()], ["message 2", "tool", "'user'"]),
    "result that is missing": ([user(), TWO_CALLS, tool(), assistant()], ["message 1", "1 of 2"]),
    "result too many": ([user(), TWO_CALLS, tool(), tool(), tool()], ["3 tool results for 2 calls"]),
    "result of another call": ([user(), TWO_CALLS, tool(tool_call_id="c")], ["'c'", "'c1'", "'c2'"]),
    "result given twice": ([user(), TWO_CALLS, *[tool(tool_call_id="c1")] * 2], ["one result for each call"]),
    "calls with one id": ([user(), assistant("", tool_calls=[CALL, CALL])], ["differ in id", "c1"]),
    "call by a user": ([{**user(), "tool_calls": [CALL]}], ["message 0", "assistant turns only"]),
    "misspelt tool_calls": ([user(), assistant("x", tool_call=[CALL])], ["'tool_call'", "'tool_calls'"]),
    "older function_call": ([user(), assistant("x", function_call={})], ["function_call", "tool_calls"]),
    "loss of a user": ([{**user(), "loss": True}, assistant()], ["message 0", "assistant turns only", "'user'"]),
    "loss that is no truth": ([user(), assistant(loss="no")], ["message 1", "true or false", "'no'"]),
    "nothing trained": ([user(), assistant(loss=False)], ["assistant turn to train on"]),
    "no answer": ([user()], ["assistant turn to train on"]),
    "no message": ([], ["assistant turn to train on"]),
    "name of two lines": ([{**user(), "name": "a\nb"}], ["message 0", "one line"]),
}


@pytest.mark.parametrize("case", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_refused_with_what_is_expected(case: str):
    messages, said = BAD_CONVERSATIONS[case]
    with pytest.raises(RowError) as caught:
        openai(*messages, tools=[WEATHER])
    assert isinstance(caught.value, UserError)
    for words in said:
        assert words in str(caught.value)


def call(**function: Any) -> dict[str, Any]:
    return assistant(None, tool_calls=[{"type": "function", "function": function}])


BAD_CALLS = {
    "undeclared": (call(name="get_wether", arguments="{}"), ["'get_wether'", "declares", "Nearest: 'get_weather'"]),
    "not JSON": (call(name="get_weather", arguments="{city:"), ["'get_weather'", "must be JSON", "{city:"]),
    "no object": (call(name="get_weather", arguments="[1]"), ["'get_weather'", "JSON object", "[1]"]),
    "no arguments": (call(name="get_weather"), ["'arguments'", "call 0 of message 1"]),
    "no name": (call(arguments="{}"), ["'name'", "call 0 of message 1"]),
    "no function": (assistant(None, tool_calls=[{"id": "c"}]), ["'function'", "call 0 of message 1"]),
    "no interpreter": (
        assistant(None, tool_calls=[{"type": "code_interpreter", "code_interpreter": {"input": "1"}}]),
        ["'code_interpreter'", "get_weather"],
    ),
    "no code": (assistant(None, tool_calls=[{"type": "code_interpreter", "code_interpreter": {}}]), ["'input'"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_with_what_is_expected(case: str):
    message, said = BAD_CALLS[case]
    with pytest.raises(RowError) as caught:
        openai(user(), message, tools=[WEATHER])
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("[", ["'tools'", "not JSON"]),
        ({"a": 1}, ["'tools'", "list", "dict"]),
        (["get_weather"], ["tool 0", "object"]),
        ([{"type": "function", "function": {"nam": "x"}}], ["'name'", "tool 0", "Nearest: 'nam'"]),
    ],
)
def test_bad_tools_are_refused(tools: Any, said: list[str]):
    with pytest.raises(RowError) as caught:
        openai(user(), assistant(), tools=tools)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data_format", "row", "said"),
    [
        ("openai", {"message": []}, ["'messages'", "Nearest: 'message'"]),
        ("openai", {"messages": "x"}, ["list", "str 'x'"]),
        ("alpaca", {"instruct": "a", "output": "b"}, ["'instruction'", "Nearest: 'instruct'"]),
        ("alpaca", {"instruction": "a"}, ["'output' or 'response'"]),
        ("alpaca", {"instruction": "a", "output": "b", "response": "c"}, ["either"]),
        ("alpaca", {"instruction": "a", "output": ""}, ["answer to train on"]),
        ("alpaca", {"instruction": "", "output": "b"}, ["ask something"]),
        ("alpaca", {"instruction": 5, "output": "b"}, ["'instruction'", "str", "int 5"]),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, ["[question, answer]", "['a']"]),
        ("text", {"content": "x"}, ["'text'", "Nearest: 'content'"]),
        ("text", {"text": ""}, ["some text"]),
        ("text", {"text": None}, ["'text'", "NoneType"]),
    ],
)
def test_a_row_that_lacks_a_field_is_refused(data_format: str, row: dict[str, Any], said: list[str]):
    with pytest.raises(RowError) as caught:
        FORMATS[data_format](row)
    for words in said:
        assert words in str(caught.value)


def test_a_long_value_is_not_repeated_whole():
    with pytest.raises(RowError) as caught:
        FORMATS["text"]({"text": ["x" * 100_000]})
    assert len(str(caught.value)) < 300


def test_a_row_is_left_as_it_was():
    row = {"messages": [user(), assistant(None, tool_calls=[CALL]), tool(), assistant()], "tools": [WEATHER]}
    before = copy.deepcopy(row)
    FORMATS["openai"](row)
    assert row == before
