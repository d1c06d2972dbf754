"""Made conversations with tools, and a small byte-level tokenizer as Qwen's and Llama's, for tests of the chat path."""

import random
from functools import cache
from typing import Any

from small_tokenizer import made_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARKS = {
    "qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "internlm2": [
        *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
        *("<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
    ],
}
MARKS["chatml"] = MARKS["qwen2.5"]
TOOL_TAGS = ["<tool_call>", "</tool_call>"]  # added tokens of Qwen2.5 that are not special
BEGIN = {"llama3": "<|begin_of_text|>", "internlm2": "<s>"}
SPLIT = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")

WEATHER = {
    "name": "get_weather",
    "description": "天气 of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}


@cache
def bytelevel(template: str, *, tags: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 700 entries with a template's marks; its post-processor adds a first token, as Llama's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=template == "llama3"))
    tokenizer.normalizer = normalizers.NFC() if template == "qwen2.5" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*made_text(1, 2000), "user\nassistant\nsystem\n<tool_call>\n" * 50], trainer)
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS[template]])
    if template in ("qwen2.5", "chatml") and tags:
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TOOL_TAGS])
    begin = BEGIN.get(template, MARKS[template][0])
    post = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
    tokenizer.post_processor = post
    names = {"bos_token": begin} if template in BEGIN else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def made_words() -> list[str]:
    """Texts without white space at their ends, so that encoding a conversation whole or piece by piece is the same."""
    return [line.strip() or "嗯" for line in made_text(2, 2000)]


def made_row(rng: random.Random, *, tools: bool, interpreter: bool = False, words: list[str] | None = None) -> dict:
    """A row of the openai format: one to four rounds, with calls (parallel ones too), results and answers."""
    words = words or rng.sample(made_words(), 40)
    declared: list[dict[str, Any]] = [{"type": "function", "function": WEATHER}, ADD] if tools else []
    declared += [{"type": "code_interpreter"}] if interpreter else []
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(words)})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": rng.choice(words)})
        while declared and rng.random() < 0.5:
            messages += made_calls(rng, words, code_share=(0.5 if tools else 1.0) if interpreter else 0.0)
        messages.append({"role": "assistant", "content": rng.choice(words)})
        if rng.random() < 0.2:
            messages[-1]["loss"] = False
    if not any(message["role"] == "assistant" and message.get("loss", True) for message in messages):
        messages[-1].pop("loss")
    return {"messages": messages, **({"tools": declared} if declared else {})}


def made_calls(rng: random.Random, words: list[str], *, code_share: float) -> list[dict[str, Any]]:
    """An assistant turn of one to three calls and their results, in order or, with ids, in any order."""
    ids = rng.random() < 0.5
    calls: list[dict[str, Any]] = []
    for place in range(rng.randint(1, 3)):
        if rng.random() < code_share:
            call: dict[str, Any] = {"type": "code_interpreter", "code_interpreter": {"input": f"print({place})\nx = 1"}}
        else:
            arguments = {"city": rng.choice(words), "days": place}
            call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        calls.append({"id": f"call_{place}", **call} if ids else call)
    results = [{"role": "tool", "content": rng.choice(words)} for _ in calls]
    if ids:
        for call, result in zip(calls, results):
            result["tool_call_id"] = call["id"]
        rng.shuffle(results)
    said = rng.choice([None, "", rng.choice(words)])
    return [{"role": "assistant", "content": said, "tool_calls": calls}, *results]
