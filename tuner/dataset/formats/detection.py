"""Which format rows are in: by their keys, their roles and their marks, or not at all where that is not certain."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tuner.dataset.formats.agent_logs import SPEAKERS as AGENT_SPEAKERS
from tuner.dataset.formats.known import FORMATS
from tuner.dataset.messages import ROLES
from tuner.errors import UserError

NUM_ROWS = 100  # looked at in each file
AUTO = "auto"
REACT = re.compile(r"^Action Input:|<\|startofthink\|>", re.MULTILINE)
ACTION_MARK = "<|action_start|>"
PARTS = {"thought", "language"}
RESULTS = {"environment", "execution", "execute"}
LAB_NAMES = {"plugin", "interpreter"}
# Formats that read the same roles and keys the same way; the first knows none but those, and is enough for rows where
# nothing else is seen.
FAMILIES = (("openai", "ftdp", "interpreter"), ("sharegpt", "msagent"))


class Sign(NamedTuple):
    """What rows of a format show, as a test of one row and in words."""

    shown: Callable[[Mapping[str, Any]], bool]
    words: str


class Detected(NamedTuple):
    """A key of FORMATS, and what showed it."""

    name: str
    why: str


def detect(rows: Sequence[Any]) -> Detected:
    """The format that all of these rows show. Raises UserError, with the candidates, where none or several fit."""
    possible = set(SIGNS)
    for place, row in enumerate(rows):
        shown = _shown_by(row)
        if not shown:
            raise UserError(f"row {place + 1} is in no known format: {_words_for(row)}. {_advice()}")
        if not possible & shown:
            before, here = _listed(possible), _listed(shown)
            raise UserError(
                f"the rows differ: up to row {place} they look like {before}, row {place + 1} like {here}. {_advice()}"
            )
        possible &= shown
    if not rows:
        raise UserError(f"there are no rows to look at. {_advice()}")
    names = [name for name in SIGNS if name in possible]
    if len(names) > 1 and not any(possible <= set(family) for family in FAMILIES):
        raise UserError(f"the rows may be {_listed(possible)}, which read them differently. {_advice()}")
    return Detected(names[0], SIGNS[names[0]].words)


def _advice() -> str:
    known = ", ".join(FORMATS)
    return f"Set data_format to one of {known}, or to a function of your own; `tuner list-formats` shows them."


def _listed(names: set[str]) -> str:
    return " or ".join(name for name in SIGNS if name in names)


def _shown_by(row: Any) -> set[str]:
    if isinstance(row, list):  # ftdp's files hold bare lists of messages
        row = {"messages": row}
    if not isinstance(row, Mapping):
        return set()
    return {name for name, sign in SIGNS.items() if sign.shown(row)}


def _words_for(row: Any) -> str:
    if not isinstance(row, Mapping):
        return f"it is of type {type(row).__name__}"
    shown = ", ".join(repr(str(key)) for key in list(row)[:8])
    return f"it has the keys {shown}{', ...' if len(row) > 8 else ''}" if row else "it is empty"


def _turns(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The turns under a key; none where it holds something else."""
    turns = row.get(key)
    whole = isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns)
    return turns if whole and turns is not None else []


def _are(row: Mapping[str, Any], key: str, *needed: str) -> bool:
    turns = _turns(row, key)
    return bool(turns) and all(name in turn for turn in turns for name in needed)


def _roles(row: Mapping[str, Any]) -> set[str]:
    return {str(turn.get("role")) for turn in _turns(row, "messages")}


def _is_openai(row: Mapping[str, Any]) -> bool:
    return _are(row, "messages", "role") and _roles(row) <= set(ROLES) and not _is_lab(row) and "inner_steps" not in row


def _is_lab(row: Mapping[str, Any]) -> bool:
    """Roles, names or marks that only InternLM's own formats have."""
    turns = _turns(row, "messages")
    named = any(str(turn.get("name")) in LAB_NAMES for turn in turns)
    marked = any(ACTION_MARK in turn["content"] for turn in turns if isinstance(turn.get("content"), str))
    return named or marked or bool(_roles(row) & (PARTS | RESULTS))


