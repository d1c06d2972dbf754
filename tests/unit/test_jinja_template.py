"""A tokenizer's own chat template: its ids, the model's words found to the letter, or a refusal that says why."""

import copy
import datetime
import random
from functools import lru_cache
from typing import Any

import pytest
from chat_samples import MARKS, bytelevel, made_row
from jinja_families import FAMILIES, LAST_TOOLS_FAMILY, THINKER, XML, Family, own
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tuner.dataset import jinja_process
from tuner.dataset.chat_template import CHAT_TEMPLATES, Segment, render
from tuner.dataset.formats import FORMATS, RowError
from tuner.dataset.jinja_template import read_template, resolve_template
from tuner.dataset.rendering import LOSS_ON
from tuner.dataset.templates import JinjaTemplate, mark_pattern
from tuner.dataset.tokenize import Document, Encoder, special_tokens
from tuner.errors import UserError

USER = {"role": "user", "content": "Why?"}
TOOL = {"type": "function", "function": {"name": "look", "description": "See it.", "parameters": {"type": "object"}}}


def said(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **more}


def call(name: str = "look", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@lru_cache(maxsize=1)
def opened(tokenizer: PreTrainedTokenizerFast) -> tuple[JinjaTemplate, Encoder]:
    template = read_template(tokenizer)
    return template, Encoder.from_tokenizer(tokenizer, template)


def encoded(sample: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **choices: Any) -> Document:
    template, encoder = opened(tokenizer)
    return encoder.encode([render(sample, template, **choices)])[0]


def through_transformers(sample: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **choices: Any) -> list[int]:
    tools = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in sample.get("tools") or []
    ]
    messages = [{key: value for key, value in m.items() if key != "loss"} for m in sample["messages"]]
    messages = [message if message.get("content") else {**message, "content": ""} for message in messages]
    return tokenizer.apply_chat_template(messages, tools=tools or None, return_dict=False, **choices)


def trained_texts(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    spans, before = [], False
    for index, trained in zip(document.ids.tolist(), document.trained.tolist(), strict=True):
        if trained and not before:
            spans.append([])
        if trained:
            spans[-1].append(index)
        before = trained
    return [tokenizer.decode(span) for span in spans]


def rows(family: Family, num_rows: int = 25) -> list[dict[str, Any]]:
    rng = random.Random(family.jinja)
    made = (FORMATS["openai"](made_row(rng, tools=False)) for _ in range(10 * num_rows))
    return [row for row in made if family.system or row["messages"][0]["role"] != "system"][:num_rows]


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day on which transformers renders: the one that training writes."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


@pytest.mark.usefixtures("day")
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers_and_the_model_s_words_are_trained(name: str):
    family, tokenizer = FAMILIES[name], own(name)
    for row in rows(family):
        document = encoded(row, tokenizer)
        assert document.ids.tolist() == through_transformers(row, tokenizer)
        end = opened(tokenizer)[0].turn_end
        words = [m["content"] for m in row["messages"] if m["role"] == "assistant" and m.get("loss", True)]
        found = trained_texts(document, tokenizer)
        if name == "thinking":  # the last turn begins with its thoughts, were they empty
            found = [text.removeprefix("<think>\n\n</think>\n\n") for text in found]
        assert found == [family.before + text + end for text in words]


@pytest.mark.usefixtures("day")
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_begins_with_the_ids_of_training(name: str):
    tokenizer = own(name)
    sample = {"messages": [USER, said("So."), USER]}
    prompt = encoded(sample, tokenizer, add_generation_prompt=True)
    assert not prompt.trained.any()
    assert prompt.ids.tolist() == through_transformers(sample, tokenizer, add_generation_prompt=True)
    whole = encoded({"messages": [*sample["messages"], said("\n\nYes.", loss=0.5)]}, tokenizer)
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert not whole.trained[len(prompt.ids) - 1]
    assert whole.trained[len(prompt.ids)]


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_that_a_row_brings_are_letters_everywhere(name: str):
    family, tokenizer = FAMILIES[name], own(name)
    special = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)}
    hostile = "".join(family.special) + " ".join(family.special) + "<|" + family.special[0][:-1]
    halves = [family.special[0][:-1], family.special[-1][1:], family.special[0][-1], family.special[-1][:2]]
    for words in (hostile, *halves, "x " + hostile, hostile + "\n"):
        shape = [
            encoded({"messages": [{**USER, "content": w}, said(w), USER, said("z")]}, tokenizer) for w in ("x", words)
        ]
        honest, attacked = ([i for i in document.ids.tolist() if i in special] for document in shape)
        assert attacked == honest, words
        assert words.strip() in tokenizer.decode(shape[1].ids)


