"""Malformed rows of every format: each is refused in one line that says what is expected and what came."""

from typing import Any

import pytest

from tuner.dataset.formats import FORMATS, RowError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TOOL = {"name": "f", "parameters": {"type": "object"}}
PLUGINS = {"role": "system", "name": "plugin", "content": '[{"name": "f"}]'}
INTERPRETER = {"role": "system", "name": "interpreter", "content": "run"}


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    """An OpenAI row whose assistant calls f."""
    calls = [{"function": {"name": "f", "arguments": arguments}, **more}]
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": [TOOL]}


def lab(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def part(content: Any, name: str = "plugin") -> dict[str, Any]:
    """A tool's part of an assistant's turn, in the lab's format."""
    return {"role": "tool", "name": name, "content": content}


def react(text: str, apis: str = "1. f: d Parameters: []") -> dict[str, Any]:
    return sharegpt(("system", apis), ("user", "a"), ("assistant", text))


def tree(**changed: Any) -> dict[str, Any]:
    """A ToolBench row with something else in its answer."""
    answer = {"finish_type": "give_answer", "valid_data": True, "function": [TOOL], "train_messages": [[USER, ANSWER]]}
    return {"answer_generation": {**answer, **changed}}


def bfcl(**changed: Any) -> dict[str, Any]:
    """A BFCL row with something else in it; ... takes a key out."""
    schema = {"type": "dict", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    row = {"question": [[USER]], "function": [{"name": "f", "parameters": schema}], "ground_truth": [{"f": {"x": [1]}}]}
    return {key: value for key, value in {**row, **changed}.items() if value is not ...}


# what is wrong: format, row, the whole message
MALFORMED: dict[str, tuple[str, Any, str]] = {
    "openai: messages null": (
        "openai",
        {"messages": None},
        "Expected 'messages' of the row to be a list, got NoneType None.",
    ),
    "openai: words beside the content": (
        "openai",
        {"messages": [USER, {**ANSWER, "reasoning_content": "I think."}]},
        "Expected the words of message 1 in 'content' alone, got 'reasoning_content': 'I think.'. Write them into the "
        "content as the model shall say them, such as <think>...</think> before the answer, or leave them out.",
    ),
    "openai: a picture": (
        "openai",
        {"messages": [{**USER, "images": ["a.png"]}, ANSWER]},
        "Expected text alone in message 0, got 'images': ['a.png']. Leave such rows out.",
    ),
    "openai: system beside the messages": (
        "openai",
        {"messages": [USER, ANSWER], "system": "Be brief."},
        "Expected the system text as the first message, not beside the messages, got str 'Be brief.'.",
    ),
    "openai: functions": (
        "openai",
        {"messages": [USER, ANSWER], "functions": [{"name": "f"}]},
        "Expected tools under 'tools', for 'functions' is their older form, got list [{'name': 'f'}].",
    ),
    "sharegpt: a picture": (
        "sharegpt",
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}],
        },
        "Expected text alone in the row, got 'image': 'a.png'. Leave such rows out.",
    ),
    "openai: messages nested": (
        "openai",
        {"messages": [[USER, ANSWER]]},
        "Expected message 0 to be an object, got list [{'role': 'user', 'content': 'a'}, "
        "{'role': 'assistant', 'content': 'b'}].",
    ),
    "openai: role null": (
        "openai",
        {"messages": [{"role": None, "content": "a"}]},
        "Expected 'role' of message 0 to be a str, got NoneType None.",
    ),
    "openai: unknown role": (
        "openai",
        {"messages": [{"role": "developr", "content": "a"}]},
        "Expected the role of message 0 to be one of ('system', 'user', 'assistant', 'tool'), got 'developr'.",
    ),
    "openai: content number": (
        "openai",
        {"messages": [{"role": "user", "content": 7}]},
        "Expected the content of message 0 to be text, got int.",
    ),
    "openai: content nested list": (
        "openai",
        {"messages": [{"role": "user", "content": [["a"]]}]},
        "Expected the parts of message 0 to be of type text, got list [['a']].",
    ),
    "openai: tool_calls object": (
        "openai",
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": {"a": 1}}]},
        "Expected 'tool_calls' of message 1 to be a list, got dict {'a': 1}.",
    ),
    "openai: arguments NaN text": (
        "openai",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{'x': 1}"}}],
                },
            ],
            "tools": [TOOL],
        },
        "The arguments of the call to 'f' must be JSON, got \"{'x': 1}\" (a single quote at column "
        "2, as Python prints a dict. Write rows with json.dumps).",
    ),
    "openai: arguments null": (
        "openai",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": None}}]},
            ],
            "tools": [TOOL],
        },
        'The arguments of the call to \'f\' must be a JSON object like {"city": "Shanghai"}, got None.',
    ),
    "openai: function name number": (
        "openai",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 3, "arguments": {}}}]},
            ],
            "tools": [TOOL],
        },
        "Expected 'name' of call 0 of message 1 to be a str, got int 3.",
    ),
    "openai: loss negative": (
        "openai",
        {"messages": [USER, {**ANSWER, "loss": -1}]},
        "Expected the loss of message 1 to be true or false, or a weight from 0.001 to 1000, got int -1.",
    ),
    "openai: loss nan": (
        "openai",
        {"messages": [USER, {**ANSWER, "loss": float("nan")}]},
        "Expected the loss of message 1 to be true or false, or a weight from 0.001 to 1000, got float nan.",
    ),
    "openai: tools number": (
        "openai",
        {"messages": [USER, ANSWER], "tools": 5},
        "Expected 'tools' to be a list, got int 5.",
    ),
    "openai: tools list of null": (
        "openai",
        {"messages": [USER, ANSWER], "tools": [None]},
        "Expected tool 0 to be an object, got NoneType None.",
    ),
    "openai: duplicate ids": (
        "openai",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {}}}] * 2,
                },
            ],
            "tools": [TOOL],
        },
        "Expected the calls of message 1 to differ in id, got list ['x', 'x'].",
    ),
    "sharegpt: no conversations": (
        "sharegpt",
        {"conversation": []},
        "Expected 'conversations' in the row, which has ['conversation']. Nearest: 'conversation'.",
    ),
    "sharegpt: empty": (
        "sharegpt",
        {"conversations": []},
        "Expected 'conversations' to hold at least one turn, got list [].",
    ),
    "sharegpt: null": (
        "sharegpt",
        {"conversations": None},
        "Expected 'conversations' of the row to be a list, got NoneType None.",
    ),
    "sharegpt: text": (
        "sharegpt",
        {"conversations": "hi"},
        "Expected 'conversations' of the row to be a list, got str 'hi'.",
    ),
    "sharegpt: nested": (
        "sharegpt",
        {"conversations": [[{"from": "human", "value": "a"}]]},
        "Expected turn 0 to be an object, got list [{'from': 'human', 'value': 'a'}].",
    ),
    "sharegpt: turn null": (
        "sharegpt",
        {"conversations": [None]},
        "Expected turn 0 to be an object, got NoneType None.",
    ),
    "sharegpt: no from": (
        "sharegpt",
        {"conversations": [{"form": "human", "value": "a"}]},
        "Expected 'from' in turn 0, which has ['form', 'value']. Nearest: 'form'.",
    ),
    "sharegpt: from null": (
        "sharegpt",
        {"conversations": [{"from": None, "value": "a"}]},
        "Expected 'from' of turn 0 to be a str, got NoneType None.",
    ),
    "sharegpt: unknown speaker": (
        "sharegpt",
        sharegpt(("humann", "a")),
        "Expected 'from' of turn 0 to be one of ('human', 'user', 'gpt', 'assistant', 'chatgpt', "
        "'system', 'function_call', 'tool_call', 'observation', 'tool', 'tool_response', "
        "'function_response'), got 'humann'. Nearest: 'human'.",
    ),
    "sharegpt: no value": (
        "sharegpt",
        {"conversations": [{"from": "human", "val": "a"}]},
        "Expected 'value' in turn 0, which has ['from', 'val']. Nearest: 'val'.",
    ),
    "sharegpt: value null": (
        "sharegpt",
        sharegpt(("human", None)),
        "Expected 'value' of turn 0 to be text, got NoneType None.",
    ),
    "sharegpt: value number": (
        "sharegpt",
        sharegpt(("human", 3.5)),
        "Expected 'value' of turn 0 to be text, got float 3.5.",
    ),
    "sharegpt: answer empty": (
        "sharegpt",
        sharegpt(("human", "a"), ("gpt", "")),
        "Expected content or tool_calls in message 1, an assistant turn, got str ''.",
    ),
    "sharegpt: gpt first": (
        "sharegpt",
        sharegpt(("gpt", "a")),
        "Expected message 0 to be system or user, got 'assistant' (it follows nothing).",
    ),
    "sharegpt: two humans": (
        "sharegpt",
        sharegpt(("human", "a"), ("human", "b")),
        "Expected message 1 to be assistant, got 'user' (it follows user).",
    ),
    "sharegpt: no answer": (
        "sharegpt",
        sharegpt(("human", "a")),
        "Expected an assistant turn to train on (one whose loss is not false), got list ['user'].",
    ),
    "sharegpt: call not JSON": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", "f(x)"), tools=[TOOL]),
        "Expected 'value' of turn 1, a function call, to be JSON, got 'f(x)' (Expecting value at column 1).",
    ),
    "sharegpt: call list empty": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", "[]"), tools=[TOOL]),
        "Expected turn 1 to call a function, got list [].",
    ),
    "sharegpt: call a number": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", "3"), tools=[TOOL]),
        'Expected turn 1 to hold {"name": ..., "arguments": {...}}, got int 3.',
    ),
    "sharegpt: call without a name": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", '{"arguments": {}}'), tools=[TOOL]),
        "Expected the call in turn 1 to have a name, got NoneType None.",
    ),
    "sharegpt: arguments list": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", '{"name": "f", "arguments": [1]}'), tools=[TOOL]),
        'The arguments of the call to \'f\' must be a JSON object like {"city": "Shanghai"}, got [1].',
    ),
    "sharegpt: arguments text": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", '{"name": "f", "arguments": "x=1"}'), tools=[TOOL]),
        "The arguments of the call to 'f' must be JSON, got 'x=1' (Expecting value at column 1).",
    ),
    "sharegpt: undeclared": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", '{"name": "g", "arguments": {}}'), tools=[TOOL]),
        "Message 1 calls 'g', but 'tools' declares ['f'].",
    ),
    "sharegpt: no tools": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", '{"name": "g", "arguments": {}}')),
        "Message 1 calls 'g', but 'tools' declares [].",
    ),
    "sharegpt: observation first": (
        "sharegpt",
        sharegpt(("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")),
        "Expected message 2 to be user or system, got 'tool' (a tool result needs a tool call before it).",
    ),
    "sharegpt: observation missing": (
        "sharegpt",
        sharegpt(("human", "a"), ("function_call", '{"name": "f"}'), ("gpt", "d"), tools=[TOOL]),
        "Expected message 2 to be tool, got 'assistant' (it follows calls).",
    ),
    "sharegpt: two observations": (
        "sharegpt",
        sharegpt(
            ("human", "a"),
            ("function_call", '{"name": "f"}'),
            ("observation", "c"),
            ("observation", "c"),
            ("gpt", "d"),
            tools=[TOOL],
        ),
        "2 tool results for 1 calls: expected one result for each call.",
    ),
    "sharegpt: tools not JSON": (
        "sharegpt",
        sharegpt(("human", "a"), ("gpt", "b"), tools="[{"),
        "Expected 'tools' to be a list or its JSON, got text that is not JSON (Expecting "
        "property name enclosed in double quotes at column 3).",
    ),
    "sharegpt: tools an object": (
        "sharegpt",
        sharegpt(("human", "a"), ("gpt", "b"), tools='{"name": "f"}'),
        "Expected 'tools' to be a list, got dict {'name': 'f'}.",
    ),
    "sharegpt: system number": (
        "sharegpt",
        sharegpt(("human", "a"), ("gpt", "b"), system=4),
        "Expected 'system' of the row to be a str, got int 4.",
    ),
    "sharegpt: loss text": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": "yes"}]},
        "Expected the loss of message 1 to be true or false, or a weight from 0.001 to 1000, got str 'yes'.",
    ),
    "sharegpt: loss of a human": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a", "loss": True}, {"from": "gpt", "value": "b"}]},
        "Expected a loss in assistant turns only, message 0 to have none, got str 'user'.",
    ),
    "alpaca: history text": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": "c"},
        "Expected 'history' to be a list of pairs, got str 'c'.",
    ),
    "alpaca: history of three": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
        "Expected each entry of 'history' to be [question, answer], got list ['a', 'b', 'c'].",
    ),
    "alpaca: output null": (
        "alpaca",
        {"instruction": "a", "output": None},
        "Expected 'output' of the row to be a str, got NoneType None.",
    ),
    "alpaca: output list": (
        "alpaca",
        {"instruction": "a", "output": ["b"]},
        "Expected 'output' of the row to be a str, got list ['b'].",
    ),
    "alpaca: input number": (
        "alpaca",
        {"instruction": "a", "input": 3, "output": "b"},
        "Expected 'input' to be a str, got int 3.",
    ),
    "alpaca: system list": (
        "alpaca",
        {"instruction": "a", "output": "b", "system": ["x"]},
        "Expected 'system' of the row to be a str, got list ['x'].",
    ),
    "qa: no question": (
        "qa",
        {"answer": "b"},
        "Expected either 'question' or 'prompt' in the row, which has ['answer'].",
    ),
    "qa: both": (
        "qa",
        {"question": "a", "prompt": "a", "answer": "b"},
        "Expected either 'question' or 'prompt' in the row, which has ['answer', 'prompt', 'question'].",
    ),
    "qa: no answer": (
        "qa",
        {"question": "a", "answers": ["b"]},
        "Expected one of 'answer', 'completion' and 'response' in the row, which has ['answers', 'question'].",
    ),
    "qa: empty answer": (
        "qa",
        {"question": "a", "answer": ""},
        "Expected 'answer' to hold the answer to train on, got str ''.",
    ),
    "qa: number": (
        "qa",
        {"question": "a", "answer": 42},
        "Expected 'answer' of the row to be a str, got int 42.",
    ),
    "repository: no files": (
        "repository",
        {"path": "a.py", "text": "x"},
        "Expected 'files' in the row, which has ['path', 'text'].",
    ),
    "repository: text of a file": (
        "repository",
        {"files": [{"path": "a.py", "text": 1}]},
        "Expected 'text' of file 0 to be a str, got int 1.",
    ),
    "repository: line end in a path": (
        "repository",
        {"files": [{"path": "a\n.py", "text": ""}]},
        "Expected 'path' of file 0 to be a path, got str 'a\\n.py'.",
    ),
    "repository: a path twice": (
        "repository",
        {"files": [{"path": "a.py", "text": ""}, {"path": "a.py", "text": ""}]},
        "Expected 'path' of file 1 to be no other file's, got str 'a.py'.",
    ),
    "text: list": (
        "text",
        {"text": ["a"]},
        "Expected 'text' of the row to be a str, got list ['a'].",
    ),
    "xtuner: empty": (
        "xtuner",
        {"conversation": []},
        "Expected 'conversation' to hold at least one turn, got list [].",
    ),
    "xtuner: turn text": (
        "xtuner",
        {"conversation": ["a"]},
        "Expected turn 0 to be an object, got str 'a'.",
    ),
    "xtuner: no output": (
        "xtuner",
        {"conversation": [{"input": "a"}]},
        "Expected 'output' in turn 0, which has ['input']. Nearest: 'input'.",
    ),
    "xtuner: output null": (
        "xtuner",
        {"conversation": [{"input": "a", "output": None}]},
        "Expected 'output' of turn 0 to be a str, got NoneType None.",
    ),
    "xtuner: output empty": (
        "xtuner",
        {"conversation": [{"input": "a", "output": ""}]},
        "Expected 'output' of turn 0 to hold an answer, got str ''.",
    ),
    "xtuner: input list": (
        "xtuner",
        {"conversation": [{"input": ["a"], "output": "b"}]},
        "Expected 'input' of turn 0 to be text, got list ['a'].",
    ),
    "xtuner: system number": (
        "xtuner",
        {"conversation": [{"system": 1, "input": "a", "output": "b"}]},
        "Expected 'system' of turn 0 to be text, got int 1.",
    ),
    "xtuner: loss text": (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "output_with_loss": "false"}]},
        "Expected 'output_with_loss' of turn 0 to be true or false, got str 'false'.",
    ),
    "xtuner: no eos": (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "need_eos_token": False}]},
        "Expected 'need_eos_token' of turn 0 to be true, for every turn ends with its mark, got bool False.",
    ),
    "xtuner: misspelt": (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "output_withloss": False}]},
        "Expected the keys of turn 0 to be among ('system', 'input', 'output', 'need_eos_token', "
        "'output_with_loss'), got 'output_withloss'. Nearest: 'output_with_loss'.",
    ),
    "xtuner: nothing trained": (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "output_with_loss": False}]},
        "Expected an assistant turn to train on (one whose loss is not false), got list ['user', 'assistant'].",
    ),
    "xtuner: text not trained": (
        "xtuner",
        {"conversation": [{"input": "", "output": "b", "output_with_loss": False}]},
        "Expected a text to train on (output_with_loss), got bool False.",
    ),
    "ftdp: empty": (
        "ftdp",
        lab(),
        "Expected 'messages' to hold at least one message, got list [].",
    ),
    "ftdp: unknown role": (
        "ftdp",
        lab({"role": "enviroment", "content": "a"}),
        "Expected the role of message 0 to be one of ('system', 'user', 'assistant', 'thought', "
        "'language', 'tool', 'environment'), got 'enviroment'. Nearest: 'environment'.",
    ),
    "ftdp: no content": (
        "ftdp",
        lab({"role": "user"}),
        "Expected 'content' in message 0, which has ['role'].",
    ),
    "ftdp: content null": (
        "ftdp",
        lab({"role": "user", "content": None}),
        "Expected 'content' of message 0 to be a str, got NoneType None.",
    ),
    "ftdp: name number": (
        "ftdp",
        lab({**USER, "name": 3}),
        "Expected the name of message 0 to be text, got int 3.",
    ),
    "ftdp: tool without a name": (
        "ftdp",
        lab(PLUGINS, USER, {"role": "tool", "content": "{}"}),
        "Expected the name of message 2, a tool's, to be plugin or interpreter, got NoneType None.",
    ),
    "ftdp: tool not JSON": (
        "ftdp",
        lab(PLUGINS, USER, part("f(1)")),
        "Expected the content of message 2, a plugin's call, to be JSON, got 'f(1)' (Expecting value at column 1).",
    ),
    "ftdp: tool a list": (
        "ftdp",
        lab(PLUGINS, USER, part("[1]")),
        'Expected message 2 to hold {"name": ..., "parameters": {...}}, got list [1].',
    ),
    "ftdp: tool without its name": (
        "ftdp",
        lab(PLUGINS, USER, part('{"parameters": {}}')),
        "Expected message 2 to have a name, got NoneType None.",
    ),
    "ftdp: undeclared": (
        "ftdp",
        lab(PLUGINS, USER, part('{"name": "g"}')),
        "Message 1 calls 'g', but 'tools' declares ['f'].",
    ),
    "ftdp: no code": (
        "ftdp",
        lab(INTERPRETER, USER, part("", "interpreter")),
        "Expected message 2 to hold code, got str ''.",
    ),
    "ftdp: code number": (
        "ftdp",
        lab(INTERPRETER, USER, part(3, "interpreter")),
        "Expected message 2 to hold code, got int 3.",
    ),
    "ftdp: environment first": (
        "ftdp",
        lab(USER, {"role": "environment", "content": "x", "name": "plugin"}, ANSWER),
        "Expected message 1 to be assistant, got 'tool' (a tool result needs a tool call before it).",
    ),
    "ftdp: another's result": (
        "ftdp",
        lab(
            PLUGINS,
            INTERPRETER,
            USER,
            part('{"name": "f"}'),
            {"role": "environment", "name": "interpreter", "content": "1"},
            ANSWER,
        ),
        "Expected the name of message 4 to be that of the call before it, plugin, got str 'interpreter'.",
    ),
    "ftdp: mark open": (
        "ftdp",
        lab(PLUGINS, USER, {"role": "assistant", "content": "x<|action_start|><|plugin|>\n{}"}),
        "Expected <|action_end|> behind each <|action_start|> of message 2, "
        "got str 'x<|action_start|><|plugin|>\\n{}'.",
    ),
    "ftdp: unknown mark": (
        "ftdp",
        lab(PLUGINS, USER, {"role": "assistant", "content": "x<|action_start|><|browser|>\n{}<|action_end|>"}),
        "Expected <|plugin|> or <|interpreter|> behind each <|action_start|> of message 2, "
        "got str 'x<|action_start|><|browser|>\\n{}<|action_end|>'.",
    ),
    "ftdp: text behind": (
        "ftdp",
        lab(
            PLUGINS,
            USER,
            {"role": "assistant", "content": '<|action_start|><|plugin|>\n{"name": "f"}<|action_end|>more'},
        ),
        "Expected no text behind <|action_end|> in message 2, got str 'more'.",
    ),
    "ftdp: two losses": (
        "ftdp",
        lab(USER, {**ANSWER, "loss": False}, {"role": "thought", "content": "c", "loss": True}),
        "Expected one loss in a turn of the assistant, got True in message 2, a part of it.",
    ),
    "ftdp: loss text": (
        "ftdp",
        lab(USER, {**ANSWER, "loss": "false"}),
        "Expected the loss of message 1 to be true or false, or a weight from 0.001 to 1000, got str 'false'.",
    ),
    "ftdp: all prefix": (
        "ftdp",
        lab(USER, {**ANSWER, "type": "prefix"}),
        "Expected an assistant turn to train on (one whose loss is not false), got list ['user', 'assistant'].",
    ),
    "lagent: no steps": (
        "lagent",
        {"messages": [USER]},
        "Expected 'inner_steps' in the row, which has ['messages'].",
    ),
    "lagent: steps null": (
        "lagent",
        {"inner_steps": None},
        "Expected 'inner_steps' of the row to be a list, got NoneType None.",
    ),
    "lagent: command missing": (
        "lagent",
        {
            "messages": [INTERPRETER, USER],
            "inner_steps": [part({"name": "x", "parameters": {"code": "1"}}, "interpreter")],
        },
        "Expected 'command' in the parameters of message 2, which has ['code']. Nearest: 'code'.",
    ),
    "lagent: messages empty": (
        "lagent",
        {"messages": [], "inner_steps": [ANSWER]},
        "Expected 'messages' to hold at least one message, got list [].",
    ),
    "interpreter: result without code": (
        "interpreter",
        lab(USER, {"role": "assistant", "content": "no code"}, {"role": "execution", "content": "1"}, ANSWER),
        "Expected message 2 to be user or system, got 'tool' (a tool result needs a tool call before it).",
    ),
    "interpreter: unknown role": (
        "interpreter",
        lab(USER, {"role": "kernel", "content": "1"}),
        "Expected the role of message 1 to be one of ('system', 'user', 'assistant', 'thought', "
        "'language', 'tool', 'environment', 'execution', 'execute'), got 'kernel'.",
    ),
    "msagent: no list": (
        "msagent",
        {"conversations": "hello"},
        "Expected 'conversations', being text, to be JSON, got 'hello' (Expecting value at column 1).",
    ),
    "msagent: python call": (
        "msagent",
        {"conversations": "__import__('os').getcwd()"},
        "Expected 'conversations', being text, to be JSON, got \"__import__('os').getcwd()\" "
        "(Expecting value at column 1).",
    ),
    "msagent: number": (
        "msagent",
        {"conversations": 7},
        "Expected 'conversations' of the row to be a list, got int 7.",
    ),
    "msagent: unknown": (
        "msagent",
        {"conversations": [{"from": "api", "value": "x"}]},
        "Expected 'from' of turn 0 to be one of ('system', 'user', 'human', 'assistant', 'gpt', "
        "'tool', 'function', 'observation'), got 'api'.",
    ),
    "msagent: input not JSON": (
        "msagent",
        react("Action: f\nAction Input: Paris"),
        "Expected the Action Input in turn 2 to be JSON, got 'Paris' (Expecting value at column 1).",
    ),
    "msagent: input list": (
        "msagent",
        react("Action: f\nAction Input: [1]"),
        'The arguments of the call to \'f\' must be a JSON object like {"city": "Shanghai"}, got [1].',
    ),
    "msagent: undeclared": (
        "msagent",
        react("Action: g\nAction Input: {}"),
        "Message 1 calls 'g', but 'tools' declares ['f'].",
    ),
    "msagent: parameters not JSON": (
        "msagent",
        react("b", "1. f: d Parameters: [name: x]"),
        "Expected the parameters of API 'f' to be JSON, got '[name: x]' (Expecting value at column 2).",
    ),
    "msagent: parameters of text": (
        "msagent",
        react("b", '1. f: d Parameters: ["x"]'),
        "Expected each parameter of API 'f' to be an object, got str 'x'.",
    ),
    "msagent: plugin without paths": (
        "msagent",
        react("b", '1. {"plugin_name": "x"}'),
        "Expected 'paths' in an API of the system turn, which has ['plugin_name'].",
    ),
    "msagent: mark open": (
        "msagent",
        react("<|startofthink|>{}"),
        "Expected <|endofthink|> behind each <|startofthink|> of turn 2, got '{}'.",
    ),
    "msagent: request list": (
        "msagent",
        react("<|startofthink|>[1]<|endofthink|>"),
        "Expected the request in turn 2 to be an object, got list [1].",
    ),
    "msagent: no api_name": (
        "msagent",
        react('<|startofthink|>{"parameters": {}}<|endofthink|>'),
        "Expected 'api_name' in turn 2, which has ['parameters'].",
    ),
    "agent_flan: no conversation": (
        "agent_flan",
        {"conversations": [USER, ANSWER]},
        "Expected 'conversation' in the row, which has ['conversations']. Nearest: 'conversations'.",
    ),
    "agent_flan: content null": (
        "agent_flan",
        {"conversation": [{"role": "user", "content": None}]},
        "Expected the content of message 0 to be text, got NoneType.",
    ),
    "agent_flan: unknown role": (
        "agent_flan",
        {"conversation": [{"role": "function", "content": "x"}]},
        "Expected the role of message 0 to be one of ('system', 'user', 'assistant', 'tool'), got 'function'.",
    ),
    "agent_flan: user trained": (
        "agent_flan",
        {"conversation": [{**USER, "loss": True}, ANSWER]},
        "Expected a loss in assistant turns only, message 0 to have none, got str 'user'.",
    ),
    "toolbench: no answer": (
        "toolbench",
        {"tree": {}},
        "Expected 'answer_generation' in the row, which has ['tree'].",
    ),
    "toolbench: gave up": (
        "toolbench",
        tree(finish_type="give_up"),
        "Expected a search that found an answer (finish_type 'give_answer', valid_data true), got 'give_up', true.",
    ),
    "toolbench: invalid": (
        "toolbench",
        tree(valid_data=False),
        "Expected a search that found an answer (finish_type 'give_answer', valid_data true), "
        "got 'give_answer', false.",
    ),
    "toolbench: valid null": (
        "toolbench",
        tree(valid_data=None),
        "Expected 'valid_data' of 'answer_generation' to be a bool, got NoneType None.",
    ),
    "toolbench: no paths": (
        "toolbench",
        tree(train_messages=[]),
        "Expected 'train_messages' to hold lists of messages, got list [].",
    ),
    "toolbench: path null": (
        "toolbench",
        tree(train_messages=[None]),
        "Expected 'train_messages' to hold lists of messages, got list [None].",
    ),
    "toolbench: path of text": (
        "toolbench",
        tree(train_messages=[["a"]]),
        "Expected message 0 to be an object, got str 'a'.",
    ),
    "toolbench: functions null": (
        "toolbench",
        tree(function=None),
        "Expected 'function' of 'answer_generation' to be a list, got NoneType None.",
    ),
    "toolbench: unknown role": (
        "toolbench",
        tree(train_messages=[[{"role": "asistant", "content": "a"}]]),
        "Expected the role of message 0 to be one of ('system', 'user', 'assistant', 'tool'), "
        "got 'asistant'. Nearest: 'assistant'.",
    ),
    "toolbench: arguments cut": (
        "toolbench",
        tree(
            train_messages=[
                [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": '}}]
            ]
        ),
        "The arguments of the call to 'f' must be JSON, got '{\"a\": ' (Expecting value at column 7).",
    ),
    "bfcl: no truth": (
        "bfcl",
        bfcl(ground_truth=...),
        "Expected 'ground_truth' in the row. BFCL keeps it in possible_answer/ under the same "
        "id, and has none where no call is right. Put the two together: tuner join-files "
        "QUESTIONS ANSWERS OUT.",
    ),
    "bfcl: truth empty": (
        "bfcl",
        bfcl(ground_truth=[]),
        "Expected 'ground_truth' to hold at least one call, got list [].",
    ),
    "bfcl: truth text": (
        "bfcl",
        bfcl(ground_truth=["f(x=1)"]),
        "Expected call 0 to be an object, got str 'f(x=1)'.",
    ),
    "bfcl: two functions": (
        "bfcl",
        bfcl(ground_truth=[{"f": {}, "g": {}}]),
        "Expected call 0 of 'ground_truth' to name one function, got dict {'f': {}, 'g': {}}.",
    ),
    "bfcl: values none": (
        "bfcl",
        bfcl(ground_truth=[{"f": {"x": 1}}]),
        "Expected 'x' of call 0 to be a list of allowed values, got int 1.",
    ),
    "bfcl: no value": (
        "bfcl",
        bfcl(ground_truth=[{"f": {"x": []}}]),
        "Expected 'x' of call 0 to allow a value, got list [].",
    ),
    "bfcl: several turns": (
        "bfcl",
        bfcl(question=[[USER], [USER]]),
        "Expected 'question' to hold one list of messages (rows of several turns lack the "
        "results), got list [[{'role': 'user', 'content': 'a'}], [{'role': 'user', 'content': "
        "'a'}]].",
    ),
    "bfcl: question flat": (
        "bfcl",
        bfcl(question=[USER]),
        "Expected 'question' to hold one list of messages (rows of several turns lack the "
        "results), got list [{'role': 'user', 'content': 'a'}].",
    ),
    "bfcl: no function": (
        "bfcl",
        bfcl(function=...),
        "Expected 'function' in the row, which has ['ground_truth', 'question']. Nearest: 'question'.",
    ),
    "bfcl: undeclared": (
        "bfcl",
        bfcl(ground_truth=[{"g": {}}]),
        "Message 1 calls 'g', but 'tools' declares ['f'].",
    ),
    "preference: no rejected": (
        "preference",
        {"chosen": "a"},
        "Expected 'rejected' in the row, which has ['chosen'].",
    ),
    "preference: same": (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "Expected 'chosen' and 'rejected' to differ, got str 'b'.",
    ),
    "preference: null": (
        "preference",
        {"prompt": "a", "chosen": None, "rejected": "b"},
        "Expected 'chosen' to be text, a message or a list of messages, got NoneType None.",
    ),
    "preference: number": (
        "preference",
        {"prompt": "a", "chosen": 1, "rejected": "b"},
        "Expected 'chosen' to be text, a message or a list of messages, got int 1.",
    ),
    "preference: no prompt": (
        "preference",
        {"chosen": "a", "rejected": "b"},
        "Expected 'chosen' to begin with '\\n\\nHuman:', there being no prompt, got str 'a'.",
    ),
    "preference: two prompts": (
        "preference",
        {"prompt": "a", "question": "a", "chosen": "b", "rejected": "c"},
        "Expected one prompt in the row, got 'prompt' and 'question'.",
    ),
    "preference: empty": (
        "preference",
        {"prompt": "a", "chosen": "", "rejected": "b"},
        "Expected 'chosen' to hold an answer, got str ''.",
    ),
    "preference: ends with a human": (
        "preference",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
        "Expected 'rejected' to end with an answer of the assistant, got str '\\n\\nHuman: a'.",
    ),
    "preference: calls": (
        "preference",
        {"conversations": [{"from": "function_call", "value": "{}"}], "chosen": "a", "rejected": "b"},
        "Expected message 0 of 'conversations' to be text, function calls being for openai "
        "messages, got str 'function_call'.",
    ),
    "preference: unknown": (
        "preference",
        {"prompt": [{"from": "bot", "value": "x"}], "chosen": "a", "rejected": "b"},
        "Expected 'from' of message 0 of 'prompt' to be one of ('human', 'user', 'gpt', "
        "'assistant', 'chatgpt', 'system', 'function_call', 'tool_call', 'observation', 'tool', "
        "'tool_response', 'function_response'), got 'bot'.",
    ),
    "openai: arguments twice": (
        "openai",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}],
                },
            ],
            "tools": [TOOL],
        },
        "The arguments of the call to 'f' must be JSON, got '{\"x\": 1, \"x\": 2}' (the key 'x' "
        "twice in one object, so a value would be lost).",
    ),
    "openai: arguments NaN": (
        "openai",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}],
                },
            ],
            "tools": [TOOL],
        },
        "The arguments of the call to 'f' must be JSON, got '{\"x\": NaN}' (NaN, which is no JSON. "
        "Write null, or leave the key out).",
    ),
    "sharegpt: tools too deep": (
        "sharegpt",
        sharegpt(("human", "a"), ("gpt", "b"), tools="[" * 200 + "]" * 200),
        "Expected 'tools' to be a list or its JSON, got text that is not JSON (nested more than 100 levels deep).",
    ),
    "alpaca: history null entry": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [None]},
        "Expected each entry of 'history' to be [question, answer], got NoneType None.",
    ),
    "bfcl: parameters null": (
        "bfcl",
        bfcl(function=[{"name": "f", "parameters": None}]),
        "Expected 'parameters' of tool 0 to be a dict, got NoneType None.",
    ),
    "bfcl: properties list": (
        "bfcl",
        bfcl(function=[{"name": "f", "parameters": {"properties": []}}]),
        "Expected the properties of tool 0 to be an object, got list [].",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_row_is_refused_in_one_line(case: str):
    name, row, message = MALFORMED[case]
    with pytest.raises(RowError) as caught:
        FORMATS[name](row)
    assert str(caught.value) == message
    assert "\n" not in message


def test_there_are_malformed_rows_of_every_format():
    assert len(MALFORMED) >= 60
    assert {name for name, _, _ in MALFORMED.values()} == set(FORMATS) - {"tokens"}
