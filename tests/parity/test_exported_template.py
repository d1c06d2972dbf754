"""A converted tokenizer's own chat template gives the ids of training, on every real file, tools included."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_samples import bytelevel, made_row
from jinja_families import own
from test_chat_internlm2 import glaive_rows
from transformers import PreTrainedTokenizerFast

from tuner.convert.settings import write_tokenizer
from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.formats import FORMATS, RowError
from tuner.dataset.messages import PARALLEL_TOOL_CALLS, Sample, call_arguments, function_body, is_interpreter
from tuner.dataset.rendering import Rendering
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.dataset.templates import trained_with
from tuner.dataset.tokenize import Encoder
from tuner.model.tokenizer import build_tokenizer


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as objects, as transformers asks for: a template writes JSON text as it came."""
    read = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": call_arguments(call)}}
            for call in message.get("tool_calls") or []
        ]
        read.append({**message, "tool_calls": calls} if calls else message)
    return read


def said(question: str, answer: str) -> Sample:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def glaive_toolcall(data: Path) -> Iterator[Sample]:
    for row in glaive_rows(data)[0]:
        try:
            sample = FORMATS["openai"](row)
        except RowError:
            continue  # two have a result that no call came before
        yield {**sample, "messages": with_objects(sample["messages"])}


def bfcl(data: Path) -> Iterator[Sample]:
    """Questions, several turns of them, with the possible answers as (parallel) calls."""
    for path in sorted((data / "bfcl").glob("*.json")):
        place = data / "bfcl/possible_answer" / path.name
        answers = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
        truth = {
            answer["id"]: answer["ground_truth"] for answer in answers if isinstance(answer["ground_truth"][0], dict)
        }
        for row in map(json.loads, path.read_text().splitlines()):
            messages = [message for turn in row["question"] for message in turn]
            calls = [
                {"name": name, "arguments": {key: values[0] for key, values in arguments.items() if values}}
                for possible in truth.get(row["id"], [])
                for name, arguments in possible.items()
            ]
            if calls:
                tool_calls = [{"type": "function", "function": call} for call in calls]
                messages = [*messages, {"role": "assistant", "content": None, "tool_calls": tool_calls}]
            yield {
                "messages": messages,
                "tools": [{"type": "function", "function": f} for f in row.get("function", [])],
            }


def gsm8k(data: Path) -> Iterator[Sample]:
    for path in sorted((data / "gsm8k").glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            yield said(row["question"], row["answer"])


def gpteacher(data: Path) -> Iterator[Sample]:
    for path in sorted((data / "gpteacher").glob("*.json")):
        for row in json.loads(path.read_text()):
            yield said(row["instruction"] + "\n" + row["input"], row.get("response", row.get("output")))


def toolbench_example(data: Path) -> Iterator[Sample]:
    for path in sorted((data / "toolbench_example").glob("*answer*.json")):
        answer = json.loads(path.read_text())["answer_generation"]
        tools = [{"type": "function", "function": function} for function in answer["function"]]
        for conversation in answer["train_messages"]:
            messages = []
            for turn in conversation:
                role = "tool" if turn["role"] == "function" else turn["role"]
                message = {"role": role, "content": turn.get("content")}
                if "function_call" in turn:
                    message["tool_calls"] = [{"type": "function", "function": turn["function_call"]}]
                messages.append(message)
            yield {"messages": with_objects(messages), "tools": tools}


READERS = {read.__name__: read for read in (glaive_toolcall, bfcl, gsm8k, gpteacher, toolbench_example)}


def converted(
    tokenizer: PreTrainedTokenizerFast, name: str, directory: Path, calls: str = "template"
) -> PreTrainedTokenizerFast:
    """The tokenizer as `tuner convert` leaves it for others, of a model trained with parallel_tool_calls=`calls`."""
    source, out = directory / "source", directory / "out"
    tokenizer.save_pretrained(source)
    (source / "template.json").write_text(json.dumps({"chat_template": name, "parallel_tool_calls": calls}))
    out.mkdir()
    write_tokenizer(source, out)
    return build_tokenizer(str(out))


def differing(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, samples: list[Sample], name: str, calls: str = "template"
) -> list[int]:
    """The places of the samples whose ids differ between training and the tokenizer's own chat template."""
    arrange = PARALLEL_TOOL_CALLS[calls]
    arranged = [{**sample, "messages": arrange(sample["messages"])} for sample in samples]
    documents = encoder.encode([render(sample, CHAT_TEMPLATES[name]) for sample in arranged])
    different = []
    for place, (sample, document) in enumerate(zip(samples, documents, strict=True)):
        tools = sample.get("tools") or None
        ids = tokenizer.apply_chat_template(sample["messages"], tools=tools, tokenize=True, return_dict=False)
        different += [place] if ids != document.ids.tolist() else []
    return different


def with_parallel_calls(*, interpreter: bool) -> list[Sample]:
    """Made conversations; the results of parallel calls come in any order, and belong to their calls by their ids."""
    rng = random.Random(5)
    samples: list[Sample] = []
    while len(samples) < 60:
        sample = FORMATS["openai"](made_row(rng, tools=True, interpreter=interpreter))
        calls = [message["tool_calls"] for message in sample["messages"] if message.get("tool_calls")]
        if any(len(set(map(is_interpreter, group))) > 1 for group in calls):
            continue  # cannot be joined
        samples.append(sample)
    assert sum(len(m.get("tool_calls") or []) > 1 for sample in samples for m in sample["messages"]) > 20
    return samples


@pytest.mark.parametrize("calls", ["template", "split", "join"])
@pytest.mark.parametrize("name", ["internlm2", "qwen2.5", "chatml"])
def test_a_template_goes_with_how_parallel_calls_were_trained(name: str, calls: str, tmp_path: Path):
    samples = with_parallel_calls(interpreter=name == "internlm2")
    tokenizer = converted(bytelevel(name), name, tmp_path, calls)
    encoder = Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES[name])
    assert differing(tokenizer, encoder, samples, name, calls) == []
    others = {"internlm2": "join", "qwen2.5": "split", "chatml": "split"}
    if calls != others[name]:
        assert differing(tokenizer, encoder, samples, name, others[name]), "the other way has other ids"