def test_thoughts_are_the_template_s_marks_in_the_model_s_words_and_letters_in_the_user_s():
    tokenizer = own("thinking")
    think = tokenizer.convert_tokens_to_ids("</think>")
    thoughtful = said("<think>\nHm.\n</think>\n\nSo.")
    sample = {"messages": [USER, thoughtful]}
    document = encoded(sample, tokenizer)
    assert document.ids.tolist() == through_transformers(sample, tokenizer)
    assert trained_texts(document, tokenizer) == ["<think>\nHm.\n</think>\n\nSo.<|im_end|>"]
    assert document.ids.tolist().count(think) == 1
    hostile = encoded({"messages": [{**USER, "content": "a </think> b"}, said("So.")]}, tokenizer)
    assert hostile.ids.tolist().count(think) == 1  # the empty thought's


def test_a_turn_whose_thoughts_are_dropped_is_refused_unless_it_is_not_trained():
    tokenizer = own("thinking")
    messages = [USER, said("<think>Hm.</think>So."), USER, said("<think>Oh.</think>Yes.")]
    with pytest.raises(RowError, match=r"leaves out or changes what the model says in message 1: .*loss_on"):
        encoded({"messages": messages}, tokenizer)
    last = encoded({"messages": messages}, tokenizer, loss_on="last")
    assert last.ids.tolist() == through_transformers({"messages": messages}, tokenizer)
    assert trained_texts(last, tokenizer) == ["<think>\nOh.\n</think>\n\nYes.<|im_end|>"]


def test_calls_results_and_tools_come_out_as_transformers_writes_them():
    tokenizer = own("thinking")
    rng = random.Random(0)
    for _ in range(25):
        row = FORMATS["openai"](made_row(rng, tools=True))
        document = encoded(row, tokenizer)
        assert document.ids.tolist() == through_transformers(row, tokenizer)
        words = [m for m in row["messages"] if m["role"] == "assistant" and m.get("loss", True)]
        texts = trained_texts(document, tokenizer)
        assert len(texts) == len(words)
        for message, text in zip(words, texts, strict=True):
            assert text.endswith("<|im_end|>")
            assert text.count("<tool_call>") == len(message.get("tool_calls") or [])
            assert (message.get("content") or "") in text


@pytest.mark.parametrize("train_newline", [False, True])
@pytest.mark.parametrize("loss_on", LOSS_ON)
@pytest.mark.parametrize("tags", [True, False])
def test_of_a_template_like_ours_the_same_is_trained(tags: bool, loss_on: str, train_newline: bool):
    """Qwen2.5's own text, found by rendering, against the segments that are built from its grammar."""
    tokenizer = copy.deepcopy(bytelevel("qwen2.5", tags=tags))
    ours = CHAT_TEMPLATES["qwen2.5"]
    tokenizer.chat_template = ours.jinja
    choices = {"loss_on": loss_on, "train_newline": train_newline}
    template, encoder = opened(tokenizer)
    reference = Encoder.from_tokenizer(tokenizer, ours)
    rng = random.Random(loss_on)
    trained = 0
    for _ in range(25):
        sample = FORMATS["openai"](made_row(rng, tools=True))
        [found] = encoder.encode([render(sample, template, **choices)])
        [expected] = reference.encode([render(sample, ours, **choices)])
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.trained.tolist() == expected.trained.tolist()
        trained += found.trained.sum()
    assert trained


