"""Rendered conversations read as their family writes them, and what is trained is what the model says."""

import dataclasses
import json
import random
from typing import Any

import pytest
from chat_samples import WEATHER, made_row

from tuner.dataset.chat_template import CHAT_TEMPLATES, Segment, find_template, parse_reply, render
from tuner.dataset.formats import FORMATS, RowError
from tuner.dataset.messages import split_parallel_calls
from tuner.errors import UserError

INTERNLM2, LLAMA3, QWEN, CHATML = (CHAT_TEMPLATES[name] for name in ("internlm2", "llama3", "qwen2.5", "chatml"))
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "code_interpreter", "description": "Run code."}]
USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "hello"}
ROW_KINDS = {
    "internlm2": {"tools": True, "interpreter": True},
    "qwen2.5": {"tools": True},
    "chatml": {"tools": True},
    "llama3": {"tools": False},
}


def function_call(city: str = "Paris", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}, **more}


def code_call(code: str = "1 + 1", **more: Any) -> dict[str, Any]:
    return {"type": "code_interpreter", "code_interpreter": {"input": code}, **more}


def calling(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def written(template: Any, *messages: dict[str, Any], tools: Any = (), prompt: bool = False) -> str:
    """The conversation with [brackets] around what is trained."""
    segments = render({"messages": messages, "tools": tools}, template, add_generation_prompt=prompt)
    text = "".join(f"[{segment.text}]" if segment.trained else segment.text for segment in segments)
    return text.replace("][", "")


def test_internlm2_turns():
    system = {"role": "system", "content": "Be brief."}
    assert written(INTERNLM2, system, USER, SAID, USER, prompt=True) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n[hello<|im_end|>]\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama3_turns():
    assert written(LLAMA3, USER, SAID, prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[hello<|eot_id|>]<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_qwen_turns_have_a_system_turn_where_the_conversation_has_none():
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n"
    default = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert written(QWEN, USER, SAID) == default + turns
    assert written(CHATML, USER, SAID) == turns


def test_a_document_of_text_is_trained_but_for_its_first_mark():
    assert render({"text": "a<s>"}, INTERNLM2) == [
        Segment("<s>", False, True),
        Segment("a<s>", True, False),
        Segment("</s>", True, True),
    ]
    assert render({"text": "a"}, QWEN) == [Segment("a", True, False), Segment("<|endoftext|>", True, True)]


def test_a_turn_without_loss_is_masked_whole():
    masked = written(INTERNLM2, USER, {**SAID, "loss": False}, USER, SAID)
    assert masked.count("[") == 1
    assert "assistant\nhello<|im_end|>\n<|im_start|>user" in masked


def test_internlm2_names_environments_after_the_call_they_answer():
    text = written(
        INTERNLM2,
        USER,
        calling(function_call(), content="Let me see."),
        result("22", name="get_weather"),
        calling(code_call("print(1)\nx")),
        result("1"),
        SAID,
        tools=TOOLS,
    )
    assert text == (
        "<s><|im_start|>system name=<|interpreter|>\nRun code.<|im_end|>\n"
        f"<|im_start|>system name=<|plugin|>\n{json.dumps([WEATHER], ensure_ascii=False)}<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\n[Let me see.<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": '
        '{"city": "Paris"}}<|action_end|>\n<|im_end|>]\n'
        "<|im_start|>environment name=<|plugin|>\n22<|im_end|>\n"
        "<|im_start|>assistant\n[<|action_start|><|interpreter|>\n```python\nprint(1)\nx\n```<|action_end|>\n<|im_end|>]\n"
        "<|im_start|>environment name=<|interpreter|>\n1<|im_end|>\n"
        "<|im_start|>assistant\n[hello<|im_end|>]\n"
    )
    assert "天气" in text  # Chinese stays readable


def test_tool_turns_stand_behind_the_first_system_turn():
    systems = [{"role": "system", "content": content} for content in ("one", "two")]
    text = written(INTERNLM2, *systems, USER, SAID, tools=TOOLS[:1])
    assert [turn.split("\n")[0] for turn in text.split("<|im_start|>")[1:]] == [
        "system",
        "system name=<|plugin|>",
        "system",
        "user",
        "assistant",
    ]


def test_without_tools_there_is_no_tool_turn():
    assert "name=" not in written(INTERNLM2, USER, SAID)
    assert "# Tools" not in written(QWEN, USER, SAID)


def test_arguments_may_be_json_text():
    as_text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city":"巴黎"}'}}
    for template in (INTERNLM2, QWEN):
        both = [written(template, USER, calling(call), tools=TOOLS[:1]) for call in (as_text, function_call("巴黎"))]
        assert both[0] == both[1]


def test_parallel_calls_become_a_turn_each_followed_by_its_result():
    calls = [function_call("Rome", id="a"), code_call(id="b"), function_call("Oslo", id="c")]
    results = [result("3", tool_call_id="c"), result("1", tool_call_id="a"), result("2", tool_call_id="b")]
    split = split_parallel_calls([USER, calling(*calls, content="Wait."), *results, SAID])
    assert split == [
        USER,
        calling(calls[0], content="Wait."),
        results[1],
        calling(calls[1], content=""),
        results[2],
        calling(calls[2], content=""),
        results[0],
        SAID,
    ]


def test_results_without_ids_answer_in_order():
    calls = [function_call("Rome", id="a"), function_call("Oslo", id="b")]
    split = split_parallel_calls([USER, calling(*calls), result("1"), result("2")])
    assert [message["content"] for message in split[2::2]] == ["1", "2"]


def test_splitting_leaves_a_loss_on_every_part():
    turn = {**calling(function_call(), function_call()), "loss": False}
    assert [part["loss"] for part in split_parallel_calls([USER, turn, result("1"), result("2")])[1::2]] == [False] * 2


def test_calls_at_the_end_need_no_results():
    split = split_parallel_calls([USER, calling(function_call("Rome"), function_call("Oslo")), result("1")])
    assert [message["role"] for message in split] == ["user", "assistant", "tool", "assistant"]


def test_a_result_without_a_call_is_refused():
    with pytest.raises(RowError, match="no tool call comes before"):
        written(INTERNLM2, USER, SAID, result("22"))


def test_qwen_keeps_parallel_calls_and_their_results_together():
    text = written(
        QWEN,
        {"role": "system", "content": "Be brief."},
        USER,
        calling(function_call("Rome"), function_call("Oslo"), content="Wait."),
        result("1"),
        result("2"),
        SAID,
        tools=[WEATHER],
    )
    declared = json.dumps({"type": "function", "function": WEATHER}, ensure_ascii=False)
    system, rest = text.split("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist")
    assert f"<tools>\n{declared}\n</tools>\n\nFor each function call, return a json object" in system
    assert rest == (
        "<|im_start|>assistant\n[Wait.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>]\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[hello<|im_end|>]\n"
    )


@pytest.mark.parametrize("messages", [[USER, calling(function_call())], [USER, SAID, result("x")]])
def test_llama3_refuses_tools(messages: list[dict[str, Any]]):
    with pytest.raises(UserError, match=r"'llama3' has no tool grammar yet.*internlm2"):
        written(LLAMA3, *messages)
    with pytest.raises(UserError, match="no tool grammar"):
        written(LLAMA3, USER, SAID, tools=[WEATHER])


def test_qwen_refuses_an_interpreter():
    with pytest.raises(UserError, match="no code interpreter"):
        written(QWEN, USER, SAID, tools=TOOLS)


def test_a_name_is_plain_text_and_only_a_system_turn_bears_a_special_one():
    segments = render({"messages": [{**USER, "name": "<|plugin|>"}, SAID]}, INTERNLM2)
    assert Segment("<|plugin|>", False, False) in segments
    assert "user name=plugin\n" in written(INTERNLM2, {**USER, "name": "plugin"}, SAID)
    system = {"role": "system", "content": "[]", "name": "plugin"}
    assert render({"messages": [system, USER]}, INTERNLM2)[1].text == "<|im_start|>system name=<|plugin|>\n"


def test_a_name_that_has_no_place_is_refused():
    with pytest.raises(RowError, match=r"'qwen2\.5' has no place for a speaker's name, got a user named 'Ann'"):
        written(QWEN, {**USER, "name": "Ann"}, SAID)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RowError, match="surrogate"):
        written(INTERNLM2, {**USER, "content": "\ud83d"}, SAID)


def test_an_unknown_template_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'internlm3'.*Nearest: 'internlm2'"):
        find_template("internlm3")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_trained_is_what_the_model_says_and_the_mark_that_ends_it(name: str):
    """Against a count of its own: the trained text, cut at the marks, is each trained turn's words, in order."""
    template = CHAT_TEMPLATES[name]
    rng = random.Random(name)
    for _ in range(100):
        row = made_row(rng, **ROW_KINDS[name])
        segments = render(FORMATS["openai"](row), template)
        trained = "".join(segment.text for segment in segments if segment.trained).split(template.turn_end)
        assert trained.pop() == ""
        turns = [m for m in row["messages"] if m["role"] == "assistant" and m.get("loss", True)]
        num_calls = [len(m.get("tool_calls", [])) for m in turns]
        extra = sum(max(0, n - 1) for n in num_calls) if name == "internlm2" else 0
        assert len(trained) == len(turns) + extra
        said = [m["content"] for m in turns if "tool_calls" not in m]
        assert [words for words in trained if words in said] == said
        calls = sum(words.count('{"name": "get_weather"') + words.count("```python") for words in trained)
        assert calls == sum(num_calls)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_special_segments_hold_no_word_of_the_row(name: str):
    """A word that a row brings in any of its texts never comes out in a special segment."""
    rng = random.Random(name)
    marks = list(CHAT_TEMPLATES[name].special_tokens)
    for _ in range(100):
        words = [f"zq{rng.random()} {rng.choice(marks)}" for _ in range(5)]
        segments = render(FORMATS["openai"](made_row(rng, words=words, **ROW_KINDS[name])), CHAT_TEMPLATES[name])
        assert any("zq" in segment.text for segment in segments)
        assert not any("zq" in segment.text for segment in segments if segment.special)


@pytest.mark.parametrize("name", ["internlm2", "qwen2.5", "chatml", "llama3"])
def test_a_prompt_is_the_beginning_of_the_conversation_that_goes_on(name: str):
    rng = random.Random(name)
    for _ in range(50):
        sample = FORMATS["openai"](made_row(rng, **ROW_KINDS[name]))
        said = {**sample["messages"][-1], "loss": True}
        earlier = {**sample, "messages": sample["messages"][:-1]}
        prompt = render(earlier, CHAT_TEMPLATES[name], add_generation_prompt=True)
        whole = render({**sample, "messages": [*earlier["messages"], said]}, CHAT_TEMPLATES[name])
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt)].trained


