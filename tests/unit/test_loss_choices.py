"""Which words of a conversation are trained: each choice and each family beside what it should be, written by hand."""

import random
from typing import Any

import numpy as np
import pytest
from chat_samples import WEATHER, bytelevel, made_row

from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.formats import FORMATS, RowError
from tuner.dataset.rendering import LOSS_ON
from tuner.dataset.tokenize import Encoder

TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]},
    {"role": "tool", "content": "22"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "23"},
    {"role": "assistant", "content": "Warm."},
]
PLAIN = [*MESSAGES[:3], {"role": "assistant", "content": "Warm."}]

# Each transcript in parts, between @: what the choices train, or not, as a whole.
INTERNLM2 = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n@Hello<|im_end|>@\n@"
    "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n@Wait.@<|action_start|><|plugin|>\n"
    '{"name": "get_weather", "parameters": {"city": "Rome"}}<|action_end|>\n<|im_end|>@\n@'
    "<|im_start|>environment name=<|plugin|>\n22<|im_end|>\n<|im_start|>assistant\n@<|action_start|><|plugin|>\n"
    '{"name": "get_weather", "parameters": {"city": "Rome"}}<|action_end|>\n<|im_end|>@\n@'
    "<|im_start|>environment name=<|plugin|>\n23<|im_end|>\n<|im_start|>assistant\n@Warm.<|im_end|>@\n@"
)
QWEN = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n@Hello<|im_end|>@\n@"
    "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n@Wait.\n@<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>@\n@'
    "<|im_start|>user\n<tool_response>\n22\n</tool_response><|im_end|>\n<|im_start|>assistant\n@<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>@\n@'
    "<|im_start|>user\n<tool_response>\n23\n</tool_response><|im_end|>\n<|im_start|>assistant\n@Warm.<|im_end|>@\n@"
)
# The parts between the @: mask, Hello, newline, mask, words, call, newline, mask, call, newline, mask, Warm, newline.
PARTS = {
    ("assistant", False): "-H--wc--c--W--",
    ("assistant", True): "-Hn-wcn-cn-Wn-",
    ("last", False): "-----------W--",
    ("last", True): "-----------Wn-",
    ("calls", False): "-----c--c-----",
    ("calls", True): "-----cn-cn----",
    ("thoughts", False): "----w---------",
    ("thoughts", True): "----w---------",
}


def trained_text(messages: list[dict[str, Any]], name: str, tools: list[Any], **choice: Any) -> list[str]:
    """The runs of text that are trained, in order."""
    segments = render({"messages": messages, "tools": tools}, CHAT_TEMPLATES[name], **choice)
    text = "".join(segment.text if segment.trained else "\0" * bool(segment.text) for segment in segments)
    return [run for run in text.split("\0") if run]


def expected_runs(written: str, parts: str) -> list[str]:
    """The runs of a transcript's parts that are not marked with a dash."""
    pieces = written.split("@")
    assert len(pieces) == len(parts)
    text = "".join("\0" if mark == "-" else piece for piece, mark in zip(pieces, parts))
    return [run for run in text.split("\0") if run]


@pytest.mark.parametrize(("choice", "parts"), PARTS.items())
@pytest.mark.parametrize(("name", "written"), [("internlm2", INTERNLM2), ("qwen2.5", QWEN), ("chatml", QWEN)])
def test_each_choice_trains_what_it_says_in_a_conversation_with_tools(name, written, choice, parts):
    loss_on, train_newline = choice
    rendered = render({"messages": MESSAGES, "tools": TOOLS}, CHAT_TEMPLATES[name])
    text = "".join(segment.text for segment in rendered)
    assert text.endswith(written.replace("@", "")), "the transcript is what the template writes"
    got = trained_text(MESSAGES, name, TOOLS, loss_on=loss_on, train_newline=train_newline)
    assert got == expected_runs(written, parts)


@pytest.mark.parametrize("train_newline", [False, True])
@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", ["Hello<|eot_id|>", "Warm.<|eot_id|>"]), ("last", ["Warm.<|eot_id|>"]), ("calls", []),
     ("thoughts", [])],
)  # fmt: skip
def test_llama3_has_neither_calls_nor_a_newline_behind_its_turns(loss_on, expected, train_newline):
    assert trained_text(PLAIN, "llama3", [], loss_on=loss_on, train_newline=train_newline) == expected


