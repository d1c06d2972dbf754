"""With InternLM2's real tokenizer: the published transcripts, real conversations, and marks that users write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tuner.dataset.chat_template import CHAT_TEMPLATES, Segment, render
from tuner.dataset.formats import FORMATS, RowError
from tuner.dataset.tokenize import Document, Encoder
from tuner.model.tokenizer import build_tokenizer

TEMPLATE = CHAT_TEMPLATES["internlm2"]
START, END, NEWLINE = 92543, 92542, 364
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
# The two transcripts, as (ids, trained). Their tokens come from the published tokenizer.
PLUGIN_TRANSCRIPT = [
    ([1, START, 9081, 364, 2770, 657, 4576, 11146, 314, 285, 15805, 328, 395, 51978, 15358, 17993, END, 364], False),
    ([START, 9081, 963, 310, 92538, 364, 336, 5071, 738, 921, 461, 586, 11232, 284, 15329, 628, 461, 4847, 921], False),
    ([461, 2101, 410, 1628, 9234, 435, 395, 2823, 3888, 628, 461, 13927, 921, 5371, 1459, 921, 461, 1850, 628], False),
    ([461, 13333, 921, 5371, 2683, 921, 5371, 1459, 921, 461, 1054, 9338, 2291, 461, 6436, 921, 4544, 2683], False),
    ([1487, 3578, 332, END, 364, START, 1008, 364], False),
    ([295, 1511, 442, 1560, 3514, 725, 9234, 435, 36956, END, 364, START, 525, 11353, 364], False),
    ([39584, 328, 489, 818, 2873, 500, 410, 9234, 446, 36956, 281, 92541, 92538, 364, 5071, 738, 921, 461, 586], True),
    ([11232, 284, 15329, 628, 461, 13927, 921, 5371, 2683, 921, 461, 2166, 30326, 31185, 92540, 364, END], True),
    ([364, START, 23625, 963, 310, 92538, 364, 5071, 34585, 921, 262, 1435, 335, END, 364], False),
    ([START, 525, 11353, 364], False),
    ([918, 9234, 435, 36956, 505, 262, 1435, 403, 39999, END], True),
    ([364], False),
]
INTERPRETER_TRANSCRIPT = [
    ([1, START, 9081, 963, 310, 92539, 364, 6877, 2189, 281, END, 364], False),
    ([START, 1008, 364, 314, 465, 734, 345, END, 364, START, 525, 11353, 364], False),
    ([295, 818, 12715, 563, 281, 92541, 92539, 364, 14016, 350, 12819, 364, 1496, 298, 314, 465, 734, 471], True),
    ([14016, 350, 92540, 364, END], True),
    ([364, START, 23625, 963, 310, 92539, 364, 734, 1311, END, 364, START, 525, 11353, 364], False),
    ([734, 1311, END], True),
    ([364], False),
]


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> PreTrainedTokenizerFast:
    return build_tokenizer(str(shared_data / "internlm2-7b-hub"))


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder.from_tokenizer(tokenizer, TEMPLATE)


def encoded(encoder: Encoder, rows: list[dict[str, Any]]) -> list[Document]:
    return encoder.encode([render(row, TEMPLATE) for row in rows])


def check(document: Document, transcript: list[tuple[list[int], bool]]) -> None:
    assert document.ids.tolist() == [index for ids, _ in transcript for index in ids]
    assert document.trained.tolist() == [trained for ids, trained in transcript for _ in ids]


def test_the_plugin_transcript_comes_out_token_for_token(encoder: Encoder):
    arguments = '{"location": "Shanghai"}'
    call = {"type": "function", "function": {"name": "get_current_weather", "arguments": arguments}}
    messages = [
        {"role": "system", "content": "You are InternLM2-Chat, a harmless AI assistant"},
        {"role": "user", "content": "I want to know today's weather in Shanghai"},
        {
            "role": "assistant",
            "content": "Sure, I will search for the weather of Shanghai.",
            "tool_calls": [call],
        },
        {"role": "tool", "content": '{"temperature": 22}'},
        {"role": "assistant", "content": "The weather in Shanghai is 22 celsius"},
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": WEATHER}]}
    document = encoded(encoder, [FORMATS["openai"](row)])[0]
    check(document, PLUGIN_TRANSCRIPT)
    assert (len(document.ids), document.trained.sum()) == (163, 46)  # of the lab's 48, two are the \n after the end


def test_the_interpreter_transcript_comes_out_token_for_token(encoder: Encoder):
    call = {"type": "code_interpreter", "code_interpreter": {"input": "print(2**10)"}}
    messages = [
        {"role": "user", "content": "2**10?"},
        {"role": "assistant", "content": "I will compute it.", "tool_calls": [call]},
        {"role": "tool", "content": "1024"},
        {"role": "assistant", "content": "1024"},
    ]
    row = {"messages": messages, "tools": [{"type": "code_interpreter", "description": "Run code."}]}
    document = encoded(encoder, [FORMATS["openai"](row)])[0]
    check(document, INTERPRETER_TRANSCRIPT)
    assert (len(document.ids), document.trained.sum()) == (67, 26)
    with_newline = encoder.encode([render(FORMATS["openai"](row), TEMPLATE, train_newline=True)])[0]
    lab = list(INTERPRETER_TRANSCRIPT)
    lab[4:5] = [([NEWLINE], True), (lab[4][0][1:], False)]  # behind the call's end mark
    lab[-1] = ([NEWLINE], True)
    check(with_newline, lab)
    assert with_newline.trained.sum() == 28  # as the lab trains it


def test_a_leading_newline_merges_as_in_the_whole_text_but_never_with_the_prompt(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
):
    messages = [{"role": "user", "content": "\nfoo"}, {"role": "assistant", "content": "\nfoo"}]
    ids = encoded(encoder, [{"messages": messages}])[0].ids.tolist()
    assert ids == [1, START, 1008, 402, 8110, END, 364, START, 525, 11353, 364, 364, 8110, END, 364]
    prompt = encoder.encode([render({"messages": messages[:1]}, TEMPLATE, add_generation_prompt=True)])[0].ids.tolist()
    assert ids[: len(prompt)] == prompt
    assert through_jinja(tokenizer, {"messages": messages[:1]}, TEMPLATE.jinja) == prompt[:-4]


def glaive_rows(shared_data: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """ShareGPT rows as openai rows, and each as the text that InternLM2's grammar makes of it, written by hand."""
    rows, texts = [], []
    for language in ("en", "zh"):
        for row in json.loads((shared_data / f"glaive_toolcall/glaive_toolcall_{language}_demo.json").read_text()):
            tools = json.loads(row["tools"] or "[]")
            plugin = json.dumps(tools, ensure_ascii=False)
            text = f"<s><|im_start|>system name=<|plugin|>\n{plugin}<|im_end|>\n" if tools else "<s>"
            messages = []
            for turn in row["conversations"]:
                message, role, said = glaive_turn(turn["from"], turn["value"])
                messages.append(message)
                text += f"<|im_start|>{role}\n{said}<|im_end|>\n"
            rows.append({"messages": messages, "tools": row["tools"]})
            texts.append(text)
    return rows, texts


