"""A Jinja template opened in transformers' sandbox: renderings as apply_chat_template makes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.utils import chat_template_utils

from tuner.dataset.jinja_fences import Fences
from tuner.dataset.jinja_process import DATE
from tuner.dataset.jinja_spans import Finder
from tuner.dataset.messages import Message, RowError
from tuner.dataset.templates import mark_pattern

MAX_TEXT = 32 << 20  # characters of a conversation, whose row has at most 16 MiB
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def open_finder(*, jinja: str, variables: Mapping[str, str], marks: Sequence[str], soft: Sequence[str]) -> Finder:
    """The template compiled, with today's date replaced by DATE. Raises RowError where it is no template."""
    compiled = _guarded(chat_template_utils._compile_jinja_template, jinja)
    compiled.globals["strftime_now"] = DATE.strftime

    def call(messages: Sequence[Message], tools: list[Any] | None, **choices: bool) -> Any:
        conversations = [list(messages)]
        settings = {**variables, **choices}
        return _guarded(
            chat_template_utils.render_jinja_template, conversations, tools=tools, chat_template=jinja, **settings
        )

    def render(messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> str:
        text = call(messages, tools, add_generation_prompt=prompt)[0][0]
        if len(text) > MAX_TEXT:
            raise RowError(f"the tokenizer's chat template writes {len(text):,} characters, over {MAX_TEXT:,}")
        return text

    def blocks(messages: Sequence[Message], tools: list[Any] | None) -> list[tuple[int, int]] | None:
        if not GENERATION.search(jinja):
            return None
        return call(messages, tools, return_assistant_tokens_mask=True)[1][0]

    sought = looked_for(compiled.environment.parse(jinja))
    thoughts = [token for token in soft if any(token in text for text in sought)]
    return Finder(render, blocks, Fences(marks, thoughts), mark_pattern(tuple(marks)))


def looked_for(tree: nodes.Template) -> set[str]:
    """The texts that a template compares with, splits at or searches for."""
    found: set[str] = set()
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        # the operands of a comparison, the arguments of a call: their constants one level down
        inner = [child for part in node.iter_child_nodes() for child in (part, *part.iter_child_nodes())]
        found |= {part.value for part in inner if isinstance(part, nodes.Const) and isinstance(part.value, str)}
    return found


def _guarded(function: Any, *arguments: Any, **named: Any) -> Any:
    """Call it; whatever it raises is the template's answer to the row."""
    try:
        return function(*arguments, **named)
    except jinja2.exceptions.SecurityError as error:
        raise RowError(f"the tokenizer's chat template reached for what is forbidden: {error}") from None
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise RowError(f"the tokenizer's chat template is not valid Jinja: line {error.lineno}: {error}") from None
    except jinja2.exceptions.TemplateError as error:
        raise RowError(f"the tokenizer's chat template refuses the row: {error}") from None
    except Exception as error:  # a template may fail in any way that Python can
        raise RowError(f"the tokenizer's chat template failed: {type(error).__name__}: {error}") from None