@pytest.mark.parametrize("name", ["internlm2", "qwen2.5", "chatml"])
def test_the_calls_of_one_turn_are_trained_together_with_what_parts_them(name):
    turn = {"role": "assistant", "content": "Both.", "tool_calls": [CALL, CALL]}
    runs = trained_text([MESSAGES[0], turn], name, TOOLS, loss_on="calls")
    call = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
    if name == "internlm2":
        assert runs == [f"<|action_start|><|plugin|>\n{call}<|action_end|>\n<|im_end|>"] * 2
    else:
        each = "<tool_call>\n" + call.replace("parameters", "arguments") + "\n</tool_call>"
        assert runs == [f"{each}\n{each}<|im_end|>"]
    said = ["Both."] if name == "internlm2" else ["Both.\n"]
    assert trained_text([MESSAGES[0], turn], name, TOOLS, loss_on="thoughts") == said


@pytest.mark.parametrize("loss_on", LOSS_ON)
def test_a_turn_without_loss_stays_masked_under_every_choice(loss_on):
    masked = [{**message, "loss": False} if message["role"] == "assistant" else message for message in MESSAGES]
    assert trained_text(masked, "internlm2", TOOLS, loss_on=loss_on, train_newline=True) == []


def test_the_last_turn_is_the_models_last_whatever_follows():
    runs = trained_text([*PLAIN, {"role": "user", "content": "Bye"}], "chatml", [], loss_on="last")
    assert runs == ["Warm.<|im_end|>"]


@pytest.mark.parametrize("loss_on", LOSS_ON)
def test_plain_text_is_trained_whole_under_every_choice(loss_on):
    segments = render({"text": "words"}, CHAT_TEMPLATES["internlm2"], loss_on=loss_on, train_newline=True)
    assert [segment.text for segment in segments if segment.trained] == ["words", "</s>"]


@pytest.mark.parametrize("name", ["internlm2", "qwen2.5", "chatml", "llama3"])
def test_no_choice_changes_a_token_and_each_trains_part_of_all(name):
    """Ids are the same under all choices; calls and thoughts share no token and are both part of the whole."""
    rng = random.Random(name)
    encoder = Encoder.from_tokenizer(bytelevel(name), CHAT_TEMPLATES[name])
    kinds = {"tools": name != "llama3", "interpreter": name == "internlm2"}
    for _ in range(30):
        sample = FORMATS["openai"](made_row(rng, **kinds))
        choices = [(loss_on, newline) for loss_on in LOSS_ON for newline in (False, True)]
        template = CHAT_TEMPLATES[name]
        documents = encoder.encode([render(sample, template, loss_on=on, train_newline=nl) for on, nl in choices])
        assert all(np.array_equal(document.ids, documents[0].ids) for document in documents)
        marks = {choice: document.trained for choice, document in zip(choices, documents)}
        for loss_on, newline in choices:
            assert not (marks[loss_on, newline] & ~marks["assistant", newline]).any()
            assert not (marks[loss_on, False] & ~marks[loss_on, newline]).any()
        assert not (marks["calls", False] & marks["thoughts", False]).any()
        assert np.array_equal(marks["thoughts", False], marks["thoughts", True])


@pytest.mark.parametrize("loss", [0.5, 2, 1e-3, 1000])
def test_a_weight_is_on_every_trained_segment_of_its_turn_and_on_no_other(loss):
    messages = [*PLAIN[:3], {**PLAIN[3], "loss": loss}]
    segments = render({"messages": messages}, CHAT_TEMPLATES["internlm2"], train_newline=True)
    weighted = [(segment.text, segment.weight) for segment in segments if segment.weight != 1]
    assert weighted == [("Warm.", loss), ("<|im_end|>\n", loss)]


def test_the_parts_of_a_weighted_turn_that_a_choice_leaves_out_have_no_weight():
    turn = {**MESSAGES[3], "loss": 0.5}
    segments = render({"messages": [MESSAGES[0], turn], "tools": TOOLS}, CHAT_TEMPLATES["qwen2.5"], loss_on="thoughts")
    assert [(segment.text, segment.weight) for segment in segments if segment.trained] == [("Wait.\n", 0.5)]
    assert {segment.weight for segment in segments if not segment.trained} == {1.0}


@pytest.mark.parametrize("loss", [-0.5, float("nan"), float("inf"), "0.5", None, [1], 1e-4, 1e4, 10**400])
def test_a_loss_that_is_no_weight_is_refused_with_what_is_expected(loss):
    with pytest.raises(RowError, match=r"loss of a message to be true or false, or a weight from 0\.001 to 1000, got"):
        render({"messages": [PLAIN[0], {**PLAIN[1], "loss": loss}]}, CHAT_TEMPLATES["chatml"])
