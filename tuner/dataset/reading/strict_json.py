"""JSON as we take it: what the plain parser would accept and lose in silence is refused."""

import json
import re
from typing import Any

from tuner.errors import UserError

MAX_DEPTH = 100  # of arrays and objects; Python's own limit depends on who calls
EXPECTED = "Expected: one JSON object a row."
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)


def loads(text: str) -> Any:
    """The value in a JSON text. Raises UserError, saying what is wrong, also for what is lost in silence elsewhere.

    Refused are duplicated keys, NaN and infinities, halves of surrogate pairs, and more than MAX_DEPTH levels.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise UserError(f"nested more than {MAX_DEPTH} levels deep. {EXPECTED}")
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(explain(error, text)) from error
    except UserError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"a number that is too long ({error}). Write it as a string.") from error
    if HALF_PAIR.search(text):
        _check_surrogates(value)
    return value


def parse_row(content: bytes) -> dict[str, Any]:
    """The object in a row. Raises UserError saying what is expected."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = content[error.start : error.start + 4].hex(" ")
        raise UserError(f"not UTF-8 (the bytes {found} at column {error.start + 1}). Save it as UTF-8.") from error
    row = loads(text)
    if isinstance(row, list) and row and all(isinstance(part, dict) and "role" in part for part in row):
        return {"messages": row}  # the lab's files hold bare lists of messages
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__}. Expected: one JSON object ({{...}}) a row.")
    return row


def depth(text: str) -> int:
    """Levels of arrays and objects in a JSON text."""
    level = deepest = 0
    for mark in MARKS.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark.group(), 0)
        deepest = max(deepest, level)
    return deepest


def end_of_value(text: str, start: int) -> int | None:
    """Where the array or object that begins at `start` ends, however deep it is; None if it goes on past the text."""
    level = 0
    for mark in MARKS.finditer(text, start):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark.group(), 0)
        if level == 0:
            return mark.end()
    return None


def explain(error: json.JSONDecodeError, text: str) -> str:
    """Words for a mistake in a JSON text, and for what commonly leads to it."""
    found = text[error.pos : error.pos + 1]
    where = f"at column {error.pos + 1}"
    if "\0" in text and (found == "\0" or not text.strip("\0")):
        return f"not JSON: a NUL byte {where}, as in a file that was not written to its end. Copy or write it again."
    if found in ("\r", "\n") and not text[error.pos :].strip():
        return f"not JSON: the line ends within a string {where}; it is cut off, or a line end in it is not escaped."
    if error.msg.startswith("Invalid control character"):
        return f"not JSON: a raw control character (\\x{ord(found):02x}) {where}. Write it as \\u{ord(found):04x}."
    if "\r" in text.strip() and error.msg == "Extra data":
        return f"not JSON: several rows on one line, ended by bare carriage returns. End lines with \\n. {EXPECTED}"
    if found == "\ufeff":
        return f"not JSON: a byte order mark {where}, which is not at the beginning of the text. Remove it. {EXPECTED}"
    if text.endswith("\n") and not text[error.pos :].strip():  # a line of a file, then
        return f"not JSON: {error.msg} {where}, where the line ends. {EXPECTED} A file of longer values is named .json."
    if found == "'":
        return f"not JSON: a single quote {where}, as Python prints a dict. Write rows with json.dumps. {EXPECTED}"
    return f"not JSON: {error.msg} {where}. {EXPECTED}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})[:3]
        raise UserError(f"the key {', '.join(map(repr, twice))} twice in one object, so a value would be lost.")
    return made


def _refuse_constant(name: str) -> None:
    raise UserError(f"{name}, which is no JSON. Write null, or leave the key out.")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise UserError(f"the number {text[:40]}, which is too large. Write a finite one.")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError("half of a surrogate pair (\\ud800 to \\udfff), which is no character.") from error