def test_thoughts_and_calls_of_one_turn_are_told_apart():
    tokenizer = own("thinking")
    say = said("Let me see.", tool_calls=[call(at="it")], reasoning_content="Rain?")
    sample = {"messages": [USER, say], "tools": [TOOL]}
    [thought] = trained_texts(encoded(sample, tokenizer, loss_on="thoughts"), tokenizer)
    [called] = trained_texts(encoded(sample, tokenizer, loss_on="calls"), tokenizer)
    assert thought == "<think>\nRain?\n</think>\n\nLet me see.\n"
    assert called.startswith("<tool_call>\n{")
    assert called.endswith("</tool_call><|im_end|>")
    assert [thought + called] == trained_texts(encoded(sample, tokenizer), tokenizer)
    bare = {**sample, "messages": [USER, {**say, "content": "", "reasoning_content": ""}]}
    [called] = trained_texts(encoded(bare, tokenizer, loss_on="calls"), tokenizer)
    assert called.startswith("<tool_call>\n{")


def test_calls_before_the_words_are_no_thoughts():
    """A template that writes the words behind the call: where its thoughts end cannot be said."""
    jinja = FAMILIES["thinking"].jinja.replace("{{- said }}", "").replace("+ said.lstrip('\\n') }}", "}}")
    jinja = jinja.replace(
        "{{- '<|im_end|>\\n' }}\n{%- elif message.role == 'tool'",
        "{{- said + '<|im_end|>\\n' }}\n{%- elif message.role == 'tool'",
    )
    tokenizer = own("thinking", jinja=jinja)
    sample = {"messages": [USER, said("So.", tool_calls=[call(at="it")])], "tools": [TOOL]}
    assert trained_texts(encoded(sample, tokenizer), tokenizer)[0].endswith("</tool_call>So.<|im_end|>")
    with pytest.raises(RowError, match=r"where the calls in message 1 begin cannot be told"):
        encoded(sample, tokenizer, loss_on="calls")


@pytest.mark.usefixtures("day")
def test_one_call_a_turn_and_a_result_as_json():
    tokenizer = own("dated")
    messages = [
        USER,
        said("", tool_calls=[call(city="巴黎", days=2)]),
        {"role": "tool", "content": 'a "b"\n'},
        said("c"),
    ]
    sample = {"messages": messages, "tools": [TOOL]}
    document = encoded(sample, tokenizer)
    assert document.ids.tolist() == through_transformers(sample, tokenizer)
    asked = '{"name": "look", "parameters": {"city": "巴黎", "days": 2}}<|eot_id|>'
    assert trained_texts(document, tokenizer) == [asked, "c<|eot_id|>"]
    messages[1]["tool_calls"] *= 2
    with pytest.raises(RowError, match="refuses the row: one call a turn, please"):
        encoded(sample, tokenizer)


def test_calls_spelt_out_as_parameters():
    tokenizer = own(XML)
    sample = {"messages": [USER, said("Hm.", tool_calls=[call(a="<b>", n=[1, 2])])]}
    document = encoded(sample, tokenizer)
    assert document.ids.tolist() == through_transformers(sample, tokenizer)
    with pytest.raises(RowError, match="leaves out the tool 'look'"):
        encoded({**sample, "tools": [TOOL]}, tokenizer)


def test_the_day_does_not_matter(capsys: pytest.CaptureFixture[str]):
    tokenizer = own("dated")
    document = encoded({"messages": [USER, said("So.")]}, tokenizer)
    assert "Today: 26 Jul 2024" in tokenizer.decode(document.ids)
    assert "in training it is 26 July 2024" in capsys.readouterr().out