def glaive_turn(speaker: str, value: str) -> tuple[dict[str, Any], str, str]:
    """One turn as a message, and its head and words in InternLM2's grammar."""
    if speaker == "function_call":
        call = json.loads(value)
        function = {"name": call["name"], "arguments": call["arguments"]}
        parameters = json.dumps({"name": call["name"], "parameters": call["arguments"]}, ensure_ascii=False)
        message = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        return message, "assistant", f"<|action_start|><|plugin|>\n{parameters}<|action_end|>\n"
    role = {"human": "user", "gpt": "assistant", "observation": "tool"}[speaker]
    head = "environment name=<|plugin|>" if role == "tool" else role
    return {"role": role, "content": value}, head, value


def test_real_tool_conversations_equal_the_grammar_written_by_hand(
    shared_data: Path, encoder: Encoder, tokenizer: PreTrainedTokenizerFast
):
    samples, texts, refused = [], [], []
    for row, text in zip(*glaive_rows(shared_data), strict=True):
        try:
            samples.append(FORMATS["openai"](row))
            texts.append(text)
        except RowError as error:
            refused.append(str(error))
    assert len(refused) == 2  # two Chinese rows have a result that no call came before
    assert all("tool result needs a tool call" in error for error in refused)
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for place, (document, ids, sample) in enumerate(zip(encoded(encoder, samples), whole, samples, strict=True)):
        assert document.ids.tolist() == ids
        if place % 6 == 0:
            assert through_jinja(tokenizer, sample, TEMPLATE.jinja) == ids
        said = [message for message in sample["messages"] if message["role"] == "assistant"]
        assert (document.ids[document.trained] == END).sum() == len(said)


