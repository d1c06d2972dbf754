"""A row's own words told apart from what a Jinja template writes: fenced where they could be read as its marks."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from tuner.dataset.messages import Message, RowError

OPEN, CLOSE = "\U0010fff0", "\U0010fff1"
FIRST_END = 0x100000  # the words of message i end at this character + i
MAX_MESSAGES = 60_000
PRIVATE = re.compile("[\U00100000-\U0010fffd]")

Rewrite = Callable[[str], str]


class Unfenced(NamedTuple):
    """A rendering without its private characters, and where they were: positions in `text`."""

    text: str
    fences: list[tuple[int, int]]
    ends: dict[int, list[int]]  # message -> places where a part of its words ends


class Fences:
    """Puts private-use characters around whatever in a row could become one of `marks`, or a part of one."""

    def __init__(self, marks: Iterable[str], thoughts: Iterable[str]) -> None:
        """`thoughts`: marks that the template looks for in the model's own words, such as </think>; they stay."""
        marks, thoughts = tuple(marks), tuple(thoughts)
        self._marks = marks
        self._anywhere = _pattern(marks, ())
        self._said = _pattern([mark for mark in marks if mark not in thoughts], thoughts)

    def message(self, message: Message, place: int) -> Message:
        """The message with its words fenced, and a character behind its content and its last call's name."""
        fence = self._fence(self._said if message["role"] == "assistant" else self._anywhere)
        end = chr(FIRST_END + place)
        fenced = {key: value if key == "role" else rewrite(value, fence) for key, value in message.items()}
        content = fenced.get("content")
        if isinstance(content, str) and content.strip():
            words = content.rstrip()
            fenced["content"] = words + end + content[len(words) :]
        for key in ("name", "tool_call_id"):
            if key in fenced:
                fenced[key] = self._name(message[key])
        calls = fenced.get("tool_calls") or []
        for number, call in enumerate(calls, start=1):
            call["function"]["name"] = self._name(message["tool_calls"][number - 1]["function"]["name"])
            call["function"]["name"] += end if number == len(calls) else ""
        return fenced

    def tools(self, tools: list[Any] | None) -> list[Any] | None:
        """Declared tools with their texts fenced."""
        fence = self._fence(self._anywhere)
        return None if tools is None else [rewrite(tool, fence) for tool in tools]

    def _name(self, name: str) -> str:
        """A name may stand between the halves of a mark, so one that is the inside of a mark is fenced whole."""
        if any(name in mark for mark in self._marks):
            return OPEN + name + CLOSE
        return self._fence(self._anywhere)(name)

    def _fence(self, pattern: re.Pattern[str]) -> Rewrite:
        return lambda text: pattern.sub(_fenced, text)


def _fenced(match: re.Match[str]) -> str:
    return match[0] if match.lastgroup == "kept" else OPEN + match[0] + CLOSE


def _pattern(marks: Iterable[str], kept: Iterable[str]) -> re.Pattern[str]:
    """What is fenced: marks, their beginnings of two letters or more, and at the edges of a text any part of one."""
    whole = sorted(
        {mark[:end] for mark in marks for end in range(2, len(mark) + 1)} | set(marks), key=len, reverse=True
    )
    first = sorted({mark[start:] for mark in marks for start in range(1, len(mark))}, key=len, reverse=True)
    last = sorted({mark[0] for mark in marks})
    parts = [rf"(?P<kept>{_any(kept)})", rf"\A{_any(first)}", _any(whole), rf"{_any(last)}\Z"]
    return re.compile("|".join(parts[0 if tuple(kept) else 1 :]))


def _any(texts: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, texts)) + ")"


def rewrite(value: Any, change: Rewrite) -> Any:
    """A value of JSON with `change` on every text in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): rewrite(item, change) for key, item in value.items()}
    return [rewrite(item, change) for item in value] if isinstance(value, list | tuple) else value


def texts_of(value: Any) -> list[str]:
    """Every key, text and number in a value of JSON, as JSON writes it but for the quotes."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (key, *texts_of(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_of(item)]
    return [value] if isinstance(value, str) else [] if value is None else [json.dumps(value)]


def unfence(marked: str, place: str) -> Unfenced:
    """Take the private characters out. Raises RowError where a fence is torn: its words were cut apart."""
    pieces: list[str] = []
    fences: list[tuple[int, int]] = []
    ends: dict[int, list[int]] = {}
    position, opened = 0, -1
    edges = [0, *(edge for match in PRIVATE.finditer(marked) for edge in match.span()), len(marked)]
    for number, (start, end) in enumerate(pairwise(edges)):
        if number % 2 == 0:  # words between two private characters
            pieces.append(marked[start:end])
            position += end - start
            continue
        character = marked[start]
        if character not in (OPEN, CLOSE):
            ends.setdefault(ord(character) - FIRST_END, []).append(position)
        elif (character == OPEN) != (opened < 0):
            raise RowError(f"the template cuts a text in {place} that holds one of its marks. Take the mark out.")
        elif character == OPEN:
            opened = position
        else:
            fences.append((opened, position))
            opened = -1
    return Unfenced("".join(pieces), fences, ends)
