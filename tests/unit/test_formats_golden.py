"""Transcripts made by hand from the formats' public descriptions: row, sample and InternLM2's text of it."""

import copy
from typing import Any

import pytest

from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.formats import EXAMPLES, FORMATS

TEMPLATE = CHAT_TEMPLATES["internlm2"]


def system(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **more}


def tool(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def code(text: str) -> dict[str, Any]:
    return {"type": "code_interpreter", "code_interpreter": {"input": text}}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


WEATHER = {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}
WEATHER_TEXT = '[{"name": "get_weather", "description": "d", "parameters": {"type": "object"}}]'
DECLARED = f"<|im_start|>system name=<|plugin|>\n{WEATHER_TEXT}<|im_end|>\n"
CALLED = (
    '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Paris"}}<|action_end|>\n<|im_end|>\n'
)
RAN = "<|action_start|><|interpreter|>\n```python\nprint(6)\n```<|action_end|>\n<|im_end|>\n"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
PLUGIN_RESULT = "<|im_start|>environment name=<|plugin|>\n"
CODE_RESULT = "<|im_start|>environment name=<|interpreter|>\n"
END = "<|im_end|>\n"
APIS = (
    "Answer the questions. You have access to the following APIs:\n"
    '1. get_weather: d Parameters: [{"name": "city", "description": "A town.", "required": "True"}, '
    '{"name": "day", "description": "Which.", "required": "False"}]\n\n'
    "Use the following format:\n\nThought: what to do\nAction: one of [get_weather]\nAction Input: the input\n"
)
PLUGIN_LIST = (
    'Plugins:\n\n1. {"plugin_name": "w", "plugin_schema_for_model": {"name": "w", "description": "all", "paths": '
    '[{"name": "get_weather", "description": "d", "parameters": [{"name": "city", "description": "A town.", '
    '"required": "True"}]}]}}'
)
API_SCHEMA = {
    "name": "get_weather",
    "description": "d",
    "parameters": {
        "type": "object",
        "properties": {"city": {"description": "A town."}, "day": {"description": "Which."}},
        "required": ["city"],
    },
}
PLUGIN = "<|im_start|>system name=<|plugin|>\n"
SCHEMA_TEXT = '[{"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {"city": '
API_TEXT = SCHEMA_TEXT + '{"description": "A town."}, "day": {"description": "Which."}}, "required": ["city"]}}]'
PLUGIN_TEXT = SCHEMA_TEXT + '{"description": "A town."}}, "required": ["city"]}}]'
BFCL_TEXT = (
    '[{"name": "w.get", "description": "d", "parameters": {"type": "object", "properties": {'
    '"city": {"type": "string"}, '
    '"days": {"type": "array", "items": {"type": "object", "properties": {"day": {}}}}, '
    '"unit": {"type": "string"}, "near": {"type": "array", "items": {"type": "number"}}}, '
    '"required": ["city", "days"]}}]'
)
BFCL_CALL = '{"name": "w.get", "parameters": {"city": "Paris", "days": [{"day": "Mon"}], "near": []}}'
EMPTY_CALL = '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {}}<|action_end|>\n<|im_end|>\n'
MARKED = '<|action_start|><|plugin|>\n{"name": "get_weather", "arguments": {"city": "Paris"}}<|action_end|>\n'
PLUGIN_SCHEMA = {
    **API_SCHEMA,
    "parameters": {"type": "object", "properties": {"city": {"description": "A town."}}, "required": ["city"]},
}
ANSWERED = [user("Rain?"), assistant("", call("get_weather", city="Paris")), tool("dry"), assistant("No.")]
ANSWERED_TEXT = f"{USER}Rain?{END}{ASSISTANT}{CALLED}{PLUGIN_RESULT}dry{END}{ASSISTANT}No.{END}"
# name -> format, row, sample, what InternLM2 reads behind <s>
GOLDEN: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "openai: calls with content, a result by id, a system turn between": (
        "openai",
        {
            "messages": [
                system("S"),
                user("Rain?"),
                {
                    "role": "assistant",
                    "content": "I look.",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                        }
                    ],
                },
                tool("dry", tool_call_id="1"),
                assistant("No.", weight=0),
                system("Be brief."),
                user("Sure?"),
                assistant("Yes."),
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
        {
            "messages": [
                system("S"),
                user("Rain?"),
                assistant("I look.", {"id": "1", **call("get_weather", city="Paris")}),
                tool("dry", tool_call_id="1"),
                assistant("No.", loss=False),
                system("Be brief."),
                user("Sure?"),
                assistant("Yes."),
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
        f"<|im_start|>system\nS{END}{DECLARED}{USER}Rain?{END}{ASSISTANT}I look.{CALLED}{PLUGIN_RESULT}dry{END}"
        f"{ASSISTANT}No.{END}<|im_start|>system\nBe brief.{END}{USER}Sure?{END}{ASSISTANT}Yes.{END}",
    ),
    "sharegpt: a call, a result, tools as text": (
        "sharegpt",
        {
            "conversations": turns(
                ("human", "Rain?"),
                ("function_call", '{"name": "get_weather", "arguments": {"city": "Paris"}}'),
                ("observation", "dry"),
                ("gpt", "No."),
            ),
            "tools": WEATHER_TEXT,
        },
        {"messages": ANSWERED, "tools": [WEATHER]},
        DECLARED + ANSWERED_TEXT,
    ),
    "sharegpt: a thought before two calls, a result kept as JSON, a system column": (
        "sharegpt",
        {
            "system": "S",
            "conversations": turns(
                ("user", "Rain?"),
                ("gpt", "Both."),
                ("function_call", '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_weather"}]'),
                ("observation", {"rain": 0}),  # type: ignore[arg-type]
                ("tool", "wet"),
                ("assistant", "No."),
            ),
            "tools": [WEATHER],
        },
        {
            "messages": [
                system("S"),
                user("Rain?"),
                assistant("Both.", call("get_weather", city="Paris"), call("get_weather")),
                tool('{"rain": 0}'),
                tool("wet"),
                assistant("No."),
            ],
            "tools": [WEATHER],
        },
        f"<|im_start|>system\nS{END}{DECLARED}{USER}Rain?{END}{ASSISTANT}Both.{CALLED}"
        f'{PLUGIN_RESULT}{{"rain": 0}}{END}{ASSISTANT}{EMPTY_CALL}{PLUGIN_RESULT}wet{END}{ASSISTANT}No.{END}',
    ),
    "sharegpt: without tools, a turn without loss": (
        "sharegpt",
        {
            "conversations": [
                *turns(("human", "a")),
                {"from": "gpt", "value": "b", "loss": False},
                *turns(("human", "c"), ("gpt", "d")),
            ],
            "tools": "[]",
        },
        {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("d")]},
        f"{USER}a{END}{ASSISTANT}b{END}{USER}c{END}{ASSISTANT}d{END}",
    ),
    "alpaca: history and input": (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
        {"messages": [user("a"), assistant("b"), user("Add.\n1 2"), assistant("3")]},
        f"{USER}a{END}{ASSISTANT}b{END}{USER}Add.\n1 2{END}{ASSISTANT}3{END}",
    ),
    "qa: GSM8K": (
        "qa",
        {"question": "6 * 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
        {"messages": [user("6 * 7?"), assistant("6 * 7 = <<6*7=42>>42\n#### 42")]},
        f"{USER}6 * 7?{END}{ASSISTANT}6 * 7 = <<6*7=42>>42\n#### 42{END}",
    ),
    "qa: prompt and completion": (
        "qa",
        {"prompt": "a", "completion": "b", "system": "S"},
        {"messages": [system("S"), user("a"), assistant("b")]},
        f"<|im_start|>system\nS{END}{USER}a{END}{ASSISTANT}b{END}",
    ),
    "text": ("text", {"text": " \n白日"}, {"text": " \n白日"}, " \n白日</s>"),
    "repository: what is imported first, README before code, a fence longer than those inside": (
        "repository",
        {
            "files": [
                {"path": "b.py", "text": "import a\n"},
                {"path": "a.py", "text": "X = 1"},
                {"path": "README.md", "text": "```\nb\n```\n"},
            ]
        },
        {
            "texts": [
                "README.md\n````markdown\n```\nb\n```\n````\n\n",
                "a.py\n```python\nX = 1\n```\n\n",
                "b.py\n```python\nimport a\n```\n\n",
            ]
        },
        "README.md\n````markdown\n```\nb\n```\n````\n\na.py\n```python\nX = 1\n```\n\n"
        "b.py\n```python\nimport a\n```\n\n</s>",
    ),
    "xtuner: two exchanges, one without loss": (
        "xtuner",
        {
            "conversation": [
                {"system": "S", "input": "a", "output": "b", "need_eos_token": True, "output_with_loss": False},
                {"system": "", "input": "c", "output": "d", "output_with_loss": True},
            ]
        },
        {"messages": [system("S"), user("a"), assistant("b", loss=False), user("c"), assistant("d", loss=True)]},
        f"<|im_start|>system\nS{END}{USER}a{END}{ASSISTANT}b{END}{USER}c{END}{ASSISTANT}d{END}",
    ),
    "xtuner: pre-training": (
        "xtuner",
        {"conversation": [{"input": "", "output": "Once upon a time."}]},
        {"text": "Once upon a time."},
        "Once upon a time.</s>",
    ),
    "ftdp: the lab's roles, schemas as one line of JSON": (
        "ftdp",
        {
            "messages": [
                system("S", type="meta"),
                system(WEATHER_TEXT, name="plugin"),
                user("Rain?"),
                {"role": "thought", "content": "I look."},
                {"role": "tool", "name": "plugin", "content": '{"name":"get_weather","parameters":{"city":"Paris"}}'},
                {"role": "environment", "name": "plugin", "content": "dry"},
                assistant("No.", loss=False),
                user("Sure?", name="ann"),
                assistant("Yes."),
            ]
        },
        {
            "messages": [
                system("S"),
                user("Rain?"),
                assistant("I look.", call("get_weather", city="Paris")),
                tool("dry"),
                assistant("No.", loss=False),
                user("Sure?", name="ann"),
                assistant("Yes."),
            ],
            "tools": [WEATHER],
        },
        f"<|im_start|>system\nS{END}{DECLARED}{USER}Rain?{END}{ASSISTANT}I look.{CALLED}{PLUGIN_RESULT}dry{END}"
        f"{ASSISTANT}No.{END}<|im_start|>user name=ann\nSure?{END}{ASSISTANT}Yes.{END}",
    ),
    "ftdp: tools told in words stay as they are written, and a given answer has no loss": (
        "ftdp",
        {
            "messages": [
                system("You may call get_weather.", name="plugin"),
                user("Hi"),
                assistant("Hello.", type="prefix"),
                user("Rain?"),
                assistant(MARKED),
                {"role": "environment", "content": "dry", "name": "plugin"},
                assistant("No."),
            ]
        },
        {
            "messages": [
                system("You may call get_weather.", name="plugin"),
                user("Hi"),
                assistant("Hello.", loss=False),
                *ANSWERED,
            ]
        },
        f"<|im_start|>system name=<|plugin|>\nYou may call get_weather.{END}{USER}Hi{END}{ASSISTANT}Hello.{END}"
        + ANSWERED_TEXT,
    ),
    "lagent: inner steps with code": (
        "lagent",
        {
            "messages": [system("Run Python.", name="interpreter"), user("3!?")],
            "inner_steps": [
                {"role": "language", "content": "I run it."},
                {
                    "role": "tool",
                    "name": "interpreter",
                    "content": {"name": "IPythonInterpreter", "parameters": {"command": "```python\nprint(6)\n```"}},
                },
                {"role": "environment", "name": "interpreter", "content": "6"},
                {"role": "language", "content": "Six."},
            ],
        },
        {
            "messages": [user("3!?"), assistant("I run it.", code("print(6)")), tool("6"), assistant("Six.")],
            "tools": [{"type": "code_interpreter", "description": "Run Python."}],
        },
        f"<|im_start|>system name=<|interpreter|>\nRun Python.{END}{USER}3!?{END}{ASSISTANT}I run it.{RAN}"
        f"{CODE_RESULT}6{END}{ASSISTANT}Six.{END}",
    ),
    "interpreter: a block that was run, a block that was not, marks": (
        "interpreter",
        {
            "messages": [
                system("Run Python.", name="interpreter"),
                user("3!?"),
                assistant("I run it.\n```python\nprint(6)\n```\n"),
                {"role": "execution", "content": "6"},
                assistant("Six."),
                user("Again"),
                assistant("<|action_start|><|interpreter|>\n```python\nprint(6)\n```<|action_end|>"),
                {"role": "environment", "name": "interpreter", "content": "6"},
                assistant("As in:\n```python\nprint(6)\n```"),
            ]
        },
        {
            "messages": [
                user("3!?"),
                assistant("I run it.", code("print(6)")),
                tool("6"),
                assistant("Six."),
                user("Again"),
                assistant("", code("print(6)")),
                tool("6"),
                assistant("As in:\n```python\nprint(6)\n```"),
            ],
            "tools": [{"type": "code_interpreter", "description": "Run Python."}],
        },
        f"<|im_start|>system name=<|interpreter|>\nRun Python.{END}{USER}3!?{END}{ASSISTANT}I run it.{RAN}"
        f"{CODE_RESULT}6{END}{ASSISTANT}Six.{END}{USER}Again{END}{ASSISTANT}{RAN}{CODE_RESULT}6{END}"
        f"{ASSISTANT}As in:\n```python\nprint(6)\n```{END}",
    ),
    "msagent: ReAct with what it observed quoted": (
        "msagent",
        {
            "conversations": turns(
                ("system", APIS),
                ("user", "Rain?"),
                (
                    "assistant",
                    'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Paris"}\nObservation: dry\n'
                    "Thought: Now I know.\nFinal Answer: No.",
                ),
            )
        },
        {
            "messages": [
                system("Answer the questions. You have access to the following APIs:"),
                user("Rain?"),
                assistant("I look.", call("get_weather", city="Paris")),
                tool("dry"),
                assistant("Now I know.\nNo."),
            ],
            "tools": [API_SCHEMA],
        },
        f"<|im_start|>system\nAnswer the questions. You have access to the following APIs:{END}"
        f"{PLUGIN}{API_TEXT}{END}{USER}Rain?{END}{ASSISTANT}I look.{CALLED}{PLUGIN_RESULT}dry{END}"
        f"{ASSISTANT}Now I know.\nNo.{END}",
    ),
    "msagent: a Python list as text, the observation in a user's turn": (
        "msagent",
        {
            "conversations": str(
                turns(
                    ("system", APIS.split("Use the")[0].split("\n", 1)[1]),
                    ("user", "Rain?"),
                    ("assistant", 'Action: get_weather\nAction Input: ```JSON\n{"city": "Paris"}\n```'),
                    ("user", "Observation: dry"),
                    ("assistant", "No."),
                )
            )
        },
        {"messages": ANSWERED, "tools": [API_SCHEMA]},
        PLUGIN + API_TEXT + END + ANSWERED_TEXT,
    ),
    "msagent: requests between marks": (
        "msagent",
        {
            "conversations": turns(
                ("system", PLUGIN_LIST),
                ("user", "Rain?"),
                (
                    "assistant",
                    'I look.<|startofthink|>```JSON\n{"api_name": "get_weather", "url": "u", "parameters": {"city": '
                    '"Paris"}}\n```<|endofthink|>\n\n<|startofexec|>```JSON\ndry\n```<|endofexec|>\nNo.',
                ),
            )
        },
        {
            "messages": [
                system("Plugins:"),
                user("Rain?"),
                assistant("I look.", call("get_weather", city="Paris")),
                tool("dry"),
                assistant("No."),
            ],
            "tools": [PLUGIN_SCHEMA],
        },
        f"<|im_start|>system\nPlugins:{END}{PLUGIN}{PLUGIN_TEXT}{END}{USER}Rain?{END}"
        f"{ASSISTANT}I look.{CALLED}{PLUGIN_RESULT}dry{END}{ASSISTANT}No.{END}",
    ),
    "msagent: ToolLLaMA's rows, the APIs as a Python list, the end a call": (
        "msagent",
        {
            "conversations": turns(
                (
                    "system",
                    "You use tools. Your output should follow this format:\nThought:\nAction\nAction Input:\n\n"
                    "Task: rain.\n"
                    "Specifically, you have access to the following APIs: "
                    f"{[WEATHER, {'name': 'Finish', 'parameters': {}}]}",
                ),
                ("user", "\nRain?\nBegin!\n"),
                ("assistant", '\nThought: \nAction: get_weather\nAction Input: {\n  "city": "Paris"\n}'),
                ("function", '{"error": "", "response": "dry"}'),
                ("assistant", '\nThought: Done.\nAction: Finish\nAction Input: {"final_answer": "No."}'),
            )
        },
        {
            "messages": [
                system("You use tools.\nTask: rain."),
                user("\nRain?\nBegin!\n"),
                assistant("", call("get_weather", city="Paris")),
                tool('{"error": "", "response": "dry"}'),
                assistant("Done.", call("Finish", final_answer="No.")),
            ],
            "tools": [WEATHER, {"name": "Finish", "parameters": {}}],
        },
        f"<|im_start|>system\nYou use tools.\nTask: rain.{END}{PLUGIN}{WEATHER_TEXT[:-1]}, "
        f'{{"name": "Finish", "parameters": {{}}}}]{END}{USER}\nRain?\nBegin!\n{END}{ASSISTANT}{CALLED}'
        f'{PLUGIN_RESULT}{{"error": "", "response": "dry"}}{END}{ASSISTANT}Done.<|action_start|><|plugin|>\n'
        f'{{"name": "Finish", "parameters": {{"final_answer": "No."}}}}<|action_end|>\n{END}',
    ),
    "agent_flan: loss of every turn": (
        "agent_flan",
        {
            "id": "0",
            "conversation": [
                system("S", loss=False),
                user("a", loss=False),
                assistant("b", loss=False),
                user("c", loss=None),
                assistant("d", loss=True),
            ],
        },
        {"messages": [system("S"), user("a"), assistant("b", loss=False), user("c"), assistant("d", loss=True)]},
        f"<|im_start|>system\nS{END}{USER}a{END}{ASSISTANT}b{END}{USER}c{END}{ASSISTANT}d{END}",
    ),
    "toolbench: the last path, which ends with Finish": (
        "toolbench",
        {
            "win": True,
            "answer_generation": {
                "valid_data": True,
                "finish_type": "give_answer",
                "function": [WEATHER, {"name": "Finish"}],
                "train_messages": [
                    [user("Rain?"), {"role": "assistant", "content": None}],
                    [
                        user("Rain?"),
                        {
                            "role": "assistant",
                            "content": None,
                            "function_call": {"name": "get_weather", "arguments": '{\n "city": "Paris"\n}'},
                        },
                        {"role": "function", "name": "get_weather", "content": "dry"},
                        {"role": "user", "content": "Go on.", "valid": False},
                        {
                            "role": "assistant",
                            "content": "Done.",
                            "function_call": {"name": "Finish", "arguments": '{"final_answer": "No."}'},
                        },
                    ],
                ],
            },
        },
        {
            "messages": [
                *ANSWERED[:3],
                user("Go on."),
                assistant("Done.", call("Finish", final_answer="No.")),
            ],
            "tools": [WEATHER, {"name": "Finish"}],
        },
        f'{PLUGIN}{WEATHER_TEXT[:-1]}, {{"name": "Finish"}}]{END}{USER}Rain?{END}{ASSISTANT}{CALLED}'
        f"{PLUGIN_RESULT}dry{END}{USER}Go on.{END}{ASSISTANT}Done.<|action_start|><|plugin|>\n"
        f'{{"name": "Finish", "parameters": {{"final_answer": "No."}}}}<|action_end|>\n{END}',
    ),
    "bfcl: types of JSON Schema, first values, what may be left out, objects in lists": (
        "bfcl",
        {
            "question": [[user("Rain?")]],
            "function": [
                {
                    "name": "w.get",
                    "description": "d",
                    "parameters": {
                        "type": "dict",
                        "properties": {
                            "city": {"type": "string"},
                            "days": {
                                "type": "array",
                                "items": {"type": "dict", "properties": {"day": {"type": "any"}}},
                            },
                            "unit": {"type": "string"},
                            "near": {"type": "tuple", "items": {"type": "float"}},
                        },
                        "required": ["city", "days"],
                    },
                }
            ],
            "ground_truth": [
                {
                    "w.get": {
                        "city": ["Paris", "Paris, France"],
                        "days": [[{"day": ["Mon", "Monday"], "hour": ["", 3]}]],
                        "unit": ["C", ""],
                        "near": [],
                    }
                }
            ],
        },
        {
            "messages": [user("Rain?"), assistant("", call("w.get", city="Paris", days=[{"day": "Mon"}], near=[]))],
            "tools": [
                {
                    "name": "w.get",
                    "description": "d",
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "city": {"type": "string"},
                            "days": {"type": "array", "items": {"type": "object", "properties": {"day": {}}}},
                            "unit": {"type": "string"},
                            "near": {"type": "array", "items": {"type": "number"}},
                        },
                        "required": ["city", "days"],
                    },
                }
            ],
        },
        f"{PLUGIN}{BFCL_TEXT}{END}{USER}Rain?{END}{ASSISTANT}"
        f"<|action_start|><|plugin|>\n{BFCL_CALL}<|action_end|>\n{END}",
    ),
}
CHOSEN = {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("good")]}
REJECTED = {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("bad")]}
TALK = [user("a"), assistant("b"), user("c")]
PAIRS: dict[str, Any] = {
    "HH-RLHF": {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
    },
    "HH-RLHF with its prompt apart": {
        "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "chosen": " good",
        "rejected": " bad",
    },
    "messages": {"prompt": TALK, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    "whole talks as messages": {"chosen": [*TALK, assistant("good")], "rejected": [*TALK, assistant("bad")]},
    "the prompt repeated": {
        "prompt": TALK,
        "chosen": [*TALK, assistant("good")],
        "rejected": [*TALK, assistant("bad")],
    },
    "ShareGPT's turns": {
        "conversations": turns(("human", "a"), ("gpt", "b"), ("human", "c")),
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
}


@pytest.mark.parametrize("case", GOLDEN)
def test_a_row_becomes_the_sample_and_the_text_that_were_written_by_hand(case: str):
    name, row, sample, text = GOLDEN[case]
    before = copy.deepcopy(row)
    got = FORMATS[name](row)
    assert got == sample
    assert "".join(segment.text for segment in render(got, TEMPLATE)) == "<s>" + text
    assert row == before


@pytest.mark.parametrize("case", PAIRS)
def test_a_preference_pair_is_two_samples_that_share_their_prompt(case: str):
    assert FORMATS["preference"](PAIRS[case]) == {"chosen": CHOSEN, "rejected": REJECTED}


def test_a_preference_pair_may_ask_as_alpaca_does():
    row = {"instruction": "Add.", "input": "1 2", "system": "S", "chosen": "3", "rejected": "4"}
    before = [system("S"), user("Add.\n1 2")]
    expected = {key: {"messages": [*before, assistant(row[key])]} for key in ("chosen", "rejected")}
    assert FORMATS["preference"](row) == expected


def test_what_follows_a_prompt_apart_is_the_answer_even_where_both_begin_alike():
    more = [assistant("which?"), user("both")]
    row = {"prompt": TALK, "chosen": [*more, assistant("good")], "rejected": [*more, assistant("bad")]}
    pair = FORMATS["preference"](row)
    assert pair["chosen"]["messages"] == [*CHOSEN["messages"][:3], *more, assistant("good")]
    assert pair["rejected"]["messages"] == [*CHOSEN["messages"][:3], *more, assistant("bad")]


def test_every_format_has_a_golden_transcript():
    assert {name for name, *_ in GOLDEN.values()} | {"preference", "tokens"} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_each_format_is_read_and_rendered(name: str):
    sample = FORMATS[name](EXAMPLES[name])
    if name == "preference":
        samples = [sample["chosen"], sample["rejected"]]
    else:
        samples = [] if "ids" in sample else [sample]
    for part in samples:
        segments = render(part, TEMPLATE)
        assert any(segment.trained for segment in segments)
        assert segments[0].text.startswith("<s>")
    assert samples or sum(sample["trained"]) > 0


def test_the_lab_s_bare_lists_are_read_like_its_objects():
    from tuner.dataset.reading.strict_json import parse_row

    row = parse_row(b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]')
    assert FORMATS["ftdp"](row) == {"messages": [user("a"), assistant("b")]}