def test_a_tokenizer_s_own_template_goes_with_the_setting(tmp_path: Path):
    tokenizer = converted(own("thinking"), "jinja", tmp_path, "split")
    rows = SampleEncoder.from_tokenizer(own("thinking"), Rendering("jinja", parallel_tool_calls="split"))
    samples = with_parallel_calls(interpreter=False)[:20]
    for sample, document in zip(samples, rows.encode(list(map(rows.segments, samples))), strict=True):
        plain = [{key: value for key, value in message.items() if key != "loss"} for message in sample["messages"]]
        tools = [{"type": "function", "function": function_body(tool)} for tool in sample["tools"]]
        text = tokenizer.apply_chat_template(plain, tools=tools, tokenize=False)
        assert text == tokenizer.decode(document.ids)


def test_a_model_that_joins_calls_does_not_stop_behind_the_first():
    stops = {calls: trained_with(CHAT_TEMPLATES["internlm2"], calls).stop_tokens for calls in PARALLEL_TOOL_CALLS}
    assert "<|action_end|>" not in stops.pop("join")
    assert set(stops.values()) == {CHAT_TEMPLATES["internlm2"].stop_tokens}


@pytest.mark.parametrize("calls", ["split", "join"])
def test_real_parallel_calls_have_the_ids_of_training(calls: str, shared_data: Path, tmp_path: Path):
    samples = [s for s in bfcl(shared_data) if any(len(m.get("tool_calls") or []) > 1 for m in s["messages"])][::12]
    assert len(samples) > 17
    tokenizer = converted(build_tokenizer(str(shared_data / "internlm2-7b-hub")), "internlm2", tmp_path, calls)
    encoder = Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES["internlm2"])
    assert differing(tokenizer, encoder, samples, "internlm2", calls) == []


@pytest.fixture(scope="module")
def internlm2(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer(str(shared_data / "internlm2-7b-hub"))
    return converted(tokenizer, "internlm2", tmp_path_factory.mktemp("internlm2"))


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 27])
@pytest.mark.parametrize("reader", READERS)
def test_real_rows_have_the_ids_of_training(
    reader: str, every: int, shared_data: Path, internlm2: PreTrainedTokenizerFast
):
    """Every row of every file; none of them has the one difference there may be, a model's turn that begins blank."""
    if not (shared_data / reader).is_dir():
        pytest.skip(f"no {reader} in the real data")
    samples = list(READERS[reader](shared_data))[::every]
    assert samples
    encoder = Encoder.from_tokenizer(internlm2, CHAT_TEMPLATES["internlm2"])
    assert differing(internlm2, encoder, samples, "internlm2") == []


@pytest.mark.parametrize("name", ["qwen2.5", "chatml", "llama3"])
def test_other_templates_agree_on_real_rows(name: str, shared_data: Path, tmp_path: Path):
    """With a small byte-level tokenizer, whose pre-tokeniser cuts like theirs; every fortieth row."""
    samples = [
        sample
        for reader in READERS.values()
        if (shared_data / reader.__name__).is_dir()
        for sample in reader(shared_data)
    ]
    if name == "llama3":
        samples = [sample for sample in samples if not sample.get("tools")]
    samples = [
        sample for sample in samples[::40] if not any(m["role"] == "tool" and m.get("name") for m in sample["messages"])
    ]
    assert len(samples) > 300
    tokenizer = converted(bytelevel(name), name, tmp_path)
    assert differing(tokenizer, Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES[name]), samples, name) == []


def test_chatml_without_tokens_for_its_tags_agrees(shared_data: Path, tmp_path: Path):
    """InternLM2's tokenizer reads <tool_call> as letters, which join those around them."""
    tokenizer = converted(build_tokenizer(str(shared_data / "internlm2-7b-hub")), "chatml", tmp_path)
    samples = list(bfcl(shared_data))[::60] + list(toolbench_example(shared_data))
    assert differing(tokenizer, Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES["chatml"]), samples, "chatml") == []


def test_only_blanks_can_join_the_newline_before_the_model_s_words(internlm2: PreTrainedTokenizerFast):
    """BPE builds pieces of the vocabulary only: what no piece holds side by side is never joined.

    So the ids of a whole conversation are those of training, unless a model's turn begins with white space.
    """
    behind = {piece[place + 1] for piece in internlm2.get_vocab() for place, c in enumerate(piece[:-1]) if c == "\n"}
    assert behind == {"\n", "\r", "\t", "▁"}  # the last one stands for a space


def test_what_is_generated_follows_the_prompt_s_ids(internlm2: PreTrainedTokenizerFast):
    """Where a model's turn begins blank, training keeps to the ids that generation sees."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nSo be it."}]
    prompt = internlm2.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    template = CHAT_TEMPLATES["internlm2"]
    document = Encoder.from_tokenizer(internlm2, template).encode([render({"messages": messages}, template)])[0]
    assert document.ids[: len(prompt)].tolist() == prompt
    assert not document.trained[: len(prompt)].any()
    assert document.trained[len(prompt)]
    whole = internlm2.apply_chat_template(messages, return_dict=False)
    assert whole != document.ids.tolist()  # the one difference there is
    assert internlm2.decode(whole) == internlm2.decode(document.ids)
