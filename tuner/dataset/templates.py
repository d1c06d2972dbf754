"""Chat templates as data: the marks of each family, its tool grammar, and the same in Jinja for exported tokenizers."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from tuner.errors import UserError
from tuner.nearest import nearest


@dataclass(frozen=True, kw_only=True)
class ActionGrammar:
    """InternLM2's tools: named system turns declare them, a turn has one action, a named environment answers."""

    plugin: str
    interpreter: str
    start: str
    end: str
    after_end: str  # between the end of the action and the end of the turn
    interpreter_prompt: str  # text of the interpreter's system turn where the tool brings no description
    result_role: str


@dataclass(frozen=True, kw_only=True)
class ToolCallGrammar:
    """Qwen's tools: the first system turn lists them, calls stand between tags, results in a user turn."""

    before_tools: str
    after_tools: str
    start: str
    end: str
    before_result: str
    after_result: str
    result_role: str


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a family writes a conversation; two templates that are equal give the same tokens."""

    name: str
    special_tokens: tuple[str, ...]  # the marks that stand for one id each wherever the template itself writes them
    optional_tokens: tuple[str, ...] = ()  # those among them that are plain text where the tokenizer does not have them
    stop_tokens: tuple[str, ...]  # generation ends at any of these
    begin: str  # before the first turn, and before a document of plain text
    text_end: str  # after a document of plain text
    before_role: str
    before_name: str | None  # None where a turn has no place for a speaker's name
    after_role: str
    turn_end: str  # trained after the model's own words
    separator: str  # never trained
    default_system: str = ""  # the system turn of a conversation that has none
    tools: ActionGrammar | ToolCallGrammar | None
    jinja: str  # what `tokenizer.apply_chat_template` needs for the same tokens

    @property
    def prompt(self) -> str:
        """What stands before the model's own words: generation begins behind it."""
        return self.before_role + "assistant" + self.after_role


@dataclass(frozen=True, kw_only=True)
class JinjaTemplate(ChatTemplate):
    """A tokenizer's own template, which `jinja` holds: what it writes is found by rendering, not from these marks.

    `tools` is only for reading the model's replies: the known grammar that its calls are written in, if there is one.
    """

    @property
    def prompt(self) -> str:
        """The end of what stands before the model's own words, from its last mark on."""
        return self.after_role

    variables: tuple[tuple[str, str], ...]  # what else the template reads: bos_token and the like
    soft_tokens: tuple[str, ...]  # those of special_tokens that the tokenizer calls added, not special: <think>