def as_reply(message: dict[str, Any]) -> tuple[str, list[Any], None]:
    """What `parse_reply` gives for a message: arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls", []):
        if call["type"] == "function":
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call = {"type": "function", "function": {**call["function"], "arguments": arguments}}
        calls.append({key: value for key, value in call.items() if key != "id"})
    return message.get("content") or "", calls, None


@pytest.mark.parametrize("name", ["internlm2", "qwen2.5", "llama3"])
def test_a_reply_is_parsed_to_what_was_rendered(name: str):
    rng = random.Random(name)
    template = CHAT_TEMPLATES[name]
    for _ in range(100):
        sample = FORMATS["openai"](made_row(rng, **ROW_KINDS[name]))
        messages = split_parallel_calls(sample["messages"]) if name == "internlm2" else sample["messages"]
        turns = [message for message in messages if message["role"] == "assistant" and message.get("loss", True)]
        segments = render({**sample, "messages": messages}, template)
        texts = "".join(segment.text for segment in segments if segment.trained).split(template.turn_end)[:-1]
        for message, text in zip(turns, texts, strict=True):
            assert parse_reply(text + template.turn_end, template) == as_reply(message)


CALL_TEXT = '<|action_start|><|plugin|>\n{"name": "get_weather", "%s": {"city": "巴黎"}}'


@pytest.mark.parametrize("key", ["parameters", "arguments"])
@pytest.mark.parametrize("end", ["<|action_end|>\n<|im_end|>\n", "<|action_end|><|im_end|>", "\n<|action_end|>", ""])
def test_internlm2_calls_are_read_in_every_form_that_is_about(key: str, end: str):
    content, calls, error = parse_reply("好的。" + CALL_TEXT % key + end, INTERNLM2)
    assert (content, error) == ("好的。", None)
    assert calls == [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "巴黎"}'}}]


@pytest.mark.parametrize(
    "text",
    [
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city"<|action_end|>\n',
        '<|action_start|><|plugin|>\n["get_weather"]<|action_end|>\n',
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": "x"}<|action_end|>',
        '<|action_start|>{"name": "get_weather", "parameters": {}}<|action_end|>',
        "<|action_start|><|interpreter|>\nprint(1)<|action_end|>",
        "<|action_start|>",
    ],
)
def test_a_broken_call_stays_in_the_content_and_is_flagged(text: str):
    content, calls, error = parse_reply("Wait." + text + "<|im_end|>", INTERNLM2)
    assert (content, calls) == ("Wait." + text, [])
    assert error is not None
    assert "could not be read" in error


def test_code_is_read_with_its_own_fences_inside():
    code = 's = """\n```\n"""\n'
    segments = render({"messages": [USER, calling(code_call(code))], "tools": TOOLS}, INTERNLM2)
    text = "".join(segment.text for segment in segments if segment.trained)
    assert parse_reply(text, INTERNLM2).tool_calls == [code_call(code)]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_words_alone_are_the_content(name: str):
    template = CHAT_TEMPLATES[name]
    for end in (template.turn_end, template.turn_end + template.separator, template.text_end, ""):
        assert parse_reply(' {"a": 1}\n' + end, template) == (' {"a": 1}\n', [], None)


def test_templates_are_data():
    for name, template in CHAT_TEMPLATES.items():
        assert template.name == name
        assert dataclasses.replace(template) == template
        assert set(template.stop_tokens) <= set(template.special_tokens)
        assert template.turn_end in template.stop_tokens
