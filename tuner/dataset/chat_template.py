"""Messages to segments marked trained or not, and a model's reply back to a message."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

from tuner.dataset.messages import (
    Message,
    RowError,
    Sample,
    call_arguments,
    dump,
    function_body,
    is_interpreter,
    split_parallel_calls,
)
from tuner.dataset.rendering import chosen, message_weight, trains_part
from tuner.dataset.templates import (
    CHAT_TEMPLATES,
    ActionGrammar,
    ChatTemplate,
    JinjaTemplate,
    ToolCallGrammar,
    find_template,
)
from tuner.errors import UserError

__all__ = ["CHAT_TEMPLATES", "ChatTemplate", "Reply", "Segment", "find_template", "parse_reply", "render"]


FENCED_CODE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.DOTALL)


class Segment(NamedTuple):
    """A piece of a conversation that is encoded by itself.

    In a special segment the template's own marks are one id each; in any other, whatever it says, nothing is.
    `weight` is what a trained token of it counts in the loss. A document that is too long is cut before segments that
    open a part of it, where it is to be split.
    """

    text: str
    trained: bool
    special: bool
    weight: float = 1.0
    opens_part: bool = False


class Piece(NamedTuple):
    """A part of a turn's body before it is known whether the turn is trained."""

    text: str
    special: bool = False
    is_call: bool = False


class Turn(NamedTuple):
    """One turn as its grammar writes it; the marks around it are the template's."""

    role: str
    body: list[Piece]
    name: Piece | None = None
    weight: float = 0.0  # 0 where nothing of the turn is trained


class Reply(NamedTuple):
    """What a model said: text and OpenAI tool calls; `error` tells why a call could not be read and is in the text."""

    content: str
    tool_calls: list[dict[str, Any]]
    error: str | None = None


def render(
    sample: Sample,
    template: ChatTemplate,
    *,
    loss_on: str = "assistant",
    train_newline: bool = False,
    add_generation_prompt: bool = False,
) -> list[Segment]:
    """A sample to the segments that its tokens are made of; their texts joined are the whole conversation.

    Trained are the model's own turns and the mark that ends each, or less of them as `loss_on` (of LOSS_ON) says, with
    `train_newline` also what stands behind that mark; `loss: False` leaves a turn out, `loss: 0.5` halves its weight.
    The segments are the same in text and number of tokens whatever is trained. A document of plain text is trained but
    for its first mark. Raises RowError for what the template has no place for.
    """
    if isinstance(template, JinjaTemplate) and not {"text", "texts"} & sample.keys():
        from tuner.dataset.jinja_template import render_own  # which needs this module

        return render_own(
            sample,
            template,
            loss_on=loss_on,
            train_newline=train_newline,
            add_generation_prompt=add_generation_prompt,
        )
    begin = [Segment(template.begin, False, True)] if template.begin else []
    if "text" in sample or "texts" in sample:
        texts = sample["texts"] if "texts" in sample else [sample["text"]]
        parts_of_it = [Segment(text, True, False, opens_part=place > 0) for place, text in enumerate(texts)]
        segments = [*begin, *parts_of_it, Segment(template.text_end, True, True)]
    else:
        messages = chosen(sample["messages"], loss_on)
        turns = TURNS[type(template.tools)](messages, sample.get("tools") or [], template)
        parts = (_turn_segments(turn, template, loss_on, train_newline) for turn in turns)
        segments = [*begin, *chain.from_iterable(parts)]
    if add_generation_prompt:
        segments += _header(Turn("assistant", []), template)
    try:
        "".join(segment.text for segment in segments).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RowError(f"Expected text that UTF-8 can hold, got half of a surrogate pair ({half!r}).") from None
    return segments


def _header(turn: Turn, template: ChatTemplate) -> list[Segment]:
    if turn.name is None:
        return [Segment(template.before_role + turn.role + template.after_role, False, True)]
    if template.before_name is None:
        raise RowError(
            f"Template {template.name!r} has no place for a speaker's name, got a {turn.role} named {turn.name.text!r}."
            " Remove the name or write it in the content."
        )
    before = template.before_role + turn.role + template.before_name
    if turn.name.special:
        return [Segment(before + turn.name.text + template.after_role, False, True)]
    return [
        Segment(before, False, True),
        Segment(turn.name.text, False, False),
        Segment(template.after_role, False, True),
    ]


