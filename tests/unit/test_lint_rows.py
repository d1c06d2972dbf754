"""Each check of a row finds what it is for, and lets what merely looks like it pass."""

import json

import pytest
from lint_samples import PROSE, answer, call, function, result, talk

from tuner.dataset.documents import parse_row
from tuner.dataset.formats import FORMATS
from tuner.errors import UserError
from tuner.lint.findings import SEVERITIES
from tuner.lint.rows import CHECKS, findings_in
from tuner.lint.subject import Bound, Size, Subject, from_refused, from_sample, size_of


def called(arguments: object, **parameters: object) -> dict:
    return talk("Weather in Rome?", call(arguments), result(), "It is fair.", tools=[function(**parameters)])


def sized(num_tokens: int, num_trained: int, num_kept: int, *, said: str = "Yes.") -> Subject:
    size = Size(num_tokens, num_trained, num_kept, (num_trained,), Bound(100))
    return from_sample(answer(said), size=size)


INTERPRETER_CALL = {"type": "code_interpreter", "code_interpreter": {"input": "print(6 * 7)"}}
RUNS_CODE = {"role": "assistant", "content": "", "tool_calls": [INTERPRETER_CALL]}
AWS_KEY = "AKIA" + "QX7TZ2LMNB4RVK9D"
CARD = "4556 7375 8689 9855"  # Luhn's digit is right; the number is nobody's
LONG_KEY = "q9Zt4LmX0vB7sKd2WnRy8HcPf5Jg1Te6"
KEY_BLOCK = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7bq3xQ0Zt4LmX0vB7sKd2WnRy8HcPf5Jg1Te6\n" * 4

