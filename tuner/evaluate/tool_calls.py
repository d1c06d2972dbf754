"""Held-out tool calls: which share of them a model writes exactly right, by tool and language."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tuner.dataset.chat_template import ChatTemplate, parse_reply, render
from tuner.dataset.messages import Sample, call_arguments, is_interpreter
from tuner.dataset.tokenize import Encoder

INTERPRETER = "interpreter"  # how the code interpreter is named in the report
Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Case:
    """One assistant turn with tool calls: the conversation before it, and the calls that are right."""

    prompt: Sample
    request: str
    expected: tuple[dict[str, Any], ...]

    @property
    def tool(self) -> str:
        """Name of the first tool that is right."""
        return self.expected[0]["name"]

    @property
    def language(self) -> str:
        """ "zh" where the request has Chinese characters, "en" otherwise."""
        return "zh" if any("\u4e00" <= character <= "\u9fff" for character in self.request) else "en"


@dataclass(frozen=True)
class Outcome:
    """A case and what the model wrote."""

    case: Case
    written: str
    right: bool


@dataclass(frozen=True)
class ToolCallReport:
    """Outcomes, counted."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of the calls that are exactly right, 0 to 1."""
        return sum(outcome.right for outcome in self.outcomes) / len(self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        """What went wrong, in the order of the conversations."""
        return [outcome for outcome in self.outcomes if not outcome.right]

    def count(self, tool: str | None = None, language: str | None = None) -> tuple[int, int]:
        """(right, all) of the calls of a tool in a language; None is any."""
        rights = [
            outcome.right
            for outcome in self.outcomes
            if tool in (None, outcome.case.tool) and language in (None, outcome.case.language)
        ]
        return sum(rights), len(rights)

    def table(self) -> str:
        """A line per tool and language, and the whole with its interval."""
        languages = sorted({outcome.case.language for outcome in self.outcomes})
        tools = sorted({outcome.case.tool for outcome in self.outcomes})
        lines = [f"{'tool':<14}" + "".join(f"{language:>12}" for language in languages) + f"{'all':>12}"]
        for tool in tools:
            counts = [*(self.count(tool, language) for language in languages), self.count(tool)]
            lines.append(f"{tool:<14}" + "".join(f"{right:>7}/{total:<4}" for right, total in counts))
        right, total = self.count()
        low, high = wilson_interval(right, total)
        lines.append(f"exactly right: {right} of {total} = {self.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%})")
        return "\n".join(lines)

    def show_failures(self, num_shown: int) -> str:
        """The first failures: request, what is right, what was written."""
        lines = []
        for outcome in self.failures[:num_shown]:
            lines.append(f"asked   {outcome.case.request}")
            lines.append(f"right   {list(outcome.case.expected)}")
            lines.append(f"written {outcome.written!r}")
        return "\n".join(lines)


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson (1927); it holds near 0 and 1, where the normal one does not."""
    share, square = right / total, Z95 * Z95
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z95 * sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def normal_form(call: dict[str, Any]) -> dict[str, Any]:
    """A call by what it means: name and arguments, or the interpreter's code; ids and the order of keys left out."""
    if is_interpreter(call):
        return {"name": INTERPRETER, "code": call["code_interpreter"]["input"]}
    return {"name": call["function"]["name"], "arguments": call_arguments(call)}


def tool_call_cases(conversations: Iterable[Sample]) -> Iterator[Case]:
    """Every assistant turn with tool calls, with all that came before it."""
    for conversation in conversations:
        messages = conversation["messages"]
        for position, message in enumerate(messages):
            if not message.get("tool_calls"):
                continue
            asked = [turn["content"] for turn in messages[:position] if turn["role"] == "user"]
            yield Case(
                prompt={"messages": messages[:position], "tools": conversation.get("tools", [])},
                request=asked[-1] if asked else "",
                expected=tuple(normal_form(call) for call in message["tool_calls"]),
            )


def evaluate_tool_calls(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Iterable[Sample],
    *,
    chat_template: ChatTemplate,
    max_new_tokens: int = 96,
    batch_size: int = 32,
) -> ToolCallReport:
    """Let the model write each tool call greedily, after the true conversation up to it, and compare.

    Right means: the same calls, each with the same name and every argument equal; the interpreter, the same code.
    What the model says before the call does not count.
    """
    cases = list(tool_call_cases(conversations))
    if not cases:
        raise ValueError("no assistant turn with tool calls in these conversations; there is nothing to evaluate")
    encoder = Encoder.from_tokenizer(tokenizer, chat_template)
    segments = [render(case.prompt, chat_template, add_generation_prompt=True) for case in cases]
    prompts = [document.ids.astype("int64").tolist() for document in encoder.encode(segments)]
    outcomes: dict[int, Outcome] = {}
    by_length = sorted(range(len(cases)), key=lambda index: len(prompts[index]))  # little padding in a batch
    for start in range(0, len(cases), batch_size):
        batch = by_length[start : start + batch_size]
        stop_ids = tokenizer.convert_tokens_to_ids(list(chat_template.stop_tokens))
        replies = generate_greedily(llm, [prompts[index] for index in batch], stop_ids, max_new_tokens)
        for index, reply in zip(batch, replies):
            written = tokenizer.decode(reply, skip_special_tokens=False)
            outcomes[index] = Outcome(cases[index], written, is_right(cases[index], written, chat_template))
    return ToolCallReport(tuple(outcomes[index] for index in range(len(cases))))


def is_right(case: Case, written: str, chat_template: ChatTemplate) -> bool:
    """Whether a model's text makes exactly the expected calls."""
    calls = parse_reply(written, chat_template).tool_calls
    return tuple(normal_form(call) for call in calls) == case.expected


@torch.inference_mode()
def generate_greedily(
    llm: PreTrainedModel, prompts: Sequence[list[int]], stop_ids: list[int], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to and without its first stop token; padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    pad = stop_ids[0]
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])  # (B, T) int64
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    was_training = llm.training
    llm.eval()
    generated = llm.generate(
        input_ids.to(llm.device),
        attention_mask=mask.to(llm.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=pad,
    )
    llm.train(was_training)
    return [_until_stop(reply, stop_ids) for reply in generated[:, longest:].tolist()]


def _until_stop(reply: list[int], stop_ids: list[int]) -> list[int]:
    stops = [position for position, token in enumerate(reply) if token in stop_ids]
    return reply[: stops[0]] if stops else reply
