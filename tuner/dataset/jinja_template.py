"""A tokenizer's own Jinja chat template in the place of ours: "auto" and "jinja" as names, and samples to segments."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tuner.dataset.chat_template import Segment, parse_reply, render
from tuner.dataset.jinja_fences import MAX_MESSAGES, PRIVATE, texts_of
from tuner.dataset.jinja_process import DATE, TemplateProcess
from tuner.dataset.jinja_spans import Layout
from tuner.dataset.messages import (
    ROLES,
    Message,
    RowError,
    Sample,
    call_arguments,
    dump,
    function_body,
    is_interpreter,
)
from tuner.dataset.rendering import chosen, message_weight, trains_part
from tuner.dataset.templates import (
    CHAT_TEMPLATES,
    TOKENIZERS_OWN,
    TOOL_GRAMMARS,
    ActionGrammar,
    ChatTemplate,
    JinjaTemplate,
    ToolCallGrammar,
    find_template,
    mark_pattern,
)
from tuner.dataset.tokenize import special_tokens
from tuner.errors import UserError

QUESTION: Message = {"role": "user", "content": "What is it?"}
ANSWER: Message = {"role": "assistant", "content": "A test."}
TALK = [QUESTION, ANSWER, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "To see."}]
PROBES: list[Sample] = [
    {"messages": TALK},
    {"messages": [{"role": "system", "content": "Be brief."}, *TALK]},
]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "description": "See.", "parameters": {}}}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL_PROBES: list[Sample] = [
    {"messages": TALK[:1], "tools": [TOOL]},
    {
        "messages": [QUESTION, {**ANSWER, "tool_calls": [CALL, CALL]}, *[{"role": "tool", "content": "1"}] * 2, ANSWER],
        "tools": [TOOL],
    },
]


def resolve_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template of that name; "jinja" is the tokenizer's own, "auto" the family's own where it is recognised.

    Raises UserError for an unknown name, and where the tokenizer's template cannot be used, saying why.
    """
    if name not in TOKENIZERS_OWN:
        return find_template(name)
    known = recognise(tokenizer) if name == "auto" else None
    return known or read_template(tokenizer)


def recognise(tokenizer: Any) -> ChatTemplate | None:
    """The template of CHAT_TEMPLATES that writes what the tokenizer's own does, or that fits one without any."""
    have = set(special_tokens(tokenizer))
    fitting = [t for t in CHAT_TEMPLATES.values() if set(t.special_tokens) - set(t.optional_tokens) <= have]
    if tokenizer.chat_template is None:
        return max(fitting, key=lambda template: len(set(template.special_tokens) & have), default=None)
    return next((template for template in fitting if _agree(template, tokenizer)), None)


def _agree(template: ChatTemplate, tokenizer: Any) -> bool:
    own = _unprobed(tokenizer)
    probes = PROBES
    if "tools" in own.jinja and isinstance(template.tools, ToolCallGrammar):
        probes = PROBES + TOOL_PROBES
    try:
        return all(
            _written(probe, own, prompt) == _text(probe, template, prompt)
            for probe in probes
            for prompt in (False, True)
        )
    except RowError:
        return False


def _written(sample: Sample, template: JinjaTemplate, prompt: bool) -> str:
    return _process(template).lay_out(sample["messages"], sample.get("tools"), (), prompt).text


def _text(sample: Sample, template: ChatTemplate, prompt: bool) -> str:
    return "".join(segment.text for segment in render(sample, template, add_generation_prompt=prompt))


