"""Held-out tool calls are counted right only when name and every argument are, whatever stands around them."""

import json
import math
from typing import Any

import pytest
import torch

from tuner.dataset.chat_template import CHAT_TEMPLATES, parse_reply, render
from tuner.demo.dialogues import dialogues
from tuner.evaluate.tool_calls import (
    Outcome,
    ToolCallReport,
    evaluate_tool_calls,
    generate_greedily,
    is_right,
    tool_call_cases,
    wilson_interval,
)
from tuner.model.build import build_llm
from tuner.model.tokenizer import build_tokenizer

TEMPLATE = CHAT_TEMPLATES["internlm2"]
WEATHER_ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "北京明天天气怎么样？"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"city": "北京", "day": 2}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "晴"},
        {"role": "assistant", "content": "晴。"},
        {"role": "user", "content": "And 2**10?"},
        {
            "role": "assistant",
            "content": "I run code.",
            "tool_calls": [{"id": "b", "type": "code_interpreter", "code_interpreter": {"input": "print(2**10)"}}],
        },
    ],
    "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"type": "code_interpreter"},
    ],
}


class Oracle:
    """A model that writes what it is told to, whatever it is given; it wants the prompts padded on the left."""

    device = torch.device("cpu")
    training = False

    def __init__(self, replies: dict[tuple[int, ...], list[int]]) -> None:
        self.replies = replies

    def eval(self) -> "Oracle":
        return self

    def train(self, mode: bool = True) -> "Oracle":
        return self

    def generate(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert kwargs["do_sample"] is False
        assert bool((attention_mask.diff(dim=1) >= 0).all()), "padding belongs on the left"
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask)]
        replies = [self.replies[prompt] for prompt in prompts]
        longest = max(map(len, replies))
        padded = torch.tensor([reply + [kwargs["pad_token_id"]] * (longest - len(reply)) for reply in replies])
        return torch.cat([input_ids, padded], dim=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer("demo:model")


def written(call: dict[str, Any]) -> str:
    return f"<|action_start|><|plugin|>\n{json.dumps(call, ensure_ascii=False)}<|action_end|>\n<|im_end|>"


def test_every_turn_with_calls_is_a_case_with_all_that_came_before_it() -> None:
    first, second = tool_call_cases([WEATHER_ROW])
    assert first.prompt["messages"] == WEATHER_ROW["messages"][:1]
    assert second.prompt["messages"] == WEATHER_ROW["messages"][:5]
    assert (first.tool, first.language, second.tool, second.language) == ("f", "zh", "interpreter", "en")


@pytest.mark.parametrize(
    ("call", "right"),
    [
        ({"name": "f", "parameters": {"city": "北京", "day": 2}}, True),
        ({"name": "f", "parameters": {"day": 2, "city": "北京"}}, True),
        ({"name": "f", "arguments": {"day": 2, "city": "北京"}}, True),
        ({"name": "g", "parameters": {"city": "北京", "day": 2}}, False),
        ({"name": "f", "parameters": {"city": "上海", "day": 2}}, False),
        ({"name": "f", "parameters": {"city": "北京 ", "day": 2}}, False),
        ({"name": "f", "parameters": {"city": "北京", "day": "2"}}, False),
        ({"name": "f", "parameters": {"city": "北京"}}, False),
        ({"name": "f", "parameters": {"city": "北京", "day": 2, "unit": "C"}}, False),
    ],
)
def test_a_call_is_right_only_with_its_name_and_every_argument(call: dict[str, Any], right: bool) -> None:
    case = next(tool_call_cases([WEATHER_ROW]))
    assert is_right(case, written(call), TEMPLATE) is right


def test_what_is_said_before_the_call_does_not_count_but_a_second_call_does() -> None:
    case = next(tool_call_cases([WEATHER_ROW]))
    call = written({"name": "f", "parameters": {"city": "北京", "day": 2}})
    assert is_right(case, "Let me see." + call, TEMPLATE)
    assert not is_right(case, call.replace("<|im_end|>", "") + call, TEMPLATE)
    assert not is_right(case, "It will be sunny.<|im_end|>", TEMPLATE)
    assert not is_right(case, '<|action_start|><|plugin|>\n{"name": "f", "par', TEMPLATE)


def test_code_must_be_the_same_text() -> None:
    case = list(tool_call_cases([WEATHER_ROW]))[1]
    form = "<|action_start|><|interpreter|>\n```python\n{}\n```<|action_end|>\n<|im_end|>"
    assert is_right(case, form.format("print(2**10)"), TEMPLATE)
    assert not is_right(case, form.format("print(2 ** 10)"), TEMPLATE)
    assert not is_right(case, form.format("print(2**11)"), TEMPLATE)


def test_a_model_that_writes_the_truth_scores_all_and_one_that_errs_loses_just_that(tokenizer: Any) -> None:
    rows = dialogues(30, "heldout", 5)
    cases = list(tool_call_cases(rows))
    from tuner.dataset.tokenize import Encoder

    encoder = Encoder.from_tokenizer(tokenizer, TEMPLATE)
    replies = {}
    position = 0
    for row in rows:
        for place, message in enumerate(row["messages"]):
            if not message.get("tool_calls"):
                continue
            prompt = render(cases[position].prompt, TEMPLATE, add_generation_prompt=True)
            whole = render({**row, "messages": row["messages"][: place + 1]}, TEMPLATE)
            prompt_ids, whole_ids = (document.ids.tolist() for document in encoder.encode([prompt, whole]))
            assert whole_ids[: len(prompt_ids)] == prompt_ids
            replies[tuple(prompt_ids)] = whole_ids[len(prompt_ids) :]
            position += 1
    report = evaluate_tool_calls(Oracle(replies), tokenizer, rows, chat_template=TEMPLATE, batch_size=7)
    assert report.accuracy == 1.0
    assert [outcome.case for outcome in report.outcomes] == cases
    spoilt = next(iter(replies))
    replies[spoilt] = tokenizer("nothing", add_special_tokens=False)["input_ids"]
    report = evaluate_tool_calls(Oracle(replies), tokenizer, rows, chat_template=TEMPLATE, batch_size=7)
    assert [outcome.written for outcome in report.failures] == ["nothing"]
    assert f"{len(cases) - 1} of {len(cases)}" in report.table()


def test_an_untrained_model_is_right_nowhere_and_a_batch_changes_nothing(tokenizer: Any) -> None:
    llm = build_llm("demo:model", weights="random")
    rows = dialogues(4, "heldout", 1)
    reports = [
        evaluate_tool_calls(llm, tokenizer, rows, chat_template=TEMPLATE, max_new_tokens=6, batch_size=size)
        for size in (1, 5)
    ]
    assert reports[0].accuracy == 0.0
    assert [o.written for o in reports[0].outcomes] == [o.written for o in reports[1].outcomes]


def test_generation_ends_before_its_first_stop_token_and_keeps_the_mode() -> None:
    llm = Oracle({(5, 6): [7, 9, 8, 9], (4,): [9]})
    assert generate_greedily(llm, [[5, 6], [4]], [9], 4) == [[7], []]
    real = build_llm("demo:model", weights="random").train()
    generate_greedily(real, [[5, 6]], [9], 1)
    assert real.training


def test_the_table_counts_by_tool_and_language() -> None:
    first, second = tool_call_cases([WEATHER_ROW])
    report = ToolCallReport((Outcome(first, "", True), Outcome(first, "", False), Outcome(second, "", True)))
    assert report.count("f") == (1, 2)
    assert report.count("f", "en") == (0, 0)
    assert report.count(language="en") == (1, 1)
    assert report.accuracy == pytest.approx(2 / 3)
    assert "exactly right: 2 of 3 = 66.7 %" in report.table().replace("%", " %").replace("  %", " %")


@pytest.mark.parametrize(("right", "total"), [(0, 20), (18, 20), (190, 200), (200, 200)])
def test_the_interval_holds_the_shares_that_a_score_test_does_not_reject(right: int, total: int) -> None:
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high + 1e-12 <= 1 + 1e-12
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:  # at the bounds the score statistic is exactly the quantile
            score = abs(right / total - bound) / math.sqrt(bound * (1 - bound) / total)
            assert score == pytest.approx(1.959964, rel=1e-6)


def test_no_calls_at_all_is_an_error_not_a_score(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no assistant turn with tool calls"):
        evaluate_tool_calls(Oracle({}), tokenizer, [{"messages": []}], chat_template=TEMPLATE)


def test_the_parser_of_the_report_is_the_inverse_of_rendering() -> None:
    call = written({"name": "f", "parameters": {"city": "北京", "day": 2}})
    (parsed,) = parse_reply(call, TEMPLATE).tool_calls
    assert json.loads(parsed["function"]["arguments"]) == {"city": "北京", "day": 2}