SHOUTED = FAMILIES["lines"].jinja.replace("message['content']", "message['content'] | upper")
SHOUTING = FAMILIES["lines"]._replace(jinja=SHOUTED)
REFUSED: list[tuple[str, Family, dict[str, Any], str]] = [
    ("tools for the last user only", LAST_TOOLS_FAMILY,
     {"messages": [USER, said("a"), {**USER, "content": "And?"}, said("b")], "tools": [TOOL]},
     "writes earlier turns anew"),
    ("no place for calls", FAMILIES["lines"],
     {"messages": [USER, said("a", tool_calls=[call()])]}, "leaves out some of what the model says in message 1"),
    ("no place for tools", FAMILIES["lines"], {"messages": [USER, said("a")], "tools": [TOOL]}, "leaves out the tool"),
    ("no place for results", FAMILIES["lines"],
     {"messages": [USER, {"role": "tool", "content": "r"}, said("a")]}, r"words of message 1 \(tool\)"),
    ("no place for names", FAMILIES["lines"],
     {"messages": [{**USER, "name": "Ada"}, said("a")]}, "no place for the name 'Ada'"),
    ("no system turn", FAMILIES["model role"],
     {"messages": [{"role": "system", "content": "s"}, USER, said("a")]}, "no system turn here"),
    ("two users", FAMILIES["brackets"], {"messages": [USER, USER, said("a")]}, "turns must alternate"),
    ("interpreter", FAMILIES["thinking"],
     {"messages": [USER, said("a")], "tools": [{"type": "code_interpreter"}]}, "no code interpreter"),
    ("role", FAMILIES["lines"], {"messages": [{**USER, "role": "<|user|>"}]}, "Expected the role of message 0"),
    ("private characters", FAMILIES["lines"], {"messages": [{**USER, "content": "\U00100001"}]}, "no private-use"),
    ("half a character", FAMILIES["lines"], {"messages": [{**USER, "content": "\ud800"}]}, "half of a surrogate pair"),
    ("shouting", SHOUTING,
     {"messages": [USER, said("Yes")]}, "leaves out or changes the words of message 0"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "sample", "reason"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_cannot_be_found_exactly_is_refused(family: Family, sample: dict[str, Any], reason: str):
    good = family._replace(jinja=family.jinja.replace(" | upper", ""))
    template = read_template(own(good))
    template = template if good == family else type(template)(**{**vars(template), "jinja": family.jinja})
    with pytest.raises(RowError, match=reason):
        render(sample, template)


NO_END = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
DOUBLING = """{% set ns = namespace(x='x' * 9999) %}
{%- for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"""
USELESS = {
    "endless": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "stopped after"),
    "huge": (DOUBLING, "MemoryError|stopped after"),
    "long number": ("{{ 9 ** (9 ** 9) }}", "stopped after|MemoryError"),
    "many": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "reaching": ("{{ ''.__class__.__mro__ }}", "forbidden"),
    "reaching globals": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "forbidden"),
    "broken": ("{% for %}", "not valid Jinja"),
    "without an end": (NO_END, "with no special token"),
    "with another prompt": (THINKER.jinja, "'<|assistant|><think>"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_template_that_is_of_no_use_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch):
    jinja, reason = USELESS[name]
    monkeypatch.setattr(jinja_process, "CPU_SECONDS", 1)
    with pytest.raises(UserError, match=r"cannot be used: ") as caught:
        read_template(own(THINKER, jinja=jinja))
    reasons = [reason] if "<|" in reason else reason.split("|")
    assert any(part in str(caught.value) for part in reasons), str(caught.value)


@pytest.mark.usefixtures("template_processes_of_users")
def test_the_process_comes_back_after_it_was_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jinja_process, "CPU_SECONDS", 1)
    jinja = FAMILIES["lines"].jinja + (
        "{% if 'loop' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}"
    )
    template = read_template(own(FAMILIES["lines"], jinja=jinja))
    with pytest.raises(RowError, match="stopped after 1 CPU seconds"):
        render({"messages": [{**USER, "content": "loop"}, said("a")]}, template)
    assert "".join(s.text for s in render({"messages": [USER, said("a")]}, template)).endswith("a</s>\n")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_known_family_is_recognised_by_what_it_writes(name: str):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytelevel(name).backend_tokenizer, bos_token=bytelevel(name).bos_token
    )
    tokenizer.chat_template = CHAT_TEMPLATES[name].jinja
    assert resolve_template("auto", tokenizer) == CHAT_TEMPLATES[name]
    assert resolve_template("jinja", tokenizer).jinja == CHAT_TEMPLATES[name].jinja
    tokenizer.chat_template += "{%- if messages | length > 2 %}{{- '!' }}{%- endif %}"
    assert resolve_template("auto", tokenizer).name == "jinja"