def _turn_segments(turn: Turn, template: ChatTemplate, loss_on: str, train_newline: bool) -> Iterator[Segment]:
    yield from _header(turn, template)
    for (special, is_call), pieces in groupby(turn.body, key=lambda piece: (piece.special, piece.is_call)):
        words = "".join(piece.text for piece in pieces)
        if words:
            yield _said_segment(turn, words, trains_part(loss_on, is_call=is_call), special)
    ends = trains_part(loss_on, is_call=True)  # the turn ends behind its call
    if turn.weight > 0 and ends and template.separator and not train_newline:
        yield _said_segment(turn, template.turn_end, True, True)
        yield Segment(template.separator, False, True)
    else:
        yield _said_segment(turn, template.turn_end + template.separator, ends, True)


def _said_segment(turn: Turn, text: str, trains: bool, special: bool) -> Segment:
    """A part of a turn, trained if both the turn and this part of it are."""
    trained = trains and turn.weight > 0
    return Segment(text, trained, special, turn.weight if trained else 1.0)


def _said(message: Message) -> Turn:
    """A turn of plain words, as every family writes it."""
    name = message.get("name")
    return Turn(
        message["role"],
        [Piece(message.get("content") or "")],
        None if name is None else Piece(name),
        message_weight(message),
    )


def _plain_turns(messages: Sequence[Message], tools: Sequence[Any], template: ChatTemplate) -> list[Turn]:
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        raise UserError(
            f"Template {template.name!r} has no tool grammar yet, got a conversation with tools."
            " Use internlm2, qwen2.5 or chatml, or leave such rows out."
        )
    return [_said(message) for message in messages]


def _action_turns(messages: Sequence[Message], tools: Sequence[Mapping], template: ChatTemplate) -> list[Turn]:
    """InternLM2: the turns that declare tools stand behind the first system turn, or first of all."""
    grammar = template.tools
    assert isinstance(grammar, ActionGrammar)
    turns = []
    kind = grammar.plugin
    for message in split_parallel_calls(messages):
        turn = _said(message)
        if message["role"] == "tool":
            turn = turn._replace(role=grammar.result_role, name=Piece(kind, special=True))
        elif message["role"] == "system":
            turn = turn._replace(name=_system_name(turn.name, grammar))
        for call in message.get("tool_calls") or []:
            kind = grammar.interpreter if is_interpreter(call) else grammar.plugin
            turn.body.extend(_action(call, kind, grammar))
        turns.append(turn)
    place = 1 if messages and messages[0]["role"] == "system" else 0
    return [*turns[:place], *_tool_turns(tools, grammar), *turns[place:]]


def _system_name(name: Piece | None, grammar: ActionGrammar) -> Piece | None:
    """The two names that are one id each; only a system turn may bear them, never a user."""
    special = {"plugin": grammar.plugin, "interpreter": grammar.interpreter}
    return Piece(special[name.text], special=True) if name and name.text in special else name


def _tool_turns(tools: Sequence[Mapping], grammar: ActionGrammar) -> Iterator[Turn]:
    for tool in tools:
        if is_interpreter(tool):
            prompt = tool.get("description") or grammar.interpreter_prompt
            yield Turn("system", [Piece(prompt)], Piece(grammar.interpreter, special=True))
    functions = [function_body(tool) for tool in tools if not is_interpreter(tool)]
    if functions:
        yield Turn("system", [Piece(dump(functions))], Piece(grammar.plugin, special=True))


def _action(call: Mapping[str, Any], kind: str, grammar: ActionGrammar) -> list[Piece]:
    if is_interpreter(call):
        words = f"\n```python\n{call['code_interpreter']['input']}\n```"
    else:
        words = "\n" + dump({"name": call["function"]["name"], "parameters": call_arguments(call)})
    return [
        Piece(grammar.start + kind, special=True, is_call=True),
        Piece(words, is_call=True),
        Piece(grammar.end + grammar.after_end, special=True, is_call=True),
    ]


