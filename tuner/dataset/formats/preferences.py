"""Preference pairs: two answers to one prompt, of which one is better. No method trains on them yet."""

import re
from typing import Any

from tuner.dataset.formats.fields import Row, field, objects, one_of, require
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.formats.sharegpt_turns import SPEAKERS
from tuner.dataset.messages import Message, RowError

TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")
NAMES = {"Human": "user", "Assistant": "assistant"}


def preference(row: Row) -> dict[str, Any]:
    """{"chosen", "rejected", "prompt"?}: answers as text, messages or turns, or whole talks as in HH-RLHF.

    The sample holds two of them, {"chosen": sample, "rejected": sample}, alike but for what follows the prompt.
    """
    for key in ("chosen", "rejected"):
        field(row, key, object)
    prompt = _prompt(row)
    chosen, rejected = (_told(row, key, prompt) for key in ("chosen", "rejected"))
    require(chosen != rejected, "'chosen' and 'rejected' to differ", row["chosen"])
    shared = len(prompt) or _num_shared(chosen, rejected)
    for messages, key in ((chosen, "chosen"), (rejected, "rejected")):
        answers = [message["role"] == "assistant" for message in messages[shared:]]
        require(bool(answers) and answers[-1], f"{key!r} to end with an answer of the assistant", row[key])
    given = [{**message, "loss": False} if message["role"] == "assistant" else message for message in chosen[:shared]]
    return {
        "chosen": conversation([*given, *chosen[shared:]], row.get("tools")),
        "rejected": conversation([*given, *rejected[shared:]], row.get("tools")),
    }


def _prompt(row: Row) -> list[Message]:
    """What stands before both answers, where the row has it apart from them."""
    system: list[Message] = [{"role": "system", "content": field(row, "system", str)}] if row.get("system") else []
    given = [key for key in ("prompt", "question", "instruction", "conversations") if row.get(key)]
    if len(given) > 1:
        raise RowError(f"Expected one prompt in the row, got {' and '.join(map(repr, given))}.")
    if not given:
        return system
    key = given[0]
    if isinstance(row[key], list):
        return [*system, *_messages(objects(row, key, "message"), key)]
    words = field(row, key, str)
    if TURN.match(words):
        return [*system, *_spoken(words, key)]
    more = row.get("input") if key == "instruction" else None
    require(isinstance(more, str | None), "'input' to be text", more)
    return [*system, {"role": "user", "content": f"{words}\n{more}" if more else words}]


def _told(row: Row, key: str, prompt: list[Message]) -> list[Message]:
    """Prompt and answer as messages; an answer that repeats the prompt is a whole talk."""
    answer = row[key]
    if isinstance(answer, str):
        if not prompt or TURN.match(answer):
            answer = _spoken(answer, key)
        else:
            require(answer != "", f"{key!r} to hold an answer", answer)
            return [*prompt, {"role": "assistant", "content": answer.removeprefix(" ")}]
    elif isinstance(answer, dict):
        answer = _messages([answer], key)
    else:
        require(isinstance(answer, list), f"{key!r} to be text, a message or a list of messages", answer)
        answer = _messages(objects(row, key, "message"), key)
    return answer if answer[: len(prompt)] == prompt else [*prompt, *answer]


def _messages(turns: list[Row], key: str) -> list[Message]:
    messages = []
    for place, turn in enumerate(turns):
        where = f"message {place} of {key!r}"
        if "from" in turn:
            role = one_of(field(turn, "from", str, where), SPEAKERS, f"'from' of {where}")
            require(role != "calls", f"{where} to be text, function calls being for openai messages", turn["from"])
            turn = {"role": role, "content": field(turn, "value", str, where)}
        require(isinstance(turn.get("role"), str), f"a role in {where}", turn.get("role"))
        messages.append(dict(turn))
    return messages


def _spoken(talk: str, key: str) -> list[Message]:
    """HH-RLHF's text: turns begin with a blank line and `Human:` or `Assistant:`."""
    before, *parts = TURN.split(talk)
    require(before.strip() == "" and bool(parts), f"{key!r} to begin with '\\n\\nHuman:', there being no prompt", talk)
    pairs = zip(parts[::2], parts[1::2])
    messages = [{"role": NAMES[speaker], "content": words.strip()} for speaker, words in pairs]
    if messages[-1] == {"role": "assistant", "content": ""}:  # a prompt ends where the answer is to begin
        messages.pop()
    return messages


def _num_shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with."""
    pairs = list(zip(chosen, rejected))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))


PREFERENCE_EXAMPLE = {
    "chosen": "\n\nHuman: Is the sea salty?\n\nAssistant: Yes, mostly from rivers.",
    "rejected": "\n\nHuman: Is the sea salty?\n\nAssistant: No.",
}
