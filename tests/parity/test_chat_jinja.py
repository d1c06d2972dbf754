"""The exported Jinja templates give the encoder's tokens, and those are the published templates' tokens."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from chat_samples import bytelevel, made_row

from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.formats import FORMATS
from tuner.dataset.tokenize import Encoder

ROW_KINDS: dict[str, list[dict[str, Any]]] = {
    "internlm2": [{"tools": True, "interpreter": True}, {"tools": False}, {"tools": False, "interpreter": True}],
    "qwen2.5": [{"tools": True}, {"tools": False}],
    "chatml": [{"tools": True}, {"tools": False}],
    "llama3": [{"tools": False}],
}


def through_jinja(sample: dict[str, Any], name: str, jinja: str, prompt: bool) -> list[int]:
    return bytelevel(name).apply_chat_template(
        sample["messages"],
        tools=sample.get("tools"),
        chat_template=jinja,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
    )


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_exported_template_gives_the_encoder_s_tokens(name: str, prompt: bool):
    template = CHAT_TEMPLATES[name]
    encoder = Encoder.from_tokenizer(bytelevel(name), template)
    rng = random.Random(name)
    for kind in ROW_KINDS[name] * 40:
        sample = FORMATS["openai"](made_row(rng, **kind))
        document = encoder.encode([render(sample, template, add_generation_prompt=prompt)])[0]
        assert through_jinja(sample, name, template.jinja, prompt) == document.ids.tolist()


def test_named_turns_and_several_system_turns_agree():
    template = CHAT_TEMPLATES["internlm2"]
    tool = {"name": "f", "parameters": {}}
    messages = [
        {"role": "system", "content": "a", "name": "plugin"},
        {"role": "system", "content": "b", "name": "style"},
        {"role": "user", "content": "c", "name": "file"},
        {"role": "assistant", "content": "d"},
    ]
    for sample in ({"messages": messages, "tools": [tool]}, {"messages": messages}, {"messages": messages[:1]}):
        document = Encoder.from_tokenizer(bytelevel("internlm2"), template).encode([render(sample, template)])[0]
        assert through_jinja(sample, "internlm2", template.jinja, False) == document.ids.tolist()


def test_arguments_as_json_text_agree_where_they_are_written_as_python_writes_them():
    arguments = '{"city": "巴黎", "days": 2}'
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for name in ("internlm2", "qwen2.5"):
        template = CHAT_TEMPLATES[name]
        document = Encoder.from_tokenizer(bytelevel(name), template).encode([render({"messages": messages}, template)])[
            0
        ]
        assert through_jinja({"messages": messages}, name, template.jinja, False) == document.ids.tolist()


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_turn_whose_content_is_null_is_an_empty_one(name: str):
    sample = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]}
    document = Encoder.from_tokenizer(bytelevel(name), CHAT_TEMPLATES[name]).encode(
        [render(sample, CHAT_TEMPLATES[name])]
    )[0]
    assert through_jinja(sample, name, CHAT_TEMPLATES[name].jinja, False) == document.ids.tolist()


def test_llama3_s_template_refuses_tools():
    sample = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f", "parameters": {}}]}
    with pytest.raises(Exception, match="no tool grammar"):
        through_jinja(sample, "llama3", CHAT_TEMPLATES["llama3"].jinja, False)


@pytest.mark.parametrize(("name", "file"), [("qwen2.5", "qwen2_5.jinja"), ("llama3", "llama3.jinja")])
def test_tokens_are_those_of_the_published_template(name: str, file: str):
    """TRL carries the published templates; this needs it only as their place."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("trl, which carries the published templates, is not installed")
    published = (Path(trl.origin).parent / "chat_templates" / file).read_text()
    template = CHAT_TEMPLATES[name]
    encoder = Encoder.from_tokenizer(bytelevel(name), template)
    rng = random.Random(name)
    for kind in ROW_KINDS[name] * 40:
        sample = FORMATS["openai"](made_row(rng, **kind))
        wrapped = [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in sample.get("tools", [])
        ]
        document = encoder.encode([render(sample, template)])[0]
        assert through_jinja({**sample, "tools": wrapped}, name, published, False) == document.ids.tolist()
