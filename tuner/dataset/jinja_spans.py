"""Where in a Jinja template's rendering the model speaks: found exactly, or the row is refused."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from tuner.dataset.jinja_fences import Fences, Unfenced, texts_of, unfence
from tuner.dataset.messages import Message, RowError

PROBE = "And then?"


class Span(NamedTuple):
    """What the model says in one message, its end mark included: text[start:end]; blanks follow up to `after`.

    Its calls begin at `calls`, where that was asked for; a turn without calls has them at its end.
    """

    message: int
    start: int
    end: int
    after: int
    calls: int = -1


class Layout(NamedTuple):
    """A rendered conversation: its text, which of it would be read as marks but is the row's, and the model's turns."""

    text: str
    fences: list[tuple[int, int]]
    spans: list[Span]


Render = Callable[[Sequence[Message], list[Any] | None, bool], str]
Blocks = Callable[[Sequence[Message], list[Any] | None], list[tuple[int, int]] | None]


@dataclass(frozen=True)
class Finder:
    """Lays out conversations of one template.

    `render` gives the template's text of (messages, tools, add_generation_prompt), or raises RowError; `blocks` what
    stands in its `generation` blocks, None where it has none.
    """

    render: Render
    blocks: Blocks
    fences: Fences
    mark: re.Pattern[str]

    def lay_out(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        turns: Sequence[int],
        prompt: bool,
        find_calls: bool = False,
    ) -> Layout:
        """The conversation's text and the spans of the messages in `turns`. Raises RowError saying why it cannot be.

        With `find_calls` the spans tell where the calls in them begin.
        """
        text = self.render(messages, tools, prompt)
        marked = self._marked(messages, tools, prompt)
        if marked.text != text:
            raise RowError(
                "the chat template writes other things when its marks stand in the row's words, so they cannot be told"
                " apart. Take the marks out of the row."
            )
        self._check_words(messages, tools, marked)
        blocks = self.blocks(messages, tools) if turns else None
        if blocks is not None:
            spans = self._from_blocks(messages, turns, blocks, text)
        else:
            spans = [self._span(messages, tools, place, marked) for place in turns]
        for before, now in zip([None, *spans], spans):
            self._check_turn(messages[now.message], now, text)
            if before is not None and before.after > now.start:
                raise RowError(f"what the model says in message {now.message} cannot be told from the turn before it.")
        if find_calls:
            spans = [span._replace(calls=self._calls_start(messages, tools, span, text)) for span in spans]
        return Layout(text, marked.fences, spans)

    def _calls_start(self, messages: Sequence[Message], tools: list[Any] | None, span: Span, text: str) -> int:
        """Where the calls of a turn begin: there the turn would end if it had none."""
        message = messages[span.message]
        calls = message.get("tool_calls") or []
        if not calls:
            return span.end
        before = list(messages[: span.message])
        with_calls = self._marked([*before, message], tools, False)
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        without = self._marked([*before, plain], tools, False)
        border = self._fork(with_calls, without)
        head = with_calls.text[border : max(with_calls.ends.get(span.message, [border]))]
        said = text[span.start : span.end]
        start = said.find(head)
        words = [message.get("content") or "", message.get("reasoning_content") or ""]
        called = [
            part for call in calls for part in (call["function"]["name"], *texts_of(call["function"]["arguments"]))
        ]
        if (
            not head
            or said.count(head) != 1
            or not all(holds(squeeze(said[:start]), part) for part in words)
            or not all(holds(squeeze(said[start:]), part) for part in called)
        ):
            raise RowError(
                f"where the calls in message {span.message} begin cannot be told from what the chat template writes."
                ' Use loss_on = "assistant" or "last", or leave such rows out.'
            )
        return span.start + start

    def _fork(self, one: Unfenced, other: Unfenced) -> int:
        """Where two texts part, before any mark that they share the beginning of, and behind blanks."""
        parted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.text, other.text)))
        border = parted
        for rendered in (one, other):
            for match in self.mark.finditer(rendered.text):
                if match.start() < parted < match.end() and not _in_fence(match.start(), rendered):
                    border = min(border, match.start())
        rest = one.text[border:]
        return border + len(rest) - len(rest.lstrip())

    def _marked(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> Unfenced:
        fenced = [self.fences.message(message, place) for place, message in enumerate(messages)]
        return unfence(self.render(fenced, self.fences.tools(tools), prompt), "the row")

    def _span(self, messages: Sequence[Message], tools: list[Any] | None, place: int, marked: Unfenced) -> Span:
        start = self._start(messages, tools, place, marked)
        words_end = _words_end(messages[place], place, marked, start)
        tail = marked.text[words_end:]
        # the same turn with something else behind it: what both have behind its words belongs to the turn
        other = self._marked(messages[: place + 1], tools, False)
        if place == len(messages) - 1:
            other = self._marked([*messages, *_answer(messages[place])], tools, False)
        other_tail = other.text[_words_end(messages[place], place, other, 0) :]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tail, other_tail)))
        marks = [match for match in self.mark.finditer(tail) if match.end() <= shared]
        marks = [match for match in marks if not _in_fence(words_end + match.start(), marked)]
        if not marks:
            raise RowError(
                f"the chat template ends message {place} with no special token, so the model would not learn to stop."
                " Use one of tuner's own templates, or a template whose turns end with a special token."
            )
        end = marks[-1].end()
        blank = shared - end - len(tail[end:shared].lstrip())
        return Span(place, start, words_end + end, words_end + end + blank)

    def _start(self, messages: Sequence[Message], tools: list[Any] | None, place: int, marked: Unfenced) -> int:
        """Where generation would begin: behind the prompt."""
        prompt = self.render(messages[:place], tools, True)
        if marked.text.startswith(prompt):
            return len(prompt)
        # earlier turns were rewritten, so the prompt's own text is looked for, between this turn's words and the last
        before = self.render(messages[:place], tools, False) if place else ""
        header = prompt.removeprefix(before) if prompt.startswith(before) else ""
        low = max(marked.ends.get(place - 1, [0]))
        high = max(marked.ends.get(place, [low]))
        places = [match.start() for match in re.finditer(re.escape(header), marked.text[low:high])] if header else []
        if len(places) == 1 and not _in_fence(low + places[0], marked):
            return low + places[0] + len(header)
        shown = header or prompt[-40:]
        raise RowError(
            f"the chat template begins the model's turn with {shown!r}, but this is not what stands before message"
            f" {place} of the whole conversation: it writes earlier turns anew when others follow. Train the last turn"
            ' only (loss_on = "last"), or make a row of each turn.'
        )

    def _from_blocks(
        self, messages: Sequence[Message], turns: Sequence[int], blocks: list[tuple[int, int]], text: str
    ) -> list[Span]:
        said = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) != len(said):
            raise RowError(
                f"the chat template marks {len(blocks)} generated parts in a conversation with {len(said)} turns of"
                " the model, so they cannot be told apart."
            )
        spans = []
        for place, (start, end) in zip(said, blocks):
            marks = [start + match.end() for match in self.mark.finditer(text[start:end])]
            if not marks or text[marks[-1] : end].strip():
                follows = self.mark.match(text, end)
                if follows is None:
                    raise RowError(f"the chat template ends message {place} with no special token.")
                marks = [follows.end()]
            rest = text[marks[-1] : max(end, marks[-1])]
            spans.append(Span(place, start, marks[-1], marks[-1] + len(rest)))
        return [span for span in spans if span.message in turns]

    def _check_words(self, messages: Sequence[Message], tools: list[Any] | None, marked: Unfenced) -> None:
        """Whatever is not the model's must be in the text; its own turns are looked at where they are trained."""
        squeezed = squeeze(marked.text)
        for tool in tools or []:
            body = tool["function"]
            if not all(holds(squeezed, words) for words in (body["name"], body.get("description") or "")):
                raise RowError(
                    f"the chat template leaves out the tool {body['name']!r}. Use a template with tools, or leave"
                    " such rows out."
                )
        for place, message in enumerate(messages):
            content = message.get("content") or ""
            is_there = not content.strip() or (place in marked.ends and holds(squeezed, content))
            if message["role"] != "assistant" and not is_there:
                raise RowError(
                    f"the chat template leaves out or changes the words of message {place} ({message['role']})."
                    " Use another template, or leave such messages out."
                )
            if message["role"] != "tool" and message.get("name") and not holds(squeezed, message["name"]):
                raise RowError(f"the chat template has no place for the name {message['name']!r} of message {place}.")

    def _check_turn(self, message: Message, span: Span, text: str) -> None:
        said = squeeze(text[span.start : span.end])
        words = [message.get("content") or "", message.get("reasoning_content") or ""]
        for call in message.get("tool_calls") or []:
            words += [call["function"]["name"], *texts_of(call["function"]["arguments"])]
        missing = [part for part in words if not holds(said, part)]
        if missing:
            raise RowError(
                f"the chat template leaves out or changes what the model says in message {span.message}:"
                f" {missing[0][:60]!r} (thoughts of earlier turns, for one). Set its loss to false, train the last turn"
                ' only (loss_on = "last"), or make a row of each turn.'
            )


