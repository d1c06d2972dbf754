"""Several calls in a turn: a turn each, all in one, or refused."""

from typing import Any

import pytest
from chat_samples import bytelevel

from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.messages import PARALLEL_TOOL_CALLS, RowError
from tuner.dataset.rendering import Rendering
from tuner.dataset.sample_encoder import SampleEncoder


def call(label: str, number: int) -> dict[str, Any]:
    return {"id": label, "type": "function", "function": {"name": "f", "arguments": {"n": number}}}


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "t", "tool_calls": [call("a", 1), call("b", 2)]},
    {"role": "tool", "content": "two", "tool_call_id": "b"},
    {"role": "tool", "content": "one", "tool_call_id": "a"},
    {"role": "assistant", "content": "y"},
]
ONE = [TALK[0], {**TALK[1], "tool_calls": [call("a", 1)]}, TALK[3], TALK[4]]
ACTIONS = [
    f'<|action_start|><|plugin|>\n{{"name": "f", "parameters": {{"n": {number}}}}}<|action_end|>\n' for number in (1, 2)
]
RESULTS = [f"<|im_start|>environment name=<|plugin|>\n{words}<|im_end|>\n" for words in ("one", "two")]
BEFORE = '<s><|im_start|>system name=<|plugin|>\n[{"name": "f"}]<|im_end|>\n<|im_start|>user\nx<|im_end|>\n'
START, END = "<|im_start|>assistant\n", "<|im_end|>\n"
AFTER = f"{START}y{END}"
SPLIT = f"{BEFORE}{START}t{ACTIONS[0]}{END}{RESULTS[0]}{START}{ACTIONS[1]}{END}{RESULTS[1]}{AFTER}"
JOINED = f"{BEFORE}{START}t{ACTIONS[0]}{ACTIONS[1]}{END}{RESULTS[0]}{RESULTS[1]}{AFTER}"


def text(messages: list[dict[str, Any]], template: str = "internlm2") -> str:
    sample = {"messages": messages, "tools": [{"name": "f"}]}
    return "".join(segment.text for segment in render(sample, CHAT_TEMPLATES[template]))


@pytest.mark.parametrize(("choice", "expected"), [("template", SPLIT), ("split", SPLIT), ("join", JOINED)])
def test_calls_of_a_turn_are_split_or_joined_each_with_its_result(choice: str, expected: str):
    assert text(PARALLEL_TOOL_CALLS[choice](TALK)) == expected


def test_qwen_joins_unless_it_is_told_to_split():
    joined, split = (text(PARALLEL_TOOL_CALLS[choice](TALK), "qwen2.5") for choice in ("template", "split"))
    assert joined.count("<|im_start|>assistant") == 2
    assert split.count("<|im_start|>assistant") == 3
    assert joined.count('"arguments": {"n"') == split.count('"arguments": {"n"') == 2
    assert split.index('"n": 1') < split.index("\none\n") < split.index('"n": 2') < split.index("\ntwo\n")


def test_several_calls_can_be_refused():
    with pytest.raises(RowError) as caught:
        PARALLEL_TOOL_CALLS["error"](TALK)
    assert str(caught.value) == (
        'Expected one call a turn (parallel_tool_calls = "error"), got 2 in message 1. '
        'Set parallel_tool_calls = "split" for a turn each, or "join" for one turn.'
    )
    assert PARALLEL_TOOL_CALLS["error"](ONE) == ONE


def test_functions_and_code_cannot_be_joined():
    code = {"type": "code_interpreter", "code_interpreter": {"input": "1"}}
    mixed = [TALK[0], {**TALK[1], "tool_calls": [call("a", 1), code]}]
    with pytest.raises(RowError, match="calls of one kind in message 1, got functions and code"):
        PARALLEL_TOOL_CALLS["join"](mixed)


@pytest.mark.parametrize("choice", PARALLEL_TOOL_CALLS)
def test_single_calls_are_the_same_under_every_choice(choice: str):
    assert text(PARALLEL_TOOL_CALLS[choice](ONE)) == text(ONE)


def test_the_choice_reaches_the_rows_and_leaves_plain_text_alone():
    template = CHAT_TEMPLATES["internlm2"]
    rendering = Rendering("internlm2", parallel_tool_calls="join")
    samples = SampleEncoder.from_tokenizer(bytelevel("internlm2"), rendering)
    segments = samples.segments({"messages": TALK, "tools": [{"name": "f"}]})
    assert "".join(segment.text for segment in segments) == JOINED
    assert samples.segments({"text": "x"}) == render({"text": "x"}, template)