def through_jinja(tokenizer: PreTrainedTokenizerFast, sample: dict[str, Any], jinja: str) -> list[int]:
    tools = sample.get("tools")
    return tokenizer.apply_chat_template(
        sample["messages"], tools=tools, chat_template=jinja, tokenize=True, return_dict=False
    )


def alpaca_rows(shared_data: Path) -> list[dict[str, Any]]:
    lines = (shared_data / "gsm8k/train.jsonl").read_text().splitlines()[::75]
    rows = [{"instruction": row["question"], "output": row["answer"]} for row in map(json.loads, lines)]
    for path in sorted((shared_data / "gpteacher").glob("*.json")):
        rows += json.loads(path.read_text())[::40]
    return rows


def test_real_dialogues_equal_the_published_template_and_ours(
    shared_data: Path, encoder: Encoder, tokenizer: PreTrainedTokenizerFast
):
    config = json.loads((shared_data / "internlm2-7b-hub/tokenizer_config.json").read_text())
    samples = [FORMATS["alpaca"](row) for row in alpaca_rows(shared_data)]
    assert len(samples) > 300
    for sample, document in zip(samples, encoded(encoder, samples), strict=True):
        ids = document.ids.tolist()
        assert through_jinja(tokenizer, sample, config["chat_template"]) == ids
        assert through_jinja(tokenizer, sample, TEMPLATE.jinja) == ids
        assert (
            tokenizer.decode(ids[np.argmax(document.trained) : -1]) == sample["messages"][-1]["content"] + "<|im_end|>"
        )


HOSTILE = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|plugin|>", "<|action_start|>"] + [
    f"[UNUSED_TOKEN_{place}]" for place in range(147)
]


def test_marks_that_a_user_writes_are_letters_and_decode_to_themselves(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
):
    """The spare tokens, too: one of them is the reward token."""
    reserved = {0, 1, 2, *range(92397, 92544)}
    texts = [*HOSTILE, "".join(HOSTILE), " ".join(HOSTILE), *(f"好{mark}\n" for mark in HOSTILE)]
    documents = encoder.encode([[Segment(text, False, False)] for text in texts])
    for text, document in zip(texts, documents, strict=True):
        assert not reserved & set(document.ids.tolist())
        assert tokenizer.decode(document.ids) == text


def test_text_is_encoded_as_by_the_original_tokenizer(
    shared_data: Path, encoder: Encoder, tokenizer: PreTrainedTokenizerFast
):
    """Three hundred thousand letters of Chinese, English and code, in pieces of a page."""
    files = ["zh_classics/honglou.txt", "en_books/moby_dick.asciidoc", "gpteacher/codegen-instruct.json"]
    content = "".join((shared_data / file).read_text()[:100_000] for file in files)
    pages = [content[start : start + 2000] for start in range(0, len(content), 2000)]
    documents = encoder.encode([render({"text": page}, TEMPLATE) for page in pages])
    for document, ids in zip(documents, tokenizer(pages, add_special_tokens=False)["input_ids"], strict=True):
        assert document.ids.tolist() == [1, *ids, 2]
        assert document.trained.tolist() == [False] + [True] * (len(ids) + 1)