def read_template(tokenizer: Any) -> JinjaTemplate:
    """The tokenizer's own template, tried on a short conversation. Raises UserError where it is of no use."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template of its own. Name one of"
            f" {', '.join(CHAT_TEMPLATES)}, or set tokenizer.chat_template."
        )
    template = _unprobed(tokenizer)
    try:
        layout = _process(template).lay_out(TALK[:2], None, (1,), False)
    except RowError as error:
        raise UserError(
            f"The chat template of the tokenizer {tokenizer.name_or_path!r} cannot be used: {error}"
        ) from None
    if "strftime_now" in template.jinja:
        print(f"The tokenizer's chat template writes the day's date; in training it is {DATE:%d %B %Y} on every day.")
    span = layout.spans[0]
    said = layout.text[span.start : span.end]
    begin = template.begin if layout.text.startswith(template.begin) else ""
    end = said[said.index("test.") + len("test.") :].strip()
    header = layout.text[: span.start]
    marks = [match.start() for match in mark_pattern(template.special_tokens).finditer(header)]
    template = replace(
        template,
        begin=begin,
        after_role=header[marks[-1] :] if marks else header,
        turn_end=end,
        text_end=template.text_end or end,
        stop_tokens=tuple(dict.fromkeys([end, *filter(None, template.stop_tokens)])),
    )
    return replace(template, tools=_tool_grammar(template))


def _tool_grammar(template: JinjaTemplate) -> ActionGrammar | ToolCallGrammar | None:
    """The grammar by which a call can be read from what the template makes of it; None where no known one does."""
    if "tool_calls" not in template.jinja:
        return None
    talk = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    try:
        layout = _process(template).lay_out(talk, [TOOL], (1,), False)
    except RowError:
        return None
    said = layout.text[layout.spans[0].start : layout.spans[0].end]
    call = {**CALL, "function": {**CALL["function"], "arguments": dump(CALL["function"]["arguments"])}}
    readings = ((grammar, parse_reply(said, replace(template, tools=grammar))) for grammar in TOOL_GRAMMARS)
    return next((grammar for grammar, reply in readings if reply.tool_calls == [call]), None)


def _unprobed(tokenizer: Any) -> JinjaTemplate:
    """The template's text and the tokenizer's tokens, before anything is known of what it writes."""
    tokens = special_tokens(tokenizer)
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    eos = variables.get("eos_token", "")
    return JinjaTemplate(
        name="jinja",
        special_tokens=tuple(tokens),
        stop_tokens=(eos,),
        begin=variables.get("bos_token", ""),
        text_end=eos,
        before_role="",
        before_name=None,
        after_role="",
        turn_end="",
        separator="",
        tools=None,
        jinja=tokenizer.get_chat_template(),
        variables=tuple(sorted(variables.items())),
        soft_tokens=tuple(token for token, is_special in tokens.items() if not is_special),
    )


def _process(template: JinjaTemplate) -> TemplateProcess:
    return _start(template.jinja, template.variables, template.special_tokens, template.soft_tokens)


@lru_cache(maxsize=2)  # one that is forgotten ends
def _start(
    jinja: str, variables: tuple[tuple[str, str], ...], marks: tuple[str, ...], soft: tuple[str, ...]
) -> TemplateProcess:
    return TemplateProcess(jinja, dict(variables), marks, soft)


def render_own(
    sample: Sample,
    template: JinjaTemplate,
    *,
    loss_on: str = "assistant",
    train_newline: bool = False,
    add_generation_prompt: bool = False,
) -> list[Segment]:
    """As `render`, by the tokenizer's own template; a row whose trained words cannot be found exactly is refused."""
    messages = chosen(sample["messages"], loss_on)
    weights = [message_weight(message) for message in messages]
    turns = [] if add_generation_prompt else [place for place, weight in enumerate(weights) if weight]
    shown = [_shown(message, place) for place, message in enumerate(messages)]
    tools = [_tool(tool) for tool in sample.get("tools") or []] or None
    _check_characters(shown, tools)
    parts = trains_part(loss_on, is_call=False), trains_part(loss_on, is_call=True)
    layout = _process(template).lay_out(shown, tools, turns, add_generation_prompt, find_calls=not all(parts))
    trained = [
        (
            span.start if parts[0] else span.calls,
            (span.after if train_newline else span.end) if parts[1] else span.calls,
            weights[span.message],
        )
        for span in layout.spans
    ]
    return list(_segments(layout, trained, template))


def _shown(message: Message, place: int) -> Message:
    """What a template sees of a message: no null, no settings of ours, arguments as an object."""
    if message["role"] not in ROLES:
        raise RowError(
            f"Expected the role of message {place} to be one of {', '.join(ROLES)}, got {message['role']!r}."
        )
    shown = {key: value for key, value in message.items() if key not in ("loss", "tool_calls") and value is not None}
    calls = message.get("tool_calls") or []
    if any(is_interpreter(call) for call in calls):
        raise RowError("The tokenizer's chat template has no code interpreter. Use internlm2, or leave such rows out.")
    if calls:
        shown["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": call_arguments(call)}} for call in calls
        ]
    return {"content": "", **shown}


def _tool(tool: Any) -> dict[str, Any]:
    if is_interpreter(tool):
        raise RowError("The tokenizer's chat template has no code interpreter. Use internlm2, or leave such rows out.")
    return {"type": "function", "function": dict(function_body(tool))}


def _check_characters(messages: Sequence[Message], tools: list[Any] | None) -> None:
    if len(messages) > MAX_MESSAGES:
        raise RowError(f"Expected at most {MAX_MESSAGES} messages, got {len(messages)}.")
    for text in texts_of([messages, tools]):
        found = PRIVATE.search(text)
        if found is not None:
            raise RowError(f"Expected no private-use character U+{ord(found[0]):X}: places are marked with them here.")
        if not text.isascii():
            _check_pairs(text)


def _check_pairs(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RowError(f"Expected text that UTF-8 can hold, got half of a surrogate pair ({half!r}).") from None


def _segments(layout: Layout, trained: Sequence[tuple[int, int, float]], template: JinjaTemplate) -> Iterator[Segment]:
    """The text cut at what is trained (start, end, weight), at the row's own that reads like a mark, and at marks."""
    edges = {0, len(layout.text), *(edge for fence in layout.fences for edge in fence)}
    edges |= {edge for start, end, _ in trained for edge in (start, end)}
    fenced = {start for start, _ in layout.fences}
    marks = mark_pattern(template.special_tokens)
    cuts = sorted(edges)
    place = 0
    for start, end in pairwise(cuts):
        while place < len(trained) and trained[place][1] <= start:
            place += 1
        is_trained = place < len(trained) and trained[place][0] <= start
        weight = trained[place][2] if is_trained else 1.0
        if start in fenced:
            yield Segment(layout.text[start:end], is_trained, False, weight)
            continue
        for number, piece in enumerate(marks.split(layout.text[start:end])):
            if piece:
                yield Segment(piece, is_trained, number % 2 == 1, weight)
