"""The terminal's side: lines and commands in, replies and results of tools out, until the input ends."""

import sys
from pathlib import Path

from tuner.chat.answers import Answers
from tuner.chat.conversation import Conversation
from tuner.chat.session import ChatSession, Message
from tuner.chat.shown import describe_call, describe_history, name_of, printable
from tuner.dataset.messages import RowError
from tuner.dataset.templates import JinjaTemplate
from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

HELP = 'Type a message; one of several lines begins and ends with """. /help lists the commands, Ctrl-D ends the chat.'
COMMANDS = {
    "/reset": "forget the conversation, but for the system turn",
    "/undo": "take back your last message and all that followed",
    "/retry": "let the model answer your last message anew",
    "/history": "show the conversation",
    "/save FILE": "write it as a row that `tuner train` reads; never over a file",
    "/help": "show this",
    "/exit": "end the chat, as Ctrl-D does; Ctrl-C stops a reply or a tool, or clears the line",
}
UNKNOWN_GRAMMAR = (
    "How this model's own template writes tool calls is not known here: they are shown as they are written."
)
QUOTES = '"""'
MAX_ROUNDS = 16  # of calls that are answered here without a word of the user


class LeaveError(Exception):
    """The user leaves, or the input ends."""


class Terminal:
    """A session, a conversation and what answers calls."""

    def __init__(self, session: ChatSession, opening: list[Message], answers: Answers) -> None:
        self.session, self.answers = session, answers
        self.conversation = Conversation(opening)
        self.num_rounds = 0  # since the user's last word

    def run(self) -> None:
        """Read, reply, answer, until the user leaves."""
        print(HELP)
        template = self.session.template
        if self.answers.tools and isinstance(template, JinjaTemplate) and template.tools is None:
            print(UNKNOWN_GRAMMAR)
        try:
            while True:
                self.turn()
        except LeaveError:
            print()

    def turn(self) -> None:
        """Answer one call, or take one message of the user; then let the model speak if it is its turn."""
        pending = self.conversation.pending
        if pending and self.answers.answers(pending[0]) and self.num_rounds < MAX_ROUNDS:
            result = self.answers.answer(pending[0])
            print(printable(f"[result of {name_of(pending[0])}]\n{result}"))
            self.conversation.hear(result)
        else:
            text: str | None = ask(f"result of {name_of(pending[0])}> " if pending else "you> ")
            if not text or text.isspace():
                return
            self.num_rounds = 0
            if is_command(text):
                text = self.obey(*text.split(maxsplit=1))
            if text is None:
                return
            self.conversation.hear(text if "\n" in text else text.strip())
        if not self.conversation.pending:  # where the model called several tools, it goes on with all of their results
            self.reply()

    def reply(self) -> None:
        """Let the model speak, and show what it said and called."""
        self.num_rounds += 1
        try:
            reply = self.session.reply(self.conversation.messages, self.answers.tools, write)
        except RowError as error:  # such as a template that has no place for what was just said
            print(printable(f"[not sent: {error}]"))
            self.conversation.undo()
            return
        print()
        if reply.error:
            print(printable(f"[{reply.error}. It was written so:]\n{reply.content}"))
        for call in reply.tool_calls:
            print(describe_call(call, is_answered=self.answers.answers(call)))
        self.conversation.say(reply)

    def obey(self, command: str, argument: str = "") -> str | None:
        """Do what a command says; the message that it sends, if it sends one."""
        conversation = self.conversation
        if command in ("/exit", "/quit"):
            raise LeaveError
        if command == "/reset":
            conversation.reset()
        elif command in ("/undo", "/retry"):
            said = conversation.undo()
            print("There is nothing to take back." if said is None else f"[taken back: {printable(said)}]")
            return said if command == "/retry" else None
        elif command == "/history":
            print(describe_history(conversation.messages))
        elif command == "/save":
            self.save(argument.strip())
        elif command == "/help":
            print("\n".join(f"{name:<12}{text}" for name, text in COMMANDS.items()))
        else:
            known = [name.split()[0] for name in COMMANDS]
            near = did_you_mean_or_all(command, known)
            print(f"Unknown command {printable(command)}.{near} A space before it sends it as a message.")
        return None

    def save(self, name: str) -> None:
        """`/save FILE`; a mistake in the name does not end the chat."""
        if not name:
            print("Give a file: /save FILE")
            return
        try:
            self.conversation.save(Path(name).expanduser(), self.answers.tools)
        except UserError as error:
            print(error)
        else:
            print(f"saved to {name}")


def converse(session: ChatSession, opening: list[Message], answers: Answers) -> None:
    """Talk on the terminal until the input ends."""
    Terminal(session, opening, answers).run()


def write(text: str) -> None:
    """Show a piece of a reply at once."""
    print(text, end="", flush=True)


def is_command(text: str) -> bool:
    """Whether a line is for us: `/word` and no path such as /etc/hosts."""
    return text.startswith("/") and text.split(maxsplit=1)[0][1:].isalpha() and "\n" not in text


def ask(prompt: str) -> str:
    """A message from the user; empty where Ctrl-C cleared it. Raises LeaveError when the input ends."""
    line = read_line(prompt)
    if line is None or not line.lstrip().startswith(QUOTES):
        return line or ""
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].endswith(QUOTES):
        line = read_line("...> ")
        if line is None:
            return ""
        lines.append(line)
    lines[-1] = lines[-1].removesuffix(QUOTES)
    return "\n".join(lines).strip("\n")


def read_line(prompt: str) -> str | None:
    """One line without its end; None after Ctrl-C."""
    is_terminal = sys.stdin.isatty()
    try:
        return input(prompt if is_terminal else "").rstrip()
    except EOFError as error:
        raise LeaveError from error
    except KeyboardInterrupt:
        if not is_terminal:
            raise  # nobody is there to type another
        print("  (/exit or Ctrl-D ends the chat)")
        return None