def _tool_call_turns(messages: Sequence[Message], tools: Sequence[Mapping], template: ChatTemplate) -> list[Turn]:
    """Qwen: tools in the first system turn, calls of a turn together, results that follow each other in one turn."""
    grammar = template.tools
    assert isinstance(grammar, ToolCallGrammar)
    if any(is_interpreter(tool) for tool in tools):
        raise UserError(
            f"Template {template.name!r} has no code interpreter. Use internlm2, or declare it as a function."
        )
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    turns = [] if first is None else [_said(first)]
    if first is None and (tools or template.default_system):
        turns = [Turn("system", [Piece(template.default_system)])]
    if tools:
        turns = [turns[0]._replace(body=_tool_list(turns[0].body[0].text, tools, grammar))]
    previous = None
    for message in messages if first is None else messages[1:]:
        if message["role"] != "tool":
            turn = _said(message)
            turn.body.extend(_tool_calls(message, grammar))
            turns.append(turn)
        elif previous == "tool":
            turns[-1] = turns[-1]._replace(body=[Piece(turns[-1].body[0].text + "\n" + _result(message, grammar))])
        else:
            turns.append(Turn(grammar.result_role, [Piece(_result(message, grammar))]))
        previous = message["role"]
    return turns


def _result(message: Message, grammar: ToolCallGrammar) -> str:
    return grammar.before_result + (message.get("content") or "") + grammar.after_result


def _tool_list(system: str, tools: Sequence[Mapping], grammar: ToolCallGrammar) -> list[Piece]:
    listed = [dump(tool if "function" in tool else {"type": "function", "function": tool}) for tool in tools]
    words = "\n".join([system + ("\n\n" if system else "") + grammar.before_tools, *listed])
    plain, mark, rest = grammar.after_tools.partition(grammar.start)
    return [Piece(words + plain), Piece(mark + rest, special=True)]


def _tool_calls(message: Message, grammar: ToolCallGrammar) -> Iterator[Piece]:
    for place, call in enumerate(message.get("tool_calls") or []):
        if place or message.get("content"):
            # before the first call it is one piece with the words, for some tokenizers have one token for ".\n"
            yield Piece("\n", is_call=place > 0)
        words = dump({"name": call["function"]["name"], "arguments": call_arguments(call)})
        yield Piece(grammar.start, special=True, is_call=True)
        yield Piece("\n" + words + "\n", is_call=True)
        yield Piece(grammar.end, special=True, is_call=True)


Turns = Callable[[Sequence[Message], Sequence[Any], ChatTemplate], list[Turn]]
TURNS: dict[type, Turns] = {
    type(None): _plain_turns,
    ActionGrammar: _action_turns,
    ToolCallGrammar: _tool_call_turns,
}


def parse_reply(text: str, template: ChatTemplate) -> Reply:
    """What `render` would have been given for this text of a model: content and calls, arguments as JSON strings.

    The text begins after the generation prompt and may end with a stop token, or lack the one that generation ate.
    A call that cannot be read stays in the content as it was written.
    """
    text = text.split(template.turn_end, 1)[0].removesuffix(template.text_end)
    grammar = template.tools
    if grammar is None:
        return Reply(text, [])
    content, *actions = text.split(grammar.start)
    if not actions:
        return Reply(text, [])
    if isinstance(grammar, ToolCallGrammar):
        content = content.removesuffix("\n")
    calls = []
    for action in actions:
        words, _, after = action.partition(grammar.end)
        try:
            calls.append(_parse_call(words, grammar))
        except (ValueError, TypeError) as error:
            return Reply(text, [], f"A tool call could not be read: {error}")
        content += after if after.strip() else ""
    return Reply(content, calls)


def _parse_call(words: str, grammar: ActionGrammar | ToolCallGrammar) -> dict[str, Any]:
    """The inside of one call to an OpenAI tool call; ValueError or TypeError where it is none."""
    if isinstance(grammar, ActionGrammar):
        if words.startswith(grammar.interpreter):
            code = FENCED_CODE.fullmatch(words.removeprefix(grammar.interpreter))
            if code is None:
                raise ValueError("the code does not stand in a fenced block")
            return {"type": "code_interpreter", "code_interpreter": {"input": code[1]}}
        if not words.startswith(grammar.plugin):
            raise ValueError(f"it names neither {grammar.plugin} nor {grammar.interpreter}")
        words = words.removeprefix(grammar.plugin)
    call = json.loads(words)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise TypeError(f"expected a JSON object with a name, got {words.strip()[:80]!r}")
    arguments = call.get("parameters", call.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise TypeError(f"expected the arguments to be a JSON object, got {dump(arguments)[:80]}")
    return {"type": "function", "function": {"name": call["name"], "arguments": dump(arguments)}}