# Macros come first: a call renders an action turn; a system turn per kind of tool stands behind the first system turn,
# or at the very beginning. Parallel calls become one turn each, followed by the result that answers it, unless
# ARRANGED_JINJA has marked them to stay together.
INTERNLM2_JINJA = """
{%- macro turn(role, name, content) %}
{{- '<|im_start|>' + role + (' name=' + name if name else '') + '\\n' + content + '<|im_end|>\\n' }}
{%- endmacro %}
{%- macro action(call) %}
{%- if call.type == 'code_interpreter' %}
{{- '<|action_start|><|interpreter|>\\n```python\\n' + call.code_interpreter.input + '\\n```<|action_end|>\\n' }}
{%- else %}
{%- set function = call.function or call %}
{%- set arguments = function.arguments if function.arguments is string else function.arguments | tojson %}
{{- '<|action_start|><|plugin|>\\n{"name": ' + function.name | tojson + ', "parameters": ' + arguments }}
{{- '}<|action_end|>\\n' }}
{%- endif %}
{%- endmacro %}
{%- set ns = namespace(functions=[], interpreter='', results=[], open=true) %}
{%- for tool in tools or [] %}
{%- if tool.type == 'code_interpreter' %}
{%- set ns.interpreter = tool.description or '@interpreter_prompt@' %}
{%- else %}
{%- set ns.functions = ns.functions + [tool.function or tool] %}
{%- endif %}
{%- endfor %}
{%- macro tool_turns() %}
{%- if ns.interpreter %}{{- turn('system', '<|interpreter|>', ns.interpreter) }}{%- endif %}
{%- if ns.functions %}{{- turn('system', '<|plugin|>', ns.functions | tojson) }}{%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- if not messages or messages[0].role != 'system' %}{{- tool_turns() }}{%- endif %}
{%- for message in messages %}
{%- set special = {'plugin': '<|plugin|>', 'interpreter': '<|interpreter|>'} if message.role == 'system' else {} %}
{%- set name = special.get(message.name, message.name) %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- set ns.results = [] %}
{%- set ns.open = true %}
{%- for later in messages[loop.index:] %}
{%- set ns.open = ns.open and later.role == 'tool' %}
{%- if ns.open %}{%- set ns.results = ns.results + [later] %}{%- endif %}
{%- endfor %}
{%- if message.joined %}
{%- set ns.actions = message.content or '' %}
{%- for call in message.tool_calls %}{%- set ns.actions = ns.actions + action(call) %}{%- endfor %}
{{- turn('assistant', name, ns.actions) }}
{%- endif %}
{%- for call in message.tool_calls %}
{%- set place = loop.index0 %}
{%- if not message.joined %}
{{- turn('assistant', name, ((message.content or '') if loop.first else '') + action(call)) }}
{%- endif %}
{%- for result in ns.results %}
{%- set named = result.tool_call_id and call.id %}
{%- if (named and result.tool_call_id == call.id) or (not named and loop.index0 == place) %}
{%- set kind = '<|interpreter|>' if call.type == 'code_interpreter' else '<|plugin|>' %}
{{- turn('environment', kind, result.content or '') }}
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- elif message.role != 'tool' %}
{{- turn(message.role, name, message.content or '') }}
{%- endif %}
{%- if loop.first and message.role == 'system' %}{{- tool_turns() }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# What messages.PARALLEL_TOOL_CALLS does before a conversation is rendered, in front of any template that reads
# `messages`. As there, a result belongs to the call of its id, or of its place where there are no ids.
ARRANGE_JINJA = """
{%- set arranged = namespace(messages=[], results=[], open=true) %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- set arranged.results = [] %}
{%- set arranged.open = true %}
{%- for later in messages[loop.index:] %}
{%- set arranged.open = arranged.open and later.role == 'tool' %}
{%- if arranged.open %}{%- set arranged.results = arranged.results + [later] %}{%- endif %}
{%- endfor %}
@whole@
{%- for call in message.tool_calls %}
{%- set place = loop.index0 %}
@each@
{%- for result in arranged.results %}
{%- set named = result.tool_call_id and call.id %}
{%- if (named and result.tool_call_id == call.id) or (not named and loop.index0 == place) %}
{%- set arranged.messages = arranged.messages + [result] %}
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- elif message.role != 'tool' %}
{%- set arranged.messages = arranged.messages + [message] %}
{%- endif %}
{%- endfor %}
{%- set messages = arranged.messages %}
"""
SPLIT_JINJA = """
{%- set words = message.content if loop.first else '' %}
{%- set arranged.messages = arranged.messages + [dict(message, content=words, tool_calls=[call])] %}"""
JOIN_JINJA = """
{%- set together = message.tool_calls | length > 1 %}
{%- set arranged.messages = arranged.messages + [dict(message, joined=together)] %}"""
ARRANGED_JINJA = {
    "split": ARRANGE_JINJA.replace("\n@whole@", "").replace("\n@each@", SPLIT_JINJA).strip() + "\n",
    "join": ARRANGE_JINJA.replace("\n@whole@", JOIN_JINJA).replace("\n@each@", "").strip() + "\n",
}

TOOL_CALL_JINJA = """
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '@default_system@' %}
{%- if tools %}
{{- '<|im_start|>system\\n' + system + ('\\n\\n' if system else '') + '@before_tools@' }}
{%- for tool in tools %}
{{- '\\n' + (tool if tool.function else {'type': 'function', 'function': tool}) | tojson }}
{%- endfor %}
{{- '@after_tools@<|im_end|>\\n' }}
{%- elif system or (messages and messages[0].role == 'system') %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- set follows = not loop.first and messages[loop.index0 - 1].role == 'tool' %}
{{- '\\n' if follows else '<|im_start|>user\\n' }}
{{- '<tool_response>\\n' + (message.content or '') + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{%- set arguments = function.arguments if function.arguments is string else function.arguments | tojson %}
{{- ('' if loop.first and not message.content else '\\n') + '<tool_call>\\n{"name": ' + function.name | tojson }}
{{- ', "arguments": ' + arguments + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3_JINJA = """
{%- if tools %}{{- raise_exception('template llama3 has no tool grammar') }}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content or '') + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""


def fill(jinja: str, **texts: str) -> str:
    """Put texts into the @name@ places of a Jinja template, as the inside of a quoted string."""
    for name, words in texts.items():
        quoted = words.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        jinja = jinja.replace(f"@{name}@", quoted)
    return jinja.strip()


INTERNLM2_TOOLS = ActionGrammar(
    plugin="<|plugin|>",
    interpreter="<|interpreter|>",
    start="<|action_start|>",
    end="<|action_end|>",
    after_end="\n",
    interpreter_prompt="You can run Python: write the code as an action, and its output comes back to you.",
    result_role="environment",
)

# The wording is Qwen2.5's published one: the model has learnt it, so every letter counts.
QWEN_TOOLS = ToolCallGrammar(
    before_tools="# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    after_tools="\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    start="<tool_call>",
    end="</tool_call>",
    before_result="<tool_response>\n",
    after_result="\n</tool_response>",
    result_role="user",
)

TOOL_GRAMMARS = (INTERNLM2_TOOLS, QWEN_TOOLS)


def _chatml(name: str, *, default_system: str, text_end: str) -> ChatTemplate:
    marks = tuple(dict.fromkeys(["<|im_end|>", text_end]))
    return ChatTemplate(
        name=name,
        special_tokens=("<|im_start|>", *marks, "<tool_call>", "</tool_call>"),
        optional_tokens=("<tool_call>", "</tool_call>"),
        stop_tokens=marks,
        begin="",
        text_end=text_end,
        before_role="<|im_start|>",
        before_name=None,
        after_role="\n",
        turn_end="<|im_end|>",
        separator="\n",
        default_system=default_system,
        tools=QWEN_TOOLS,
        jinja=fill(
            TOOL_CALL_JINJA,
            default_system=default_system,
            before_tools=QWEN_TOOLS.before_tools,
            after_tools=QWEN_TOOLS.after_tools,
        ),
    )


INTERNLM2 = ChatTemplate(
    name="internlm2",
    special_tokens=(
        *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
        *("<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
    ),
    # the end of an action stops, too: some models write on behind it, where only the end of the turn belongs
    stop_tokens=("<|im_end|>", "<|action_end|>", "</s>"),
    begin="<s>",
    text_end="</s>",
    before_role="<|im_start|>",
    before_name=" name=",
    after_role="\n",
    turn_end="<|im_end|>",
    separator="\n",
    tools=INTERNLM2_TOOLS,
    jinja=fill(INTERNLM2_JINJA, interpreter_prompt=INTERNLM2_TOOLS.interpreter_prompt),
)

LLAMA3 = ChatTemplate(
    name="llama3",
    special_tokens=(
        *("<|begin_of_text|>", "<|end_of_text|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
    begin="<|begin_of_text|>",
    text_end="<|end_of_text|>",
    before_role="<|start_header_id|>",
    before_name=None,
    after_role="<|end_header_id|>\n\n",
    turn_end="<|eot_id|>",
    separator="",
    tools=None,
    jinja=fill(LLAMA3_JINJA),
)

QWEN2_5 = _chatml(
    "qwen2.5",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    text_end="<|endoftext|>",
)

CHATML = _chatml("chatml", default_system="", text_end="<|im_end|>")

CHAT_TEMPLATES = {template.name: template for template in (INTERNLM2, LLAMA3, QWEN2_5, CHATML)}
# the tokenizer's own Jinja template; "auto" takes the one above that writes the same, if there is one
TOKENIZERS_OWN = ("auto", "jinja")
TEMPLATE_NAMES = (*CHAT_TEMPLATES, *TOKENIZERS_OWN)


@lru_cache(maxsize=8)
def mark_pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    """What finds marks in a text, the longest where several begin alike; `split` keeps them. It never finds nothing."""
    return re.compile("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")" if marks else "(?!)")


def find_template(name: str) -> ChatTemplate:
    """The template of that name; UserError with the allowed and the nearest names where there is none."""
    if name not in CHAT_TEMPLATES:
        allowed = sorted(TEMPLATE_NAMES)
        raise UserError(f"Unknown chat_template {name!r}; allowed: {allowed}.{nearest(name, allowed)}")
    return CHAT_TEMPLATES[name]


def trained_with(template: ChatTemplate, parallel_tool_calls: str) -> ChatTemplate:
    """The template of a model that was trained with this setting: its Jinja writes calls so, and they can be generated.

    What it renders for a sample is as before: there the setting is applied to the messages.
    """
    if isinstance(template.tools, ActionGrammar) and parallel_tool_calls != "join":
        return template  # it gives each call a turn by itself
    jinja = ARRANGED_JINJA.get(parallel_tool_calls, "") + template.jinja
    stops = template.stop_tokens
    if isinstance(template.tools, ActionGrammar):
        stops = tuple(token for token in stops if token != template.tools.end)  # another call may follow
    return replace(template, jinja=jinja, stop_tokens=stops)
