"""`tuner chat`: from options to a conversation on the terminal."""

import sys
from pathlib import Path
from typing import Any

import torch

from tuner.chat.answers import INTERPRETER, Answers, read_tools
from tuner.chat.functions import FunctionFile
from tuner.chat.interpreter import hide_environment, run_code
from tuner.chat.loading import find_source, load_llm, load_template, load_tokenizer
from tuner.chat.session import ChatSession, Message, generation
from tuner.chat.terminal import converse
from tuner.dataset.messages import function_body, is_interpreter
from tuner.dataset.templates import ActionGrammar, ChatTemplate
from tuner.errors import UserError
from tuner.model.tokenizer import check_vocabulary


def chat(
    model_dir: str,
    *,
    adapter: Path | None = None,
    template: str | None = None,
    system: str | None = None,
    tools: Path | None = None,
    tools_file: Path | None = None,
    allow_code: bool = False,
    **sampling: Any,
) -> None:
    """Talk to a model on the terminal until the input ends.

    Args:
        model_dir: a model directory or hub name, a checkpoint, a work dir, or an adapter that names its base.
        adapter: an adapter on top of `model_dir`: peft's directory, or a checkpoint or work dir that trained one.
        template: name of the chat template; found from the directory where it is not given.
        system: text of the system turn.
        tools: JSON file with a list of OpenAI function schemas that the model may call.
        tools_file: Python file whose functions answer calls, in a process of their own; it is the user's, and trusted.
        allow_code: run the model's interpreter calls, in another process with limits.
        sampling: max_new_tokens, temperature (0 takes the likeliest token) and seed.

    Raises:
        UserError: what cannot be loaded, an unknown template, tools that are not JSON, a file without functions.
    """
    settings = generation(sampling["max_new_tokens"], sampling["temperature"])
    torch.manual_seed(sampling["seed"])  # also of GPUs; nothing else is drawn
    declared = read_tools(tools) if tools else None
    source = find_source(model_dir, adapter)
    if source.is_named_by_adapter:
        print(f"base model, as the adapter names it: {source.base}")
    if allow_code:
        hide_environment()
    functions = FunctionFile(tools_file, described=names_of(declared)) if tools_file else None
    try:
        tokenizer = load_tokenizer(source)
        chat_template = load_template(source, tokenizer, template)
        answers = who_answers(declared, functions, allow_code, chat_template)
        llm = load_llm(source)
        check_vocabulary(tokenizer, llm)
        session = ChatSession(llm, tokenizer, template=chat_template, generation=settings)
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives input() its line editing and its history
        converse(session, opening, answers)
    finally:
        if functions is not None:
            functions.close()


def names_of(declared: list[dict[str, Any]] | None) -> list[str] | None:
    """The functions among declared tools; None where none are declared."""
    if declared is None:
        return None
    return [function_body(tool)["name"] for tool in declared if not is_interpreter(tool)]


def who_answers(
    declared: list[dict[str, Any]] | None, functions: FunctionFile | None, allow_code: bool, template: ChatTemplate
) -> Answers:
    """The tools that the model is told of: of --tools, else of --tools-file; and the interpreter, if it is allowed.

    Raises:
        UserError: the template has no interpreter, or a function of the file is not among the declared ones.
    """
    tools = list(declared if declared is not None else functions.tools if functions else [])
    if functions is not None and declared is not None and not set(functions.names) & set(names_of(declared) or ()):
        raise UserError(
            f"--tools and {functions.file} have no function in common: {', '.join(names_of(declared) or ['none'])} and "
            f"{', '.join(functions.names)}. Leave --tools out to take the schemas from the file."
        )
    if allow_code:
        if not isinstance(template.tools, ActionGrammar):
            raise UserError(f"--allow-code: the template {template.name} has no code interpreter, internlm2 has one.")
        if not any(is_interpreter(tool) for tool in tools):
            tools.append(INTERPRETER)
    return Answers(tools, functions=functions, run_code=run_code if allow_code else None)
