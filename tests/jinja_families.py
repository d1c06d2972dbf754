"""Small chat templates built as those of published families, in words of our own, and tokenizers with their marks."""

import copy
from typing import Any, NamedTuple

from chat_samples import bytelevel
from transformers import PreTrainedTokenizerFast

DATED = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' + first + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call a turn, please') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson + '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
    {{- message.content | tojson if message.content is mapping or message.content is iterable else message.content }}
    {{- '<|eot_id|>' }}
{%- elif message.role == 'user' and loop.first and tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nThese may be called:\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
    {{- message.content | trim + '<|eot_id|>' }}
{%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

THINKING = """{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + 'Tools:\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
{%- set ns.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {%- set said = message.content %}{%- set thought = '' %}
    {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
    {%- elif '</think>' in said %}
        {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.asked and (loop.last or thought) %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
    {%- else %}{{- said }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if not loop.first or said %}{{- '\\n' }}{%- endif %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif not (loop.first and message.role == 'system') %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

BRACKETS = """{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('turns must alternate') }}{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + (first if loop.first else '') + message.content + ' [/INST]' }}
{%- else %}{{- ' ' + message.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""

LAST_TOOLS = """{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
    {%- if tools and message == users[-1] %}
    {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}{{- call.function | tojson + (']' if loop.last else ', ') }}{%- endfor %}
    {{- eos_token }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}"""

MODEL_ROLE = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

END_OF_ALL = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

LINES = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

WORDS = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}
{{- 'Assistant: ' + message['content'] + eos_token }}{% else %}{{- message['content'] + '\n\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

GENERATION = """{% for message in messages %}{% if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

ALWAYS_THINKS = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '<|user|>' + message['content'] }}{% elif message['role'] == 'assistant' %}
{{- '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}
{%- else %}{{ message['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

XML_CALLS = """{% for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' }}{%- endfor %}
{{- '</function>\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if tools %}{{- '' }}{%- endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


class Family(NamedTuple):
    """A template, its special tokens (the last one ends a document), added ones, and what its rows may hold."""

    jinja: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    tools: bool = False
    system: bool = True
    before: str = ""  # what the model's turns begin with


FAMILIES = {
    "dated": Family(DATED, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "thinking": Family(
        THINKING,
        ("<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        tools=True,
    ),
    "brackets": Family(BRACKETS, ("<s>", "[INST]", "[/INST]", "</s>"), before=" "),
    "model role": Family(MODEL_ROLE, ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"), system=False),
    "end of all": Family(END_OF_ALL, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")),
    "lines": Family(LINES, ("<s>", "<|user|>", "<|assistant|>", "<|system|>", "</s>")),
    "words": Family(WORDS, ("<s>", "</s>"), before=" "),
    "generation": Family(GENERATION, ("<|im_start|>", "<|im_end|>")),
}
LAST_TOOLS_FAMILY = Family(
    LAST_TOOLS,
    ("<s>", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "</s>"),
)
THINKER = Family(ALWAYS_THINKS, ("<s>", "<|user|>", "<|assistant|>", "</s>"), ("<think>", "</think>"))
XML = Family(XML_CALLS, ("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"))


def own(family: Family | str, **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's marks and template."""
    family = FAMILIES[family] if isinstance(family, str) else family
    family = family._replace(**changes)
    tokenizer = copy.deepcopy(bytelevel("chatml", tags=False))
    tokenizer.add_special_tokens(
        {
            "bos_token": family.special[0],
            "eos_token": family.special[-1],
            "additional_special_tokens": [*family.special],
        }
    )
    tokenizer.add_tokens([*family.added])
    tokenizer.chat_template = family.jinja
    return tokenizer
