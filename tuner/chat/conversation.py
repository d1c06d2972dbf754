"""The conversation itself: what was said, what is waited for, and what a user can do with it."""

from pathlib import Path
from typing import Any

from tuner.chat.shown import name_of
from tuner.dataset.chat_template import Reply
from tuner.dataset.messages import dump
from tuner.new_files import write_new

Message = dict[str, Any]


class Conversation:
    """Messages so far; `pending` are the calls of the last one that nobody has answered yet."""

    def __init__(self, opening: list[Message]) -> None:
        self.opening = opening
        self.messages, self.pending = list(opening), list[dict[str, Any]]()

    def reset(self) -> None:
        """Forget all but the system turn."""
        self.messages, self.pending = list(self.opening), []

    def undo(self) -> str | None:
        """Take back the last turn of the user and all that followed; what it said, None where there is none."""
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            return None
        said = self.messages[places[-1]]["content"]
        self.messages, self.pending = self.messages[: places[-1]], []
        return said

    def hear(self, text: str) -> None:
        """Add what was typed or computed: the result of the first pending call, else the user's turn."""
        if not self.pending:
            self.messages.append({"role": "user", "content": text})
            return
        self.messages.append({"role": "tool", "content": text, "name": name_of(self.pending.pop(0))})

    def say(self, reply: Reply) -> None:
        """Add the model's turn; several calls stay in the one turn that the model wrote."""
        self.pending = list(reply.tool_calls)
        turn = {"role": "assistant", "content": reply.content, "tool_calls": list(reply.tool_calls)}
        self.messages.append({**turn, "joined": True})

    def save(self, path: Path, tools: list[dict[str, Any]]) -> None:
        """Write a row of `openai_messages`, as training reads it. Raises UserError where the file exists."""
        messages = [
            {
                key: value
                for key, value in message.items()
                if key != "joined" and not (key == "tool_calls" and not value)
            }
            for message in self.messages
        ]
        write_new(path, dump({"messages": messages, "tools": tools}) + "\n")