def _is_plain(row: Mapping[str, Any]) -> bool:
    """Turns that OpenAI's and InternLM's formats write alike."""
    plain = {*ROLES} - {"tool"}
    return (
        _is_openai(row) and _roles(row) <= plain and not any("tool_calls" in turn for turn in _turns(row, "messages"))
    )


def _is_ftdp(row: Mapping[str, Any]) -> bool:
    if not _are(row, "messages", "role", "content") or "inner_steps" in row:
        return False
    marked = any(ACTION_MARK in str(turn["content"]) for turn in _turns(row, "messages"))
    return _is_plain(row) or (
        _is_lab(row) and (marked or not _is_log(row)) and not _roles(row) & {"execution", "execute"}
    )


def _is_log(row: Mapping[str, Any]) -> bool:
    """Results that follow what an assistant wrote, rather than a call in a turn of its own."""
    roles = _roles(row)
    ran = bool(roles & RESULTS) and not roles & PARTS and not {"tool", "environment"} <= roles
    return _are(row, "messages", "role", "content") and (ran or _is_plain(row))


def _is_preference(row: Mapping[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _is_react(row: Mapping[str, Any]) -> bool:
    if isinstance(row.get("conversations"), str):
        return REACT.search(row["conversations"].replace("\\n", "\n")) is not None
    values = [turn.get("value") for turn in _turns(row, "conversations")]
    return any(isinstance(value, str) and REACT.search(value) for value in values)


def _is_msagent(row: Mapping[str, Any]) -> bool:
    spoken = {str(turn.get("from")) for turn in _turns(row, "conversations")} <= {*AGENT_SPEAKERS}
    return isinstance(row.get("conversations"), str) or (_are(row, "conversations", "from", "value") and spoken)


def _has_text(row: Mapping[str, Any], *keys: str) -> bool:
    return any(isinstance(row.get(key), str) for key in keys)


SIGNS: dict[str, Sign] = {
    "openai": Sign(_is_openai, "'messages' with the roles of OpenAI"),
    "sharegpt": Sign(
        lambda row: _are(row, "conversations", "from", "value") and not _is_react(row) and not _is_preference(row),
        "'conversations' of turns with 'from' and 'value'",
    ),
    "alpaca": Sign(
        lambda row: "instruction" in row and _has_text(row, "output", "response") and not _is_preference(row),
        "'instruction' and 'output' or 'response'",
    ),
    "qa": Sign(
        lambda row: (
            _has_text(row, "question", "prompt")
            and _has_text(row, "answer", "completion", "response")
            and "messages" not in row
            and not _is_preference(row)
        ),
        "a question and its answer",
    ),
    "text": Sign(lambda row: isinstance(row.get("text"), str), "'text'"),
    "repository": Sign(lambda row: _are(row, "files", "path", "text"), "'files' with paths and texts"),
    "tokens": Sign(lambda row: "tokens" in row or "input_ids" in row, "token ids"),
    "xtuner": Sign(
        lambda row: _are(row, "conversation", "output"), "'conversation' of turns with 'input' and 'output'"
    ),
    "ftdp": Sign(_is_ftdp, "'messages' with plugin, interpreter or thought"),
    "lagent": Sign(lambda row: "inner_steps" in row, "'inner_steps'"),
    "interpreter": Sign(_is_log, "'messages' with results of code that an assistant wrote"),
    "msagent": Sign(
        lambda row: _is_msagent(row) and not _is_preference(row),
        "'conversations' with Action Input or <|startofthink|>",
    ),
    "agent_flan": Sign(lambda row: _are(row, "conversation", "role", "content"), "'conversation' of turns with 'role'"),
    "toolbench": Sign(lambda row: "answer_generation" in row, "'answer_generation'"),
    "bfcl": Sign(lambda row: isinstance(row.get("question"), list), "'question' with lists of messages"),
    "preference": Sign(_is_preference, "'chosen' and 'rejected'"),
}