def squeeze(text: str) -> str:
    """Without white space, which templates trim."""
    return "".join(text.split())


def holds(squeezed: str, words: str) -> bool:
    """Whether the words stand in a text, plainly or as JSON writes them."""
    forms = [words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]]
    if words in ("true", "false"):
        forms.append(words.capitalize())
    return any(squeeze(form) in squeezed for form in forms)


def _words_end(message: Message, place: int, rendered: Unfenced, otherwise: int) -> int:
    """Where the last words of a message end; `otherwise` where it has none."""
    num_parts = bool((message.get("content") or "").strip()) + bool(message.get("tool_calls"))
    ends = rendered.ends.get(place, [])
    if len(ends) != num_parts:
        done = "leaves out some" if len(ends) < num_parts else "repeats some"
        raise RowError(f"the chat template {done} of what the model says in message {place}. Set its loss to false.")
    return max(ends, default=otherwise)


def _answer(message: Message) -> list[Message]:
    """What may follow a turn of the model."""
    calls = message.get("tool_calls") or []
    if not calls:
        return [{"role": "user", "content": PROBE}]
    ids = [{"tool_call_id": call["id"]} if "id" in call else {} for call in calls]
    return [
        {"role": "tool", "name": call["function"]["name"], "content": PROBE, **named} for call, named in zip(calls, ids)
    ]


def _in_fence(position: int, rendered: Unfenced) -> bool:
    return any(start <= position < end for start, end in rendered.fences)