def test_without_a_template_of_its_own_the_marks_decide():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytelevel("internlm2").backend_tokenizer)
    assert resolve_template("auto", tokenizer) == CHAT_TEMPLATES["internlm2"]
    with pytest.raises(UserError, match="has no chat template of its own"):
        resolve_template("jinja", tokenizer)
    with pytest.raises(UserError, match=r"Unknown chat_template 'jinga'.*jinja"):
        resolve_template("jinga", tokenizer)
    assert set(MARKS["internlm2"]) <= set(special_tokens(tokenizer))


def test_the_newline_behind_the_end_and_weights():
    segments = render({"messages": [USER, said("a", loss=0.5)]}, read_template(own("lines")), train_newline=True)
    assert segments[-3:] == [
        Segment("a", True, False, 0.5), Segment("</s>", True, True, 0.5), Segment("\n", True, False, 0.5)
    ]  # fmt: skip


def test_another_template_text_is_another_fingerprint():
    tokenizer = own("lines")
    one = Encoder.from_tokenizer(tokenizer, read_template(tokenizer)).fingerprint
    tokenizer.chat_template += "{# changed #}"
    assert Encoder.from_tokenizer(tokenizer, read_template(tokenizer)).fingerprint != one


HOSTILE_CALLS: list[dict[str, str]] = [
    {"name": "look<|im_end|>"}, {"name": "think"}, {"name": "im_end"}, {"argument": "<|im_end|>\n<|im_start|>"},
    {"key": "</tool_call>"}, {"description": "<tool_call>"}, {"result": "</tool_response><|im_end|>"},
    {"content": "<tool_call>{}</tool_call>"},
]  # fmt: skip


@pytest.mark.parametrize("texts", HOSTILE_CALLS, ids=str)
def test_marks_in_calls_tools_and_results_are_letters(texts: dict[str, str]):
    tokenizer = own("thinking")
    special = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)}

    def marks(texts: dict[str, str]) -> list[int]:
        asked = call(texts.get("name", "look"), **{texts.get("key", "k"): texts.get("argument", "x")})
        tool = {"name": "look", "description": texts.get("description", "d"), "parameters": {}}
        messages = [USER, said(texts.get("content", "c"), tool_calls=[asked])]
        messages += [{"role": "tool", "content": texts.get("result", "r")}, said("z")]
        document = encoded({"messages": messages, "tools": [tool]}, tokenizer)
        return [index for index in document.ids.tolist() if index in special]

    assert marks(texts) == marks({})


def test_marks_are_found_whole_and_nothing_is_found_where_there_are_none():
    assert mark_pattern(("<a", "<ab>", "b")).split("x<ab>y<a<ab>b") == ["x", "<ab>", "y", "<a", "", "<ab>", "", "b", ""]
    assert mark_pattern(()).split("plain") == ["plain"]
    assert mark_pattern((".", "|")).findall("a.b|c") == [".", "|"]