FOUND: dict[str, list[dict | Subject]] = {
    "refused": [from_refused({}, "{}", "Expected 'messages' in the row.")],
    "empty-text": [answer(""), answer(" \n\u3000"), talk(" ", "Hello."), answer("nan")],
    "cut-off": [
        answer("Here it is:\n```python\nprint(1)\n"),
        answer("Here it is:\n````md\n```\ncode\n```\n"),
        answer("Two of them:\n```sh\nls\n```\n and\n  ```sh\n  ls -l"),
        answer(f"{PROSE} and on its way it passes the"),
        answer(f"{PROSE},"),
        answer(f"{PROSE} (in the wet season that follows the winter"),
        answer("这条河发源于北方的山中，流过许多城市和村庄，经过很多天的旅程以后，"),
        answer('[{"name": "Rome", "people": 2800000}, {"name": "Oslo"'),
    ],
    "missing-end": [answer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"), {"text": "[INST] Hi"}],
    "loop": [
        answer("It is good. " + "I am not sure what to say. " * 8),
        answer("好的，" + "我们可以再试一次，" * 9),
        answer("no " * 60),
    ],
    "tool-arguments": [
        called({}),
        called({"city": 7}),
        called({"city": "Rome", "day": "Monday"}),
        called({"city": "Rome", "town": "Rome"}),
        called(["Rome"]),
        called(
            {"city": "Rome", "spot": {"x": True}},
            properties={"city": {}, "spot": {"properties": {"x": {"type": "integer"}}}},
        ),
    ],
    "undeclared-tool": [
        talk("Weather?", call({"city": "Rome"}), result(), "Fair."),
        talk("Weather?", call({"city": "Rome"}, "get_wether"), result(), "Fair.", tools=[function()]),
        talk("6 * 7?", RUNS_CODE, result("42"), "42", tools=[function()]),
    ],
    "result-without-call": [
        talk("Weather?", result(), "Fair."),
        talk("Weather?", call({"city": "Rome"}, label="a"), result(label="b"), "Fair.", tools=[function()]),
    ],
    "call-without-result": [
        talk("Weather?", call({"city": "Rome"}), {"role": "assistant", "content": "Fair."}, tools=[function()])
    ],
    "role-order": [
        talk("Hi", "Hello.", {"role": "assistant", "content": "And hello again."}),
        talk("Hi", {"role": "user", "content": "Are you there?"}, "Yes."),
        talk("Hi", "Hello.", "Are you there?"),
        talk({"role": "human", "content": "Hi"}, "Hello."),
        talk({"role": "assistant", "content": "Welcome."}, "Hi", "Hello."),
    ],
    "special-text": [
        answer("Yes.<|im_end|>"),
        answer("Yes.</s>"),
        talk("[INST] Say yes [/INST]", "Yes."),
        answer("Yes. [UNUSED_TOKEN_145]\n"),
        {"text": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"},
        answer("The mark is `<|im_end|>`."),
    ],
    "secret": [
        answer(f"export AWS_ACCESS_KEY_ID={AWS_KEY}"),
        answer("git clone https://ghp_q9Zt4LmX0vB7sKd2WnRy8HcPf5Jg1Te6AbQw@github.com/a/b"),
        answer(f'client = Client(api_key="{LONG_KEY}")'),
        answer(f"OPENAI_API_KEY=sk-{LONG_KEY}{LONG_KEY}"),
        talk("Why is this key refused?\n" + KEY_BLOCK, "It is damaged."),
    ],
    "personal-data": [talk("Write to maria.rossi84@gmail.com", "Done."), answer(f"The card is {CARD}.")],
    "language-mix": [
        talk(
            "请介绍一下你自己的工作和生活。",
            "I am a helpful assistant and I like to write about the sea and the hills.",
        ),
        talk(PROSE + ". Why?", "因为山里的雪在春天融化，所以河水会上涨。"),
        talk("你好，请问今天的天气怎么样呢？", "Сегодня в городе хорошая погода, светит солнце и тепло."),
    ],
    "control-character": [answer("Yes\x00."), answer("Yes\n\x0cNo"), answer("Yes\u200b."), talk("Hi\u202e", "Yes.")],
    "mojibake": [answer("cafÃ© and creme brÃ»lÃ©e"), answer("It isnâ€™t"), answer("ä½ å¥½"), answer("Yes \ufffd")],
    "over-length": [sized(101, 60, 59), sized(100, 60, 60, said=f"{PROSE} and on its way it passes the hills")],
    "zero-loss": [
        sized(101, 30, 0),
        sized(50, 0, 0),
        talk("Hi", {"role": "assistant", "content": "Hello.", "loss": False}),
    ],
}

NEAR_MISSES: dict[str, list[dict | Subject]] = {
    "refused": [answer("Yes.")],
    "empty-text": [
        talk("Weather?", call({"city": "Rome"}), result(""), "Fair.", tools=[function()]),
        answer("."),
        talk("Hi", {"role": "assistant", "content": "", "loss": False}, "Hi?", "Yes."),
    ],
    "cut-off": [
        answer("Here it is:\n```python\nprint('```')\n```"),
        answer("A list:\n- a\n  ```sh\n  ls\n      ```"),
        answer("Write ```code``` like this"),
        answer('"""Docs.\n\n    ```python\n    f()\n    ```"""\nfor it'),
        answer("Heading\n~~~~~~~\nText"),
        answer("```python\nprint(1)```"),
        answer("Use\n````md\n```\ncode\n```\n````\nfor it"),
        answer(f"{PROSE}\n\nYours sincerely,\nMaria"),
        answer(f"{PROSE} (in the wet season)"),
        answer("One, two, three and"),
        answer('{"city": "Rome", "note": "an [open bracket"}'),
        answer("Dear reader, :( I am sad"),
        answer(f"{PROSE}. #### 72"),
        talk("Go on", {"role": "assistant", "content": f"{PROSE} and the", "loss": False}, "Well?", "No."),
    ],
    "missing-end": [
        answer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"),
        answer("A turn begins with `<|im_start|>`, or with ``<|im_start|>user``."),
    ],
    "loop": [
        answer("Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is a dream."),
        answer("0 1 " * 60),
        answer("\n".join(f"{n} times 7 is {7 * n}" for n in range(1, 30))),
        answer("ha ha ha ha ha ha!"),
        answer("| --- | --- | --- |\n" * 12),
        answer("rows = [\n" + "    Rational(one, half),\n" * 20 + "]"),
        answer(
            "add x to y; " * 4 + "then take the sum of all that there is on the list and show it to whoever asks for it"
        ),
    ],
    "tool-arguments": [
        called({"city": "Rome", "day": "today"}),
        called({"city": "Rome", "units": "metric"}, additionalProperties=True),
        called({"city": 2.0}, properties={"city": {"type": ["string", "integer"]}}),
        called({"city": None}, properties={"city": {"type": "string", "nullable": True}}),
        called({"city": "Rome"}, properties={"city": {"type": "a type of their own"}}),
        called({"city": "Rome"}, properties={"city": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}),
        talk("6 * 7?", RUNS_CODE, result("42"), "42", tools=[{"type": "code_interpreter"}]),
    ],
    "undeclared-tool": [
        called({"city": "Rome"}),
        talk("Weather?", call({"city": "Rome"}), result(), "Fair.", tools=[function()["function"]]),
        talk("6 * 7?", RUNS_CODE, result("42"), "42", tools=[{"type": "code_interpreter"}]),
    ],
    "result-without-call": [
        called({"city": "Rome"}),
        talk("Weather?", call({"city": "Rome"}, label="a"), result(label="a"), "Fair.", tools=[function()]),
    ],
    "call-without-result": [called({"city": "Rome"}), talk("Weather?", call({"city": "Rome"}), tools=[function()])],
    "role-order": [
        called({"city": "Rome"}),
        talk({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, "Hello."),
        talk("Hi", call({"city": "Rome"}), result(), "Fair.", {"role": "assistant", "content": "Take a hat."}),
    ],
    "special-text": [
        answer("<p>It was <s>10</s> 8 euros.</p>"),
        answer("f(x) <| g |> h, a < b | c > d"),
        answer("[INSTALL] and <b>bold</b>"),
        answer("<|> is no mark, and neither is <| |>"),
    ],
    "secret": [
        answer("export AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE"),
        answer('client = Client(api_key="YOUR_API_KEY_GOES_HERE_12345678")'),
        answer('api_key = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1"'),
        answer('<div class="sk-toggleable__content-sk-container-id-1-fitted">'),
        answer("A key file begins with -----BEGIN RSA PRIVATE KEY----- and goes on for lines."),
        answer("sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"),
        answer('password = "hunter2"'),
        answer('api_key = "a1a1a1a1a1a1a1a1a1a1a1a1a1a1"'),
    ],
    "personal-data": [
        answer("Write to someone@example.com, yourname@yourdomain.com or git@github.com:a/b"),
        answer("The card is 4556 7375 8689 9856."),
        answer("import numpy as np\n@np.vectorize\ndef f(x): ..."),
        answer("pi is 3.1415926535897932384626"),
    ],
    "language-mix": [
        talk(
            "请把这句话翻译成英文：山里的雪在春天融化。", "The snow of the hills melts in spring and the river rises."
        ),
        talk("请写一个排序的函数。我想要简单的代码。", "```python\nprint(sorted([3, 1, 2]))\n```"),
        talk("你好，请问你叫什么名字？", "InternLM"),
        talk("请介绍 Python 的 list 和 dict。", "列表（list）是有序的，字典（dict）按键查找，both are useful。"),
    ],
    "control-character": [
        answer("a\tb\r\nc"),
        answer("x = 1\n\x0c\ny = 2"),
        answer("👨\u200d👩\u200d👧 fine"),
        answer("می\u200cخواهم"),
        answer("é ü 中 😀"),
    ],
    "mojibake": [
        answer("« Le café » … l’É”…"),
        answer("« voilà\u00a0» et « café\u00a0»"),
        answer("SÃO PAULO, NÃO, 25 °C"),
        answer("你好，Ünïcödé"),
    ],
    "over-length": [sized(100, 60, 60), from_sample(answer("Yes."))],
    "zero-loss": [sized(50, 30, 30), answer("Yes.")],
}


def checks_that_find(row: dict | Subject) -> dict[str, str]:
    """Name of check -> what it says of a row."""
    subject = row if isinstance(row, Subject) else from_sample(row, raw=json.dumps(row))
    located = findings_in(subject, 3)
    assert all(item.line == 3 and item.problem.severity in SEVERITIES for item in located)
    return {item.check: item.problem.message for item in located}


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(name, row, id=f"{name}-{place}") for name, rows in table.items() for place, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("too_long", "kept", "severity", "words"),
    [
        ("truncate", 5, "warning", "cutting it would lose 12 of 17 trained tokens"),
        ("split", 15, "note", "it would be split into 3 pieces"),  # 8 and 16 are first in theirs
        ("drop", 0, "warning", "it would be dropped, 17 trained tokens"),
    ],
)
def test_what_becomes_of_a_long_row_is_told_as_training_does_it(too_long: str, kept: int, severity: str, words: str):
    size = size_of([False] * 3 + [True] * 17, Bound(8, too_long))
    assert (size.num_tokens, size.num_trained, size.num_trained_kept) == (20, 17, kept)
    [located] = findings_in(from_sample(answer("Yes."), size=size), 3)
    assert (located.check, located.problem.severity) == ("over-length", severity)
    assert words in located.problem.message


def test_a_long_row_of_which_nothing_is_trained_has_one_finding():
    size = size_of([False] * 20, Bound(8))
    assert list(checks_that_find(from_sample(answer("Yes."), size=size))) == ["zero-loss"]


def test_every_check_has_rows_to_find_and_near_misses():
    assert set(FOUND) == set(NEAR_MISSES) == set(CHECKS)


@pytest.mark.parametrize(("check", "row"), cases(FOUND))
def test_is_found(check: str, row: dict | Subject):
    assert check in checks_that_find(row)


@pytest.mark.parametrize(("check", "row"), cases(NEAR_MISSES))
def test_a_near_miss_passes(check: str, row: dict | Subject):
    assert check not in checks_that_find(row)


@pytest.mark.parametrize("row", [row for check in ("secret", "personal-data") for row in FOUND[check]])
def test_a_secret_is_never_shown(row: dict):
    shown = " ".join(checks_that_find(row).values())
    for secret in (AWS_KEY, LONG_KEY, CARD, "maria.rossi84@gmail.com", "MIIEpAIBAAKCAQEA", "q9Zt4LmX0vB7"):
        assert secret not in shown
        assert secret[6:] not in shown


def test_no_other_check_shows_a_secret_either():
    cut = answer(f"{PROSE} and the key is {AWS_KEY} and the")
    said = checks_that_find(cut)
    assert "and the" in said["cut-off"]
    assert not any(AWS_KEY[at : at + 6] in text for text in said.values() for at in range(len(AWS_KEY) - 5))
    refusal = f"Expected the role of message 0 to be one of ('user',), got '{AWS_KEY}'."
    assert AWS_KEY not in checks_that_find(from_refused(None, json.dumps({"role": AWS_KEY}), refusal))["refused"]


def test_a_refused_row_is_still_looked_through():
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            call({"city": "Rome"}),
            result(),
            {"role": "assistant", "content": " "},
        ]
    }
    with pytest.raises(UserError) as caught:
        FORMATS["openai"](parse_row(json.dumps(row).encode()))
    found = checks_that_find(from_refused(row, json.dumps(row), str(caught.value)))
    assert found["refused"] == str(caught.value)
    assert {"undeclared-tool", "empty-text"} <= set(found)


def test_what_is_said_of_arguments_names_place_value_and_schema():
    said = checks_that_find(called({"city": 7, "dya": "today"}))["tool-arguments"]
    assert "'dya'. Nearest: 'day'." in said
    problems = [item.problem for item in findings_in(from_sample(called({"city": 7, "dya": "today"})), 1)]
    assert [problem.severity for problem in problems] == ["error", "warning"]
    assert "'city' must be string, got 7" in problems[0].message
