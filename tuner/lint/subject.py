"""A row as the checks see it: its conversation if it has one, its texts, its tokens, and why its format refuses it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from tuner.dataset.messages import Message, dump, is_interpreter


class Text(NamedTuple):
    """A text of a row, who says it and where."""

    where: str
    role: str
    content: str


class Bound(NamedTuple):
    """How many tokens training keeps of a row, None being all, and what it does with a longer one: see TOO_LONG."""

    max_length: int | None = None
    too_long: str = "truncate"


NO_BOUND = Bound()


class Size(NamedTuple):
    """A row in tokens, and what training keeps of it."""

    num_tokens: int
    num_trained: int
    num_trained_kept: int
    answer_tokens: tuple[int, ...]  # of each run of trained tokens, its end mark included
    bound: Bound


@dataclass(frozen=True)
class Subject:
    """What is checked of one row."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    document: str = ""
    """text of a row of plain text"""
    rest: str = ""
    """what else tells the row from others: the rejected side of a preference pair"""
    raw: str = ""
    """the row as it stands in the file"""
    refusal: str = ""
    """why the format does not take the row, in its own words"""
    size: Size | None = None
    """None where there is no tokenizer, or nothing to encode"""

    @cached_property
    def texts(self) -> list[Text]:
        """Every text of the row, calls included."""
        found = [Text("the text", "document", self.document)] if self.document else []
        for position, message in enumerate(self.messages):
            role = message["role"]
            where = f"message {position} ({role})"
            found.append(Text(where, role, message["content"]))
            found += [Text(f"a call in {where}", role, words) for words in called_words(message)]
        return found

    @cached_property
    def words(self) -> str:
        """All that can become tokens, as one text; the whole row where no text can be made out."""
        return "\n".join([*(text.content for text in self.texts), *map(dump, self.tools), self.rest]) or self.raw

    @property
    def answers(self) -> Iterator[Text]:
        """What the model learns to say in plain words: trained assistant turns without a call."""
        for position, message in enumerate(self.messages):
            if is_trained(message) and not message.get("tool_calls"):
                yield Text(f"message {position}", "assistant", message["content"])


def is_trained(message: Message) -> bool:
    """Whether a message is an assistant's and its loss is not turned off."""
    return message["role"] == "assistant" and bool(message.get("loss", True))


def called_words(message: Message) -> Iterator[str]:
    """The texts inside a message's calls: the interpreter's code, each argument that is a text."""
    for call in message.get("tool_calls") or []:
        if is_interpreter(call):
            yield str(call["code_interpreter"]["input"])
            continue
        arguments = arguments_of(call)
        values = list(arguments.values()) if isinstance(arguments, dict) else [arguments]
        yield from (value if isinstance(value, str) else dump(value) for value in values)


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Arguments of a function call; text that is not JSON stays text."""
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def from_sample(sample: Mapping[str, Any], raw: str = "", size: Size | None = None) -> Subject:
    """What a format made of a row; of a preference pair the chosen side is what is learnt."""
    if "chosen" in sample:
        return replace(from_sample(sample["chosen"], raw, size), rest=dump(sample["rejected"]))
    if "ids" in sample:
        return Subject(raw=raw, size=size or size_of([bool(mark) for mark in sample["trained"]]))
    if "texts" in sample:
        return Subject(document="".join(sample["texts"]), raw=raw, size=size)
    if isinstance(sample.get("text"), str):
        return Subject(document=sample["text"], raw=raw, size=size)
    return Subject(readable_messages(sample.get("messages")), readable_tools(sample.get("tools")), raw=raw, size=size)


def size_of(trained: list[bool], bound: Bound = NO_BOUND) -> Size:
    """The size of a document of which `trained` says what is trained: a label is what another token comes before."""
    runs = tuple(sum(1 for _ in run) for is_trained, run in groupby(trained) if is_trained)
    labels = sum(trained[1:])
    kept = labels
    if bound.max_length is not None and len(trained) > bound.max_length:
        begun_anew = trained[bound.max_length :: bound.max_length]  # the first token of a piece has none before it
        left = {"truncate": sum(trained[1 : bound.max_length]), "split": labels - sum(begun_anew), "drop": 0}
        kept = left[bound.too_long]
    return Size(len(trained), labels, kept, runs, bound)


def from_refused(row: Any, raw: str, reason: str) -> Subject:
    """A row that its format refuses, with as much of its conversation as can be read."""
    if not isinstance(row, dict):
        return Subject(raw=raw, refusal=reason)
    return Subject(readable_messages(row.get("messages")), readable_tools(row.get("tools")), raw=raw, refusal=reason)


def readable_messages(given: Any) -> list[Message]:
    """The messages with text for content and well-formed calls; nothing if one of them has no role."""
    if not isinstance(given, list | tuple) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in given
    ):
        return []
    return [{**message, "content": _words(message.get("content")), "tool_calls": _calls(message)} for message in given]


def readable_tools(given: Any) -> list[Mapping[str, Any]]:
    """The declared tools that are objects; they may be kept as JSON text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return []
    return [tool for tool in given if isinstance(tool, dict)] if isinstance(given, list | tuple) else []


def _words(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


def _calls(message: Message) -> list[Mapping[str, Any]]:
    given = message.get("tool_calls")
    if not isinstance(given, list):
        return []
    return [call for call in given if isinstance(call, dict) and _is_call(call)]


def _is_call(call: Mapping[str, Any]) -> bool:
    if is_interpreter(call):
        return isinstance(call.get("code_interpreter"), dict) and "input" in call["code_interpreter"]
    function = call.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str)
