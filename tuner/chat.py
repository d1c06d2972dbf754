"""A terminal chat that streams, shows tool calls as such and never executes them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.generation.streamers import BaseStreamer

from tuner.dataset.chat_template import CHAT_TEMPLATES, ChatTemplate, Reply, parse_reply, render
from tuner.dataset.jinja_template import recognise, resolve_template
from tuner.dataset.templates import JinjaTemplate, trained_with
from tuner.dataset.tokenize import Encoder
from tuner.errors import UserError
from tuner.model.build import build_llm
from tuner.model.tokenizer import build_tokenizer

HELP = "Type a message. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply."
UNKNOWN_GRAMMAR = (
    "How this model's own template writes tool calls is not known here: they are shown as they are written."
)
Message = dict[str, Any]


def chat(
    model_dir: str,
    *,
    template: str | None = None,
    system: str | None = None,
    tools: Path | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Talk to the model in `model_dir` on the terminal until the input ends.

    Args:
        template: name of the chat template; found from the directory where it is not given.
        system: text of the system turn.
        tools: JSON file with a list of OpenAI function schemas that the model may call.
        temperature: 0 takes the likeliest token.

    Raises:
        UserError: a directory that cannot be loaded, an unknown template, tools that are not JSON.
    """
    set_seed(seed)
    tokenizer = build_tokenizer(model_dir)
    chat_template = resolve_template(template, tokenizer) if template else detect_template(model_dir, tokenizer)
    declared = read_tools(tools) if tools else []
    llm = build_llm(model_dir).eval()
    session = ChatSession(llm, tokenizer, template=chat_template, generation=generation(max_new_tokens, temperature))
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    converse(session, opening, declared)


def generation(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of `generate`; greedy decoding takes no temperature."""
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative. Use 0 for the likeliest token, or about 0.7.")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, **sampling}


def detect_template(model_dir: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The template that a conversion noted, or the one that suits the tokenizer and what it writes itself."""
    note = Path(model_dir) / "template.json"
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        template = resolve_template(found["chat_template"], tokenizer)
        return trained_with(template, found.get("parallel_tool_calls", "template"))
    if tokenizer.chat_template is not None:
        return resolve_template("auto", tokenizer)
    fitting = recognise(tokenizer)
    if fitting is None:
        raise UserError(f"no chat template fits the tokenizer of {model_dir}; name one of {', '.join(CHAT_TEMPLATES)}.")
    return fitting


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The function schemas in a JSON file."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read tools from {path}: {error}. Give a JSON list of function schemas.") from error
    if not isinstance(tools, list):
        raise UserError(f"{path} holds a {type(tools).__name__}; give a JSON list of function schemas.")
    return tools


class ChatSession:
    """A model, its tokenizer and template: conversation -> streamed reply."""

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        template: ChatTemplate,
        generation: dict[str, Any],
    ) -> None:
        self.llm, self.tokenizer, self.template, self.generation = llm, tokenizer, template, generation
        self.encoder = Encoder.from_tokenizer(tokenizer, template)
        self.stop_ids = tokenizer.convert_tokens_to_ids(list(template.stop_tokens))

    def reply(self, messages: list[Message], tools: list[dict[str, Any]], write: Callable[[str], None]) -> Reply:
        """Generate one assistant turn; `write` gets its visible text while it comes."""
        segments = render({"messages": messages, "tools": tools}, self.template, add_generation_prompt=True)
        prompt = torch.from_numpy(self.encoder.encode([segments])[0].ids.astype("int64"))[None].to(self.llm.device)
        printer = ReplyPrinter(self.tokenizer, hidden=hidden_marks(self.template), write=write)
        with torch.inference_mode():
            try:
                self.llm.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=printer,
                    eos_token_id=self.stop_ids,
                    pad_token_id=self.stop_ids[0],
                    **self.generation,
                )
            except KeyboardInterrupt:
                write(" [stopped]")
        return parse_reply(printer.text, self.template)


def hidden_marks(template: ChatTemplate) -> tuple[str, ...]:
    """From the first of these on a reply is not shown as it comes: its end, and calls, which are shown once read."""
    if not isinstance(template, JinjaTemplate):
        return template.special_tokens
    return template.stop_tokens if template.tools is None else (*template.stop_tokens, template.tools.start)


class ReplyPrinter(BaseStreamer):
    """Writes text as soon as its bytes are whole; from the first of the `hidden` marks on it keeps silent."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, hidden: tuple[str, ...], write: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.hidden, self.write = tokenizer, hidden, write
        self.ids: list[int] = []
        self.text = ""
        self.num_shown = 0
        self.saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt once, then the new tokens, one call each."""
        if not self.saw_prompt:
            self.saw_prompt = True
            return
        self.ids += value.flatten().tolist()
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.show(whole=False)

    def end(self) -> None:
        self.show(whole=True)

    def show(self, *, whole: bool) -> None:
        """Write what is new and can no longer change: an unfinished character decodes to U+FFFD."""
        starts = [self.text.find(token) for token in self.hidden if token in self.text]
        visible = self.text[: min(starts, default=len(self.text))]
        if not whole and not starts and visible.endswith("\ufffd"):
            return
        if len(visible) > self.num_shown:
            self.write(printable(visible[self.num_shown :]))
            self.num_shown = len(visible)


def printable(text: str) -> str:
    """Control characters made visible, so that a reply cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def describe_call(call: dict[str, Any]) -> str:
    """One line (or a block of code) that shows a tool call which nobody executes."""
    if call["type"] == "code_interpreter":
        return printable("[interpreter call, not executed]\n" + call["code_interpreter"]["input"])
    function = call["function"]
    return printable(f"[tool call, not executed] {function['name']}({function['arguments']})")


def converse(session: ChatSession, opening: list[Message], tools: list[dict[str, Any]]) -> None:
    """Read, reply, remember; ends at the end of the input."""
    print(HELP)
    if tools and isinstance(session.template, JinjaTemplate) and session.template.tools is None:
        print(UNKNOWN_GRAMMAR)
    messages, pending = list(opening), list[dict[str, Any]]()
    while (line := ask(f"result of {name_of(pending[0])}> " if pending else "you> ")) is not None:
        if line == "/reset":
            messages, pending = list(opening), []
            continue
        if not line:
            continue
        messages.append(as_message(line, pending))
        pending = pending[1:]
        if pending:
            continue  # the model called several tools, and goes on with all of their results
        reply = session.reply(messages, tools, lambda text: print(text, end="", flush=True))
        print()
        if reply.error:
            print(printable(f"[{reply.error}. It was written so:]\n{reply.content}"))
        for call in reply.tool_calls:
            print(describe_call(call))
        pending = list(reply.tool_calls)
        said = {"role": "assistant", "content": reply.content, "tool_calls": pending}
        messages.append({**said, "joined": True})  # several calls stay in the one turn that the model wrote


def as_message(line: str, pending: list[dict[str, Any]]) -> Message:
    """What was typed: the result of the tool that the model called, or the user's turn."""
    if not pending:
        return {"role": "user", "content": line}
    return {"role": "tool", "content": line, "name": name_of(pending[0])}


def name_of(call: dict[str, Any]) -> str:
    """The function that a call names, or the interpreter."""
    return call["function"]["name"] if call["type"] == "function" else "interpreter"


def ask(prompt: str) -> str | None:
    """A line from the user; None when the input ends or the user leaves."""
    try:
        line = input(prompt if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line in ("/exit", "/quit") else line
