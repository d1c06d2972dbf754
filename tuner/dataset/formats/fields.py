"""Look at the fields of a row, with an error that says what is expected and what came."""

from collections.abc import Mapping
from typing import Any

from tuner.dataset.messages import RowError, read_json, shorten
from tuner.nearest import nearest

Row = Mapping[str, Any]
NO_TEXT = ("image", "images", "image_url", "audio", "audios", "video", "videos")


def require(holds: bool, what: str, got: object) -> None:
    """Raise "Expected {what}, got {got}." unless it holds; the value is written out only then, for it may be long."""
    if not holds:
        raise RowError(f"Expected {what}, got {type(got).__name__} {shorten(got)}.")


def field(row: Row, key: str, kind: type, where: str = "the row") -> Any:
    """The value of a key that must be there and of this kind; RowError says what is missing or wrong, and where."""
    if key not in row:
        keys = sorted(map(str, row))
        raise RowError(f"Expected {key!r} in {where}, which has {keys}.{nearest(key, keys)}")
    value = row[key]
    require(isinstance(value, kind), f"{key!r} of {where} to be a {kind.__name__}", value)
    return value


def text_alone(row: Row, where: str) -> None:
    """Raise RowError for pictures and sound, which no model here is given."""
    for key in NO_TEXT:
        if row.get(key):
            raise RowError(f"Expected text alone in {where}, got {key!r}: {shorten(row[key])}. Leave such rows out.")


def objects(row: Row, key: str, what: str, where: str = "the row") -> list[Row]:
    """The items of a list that must not be empty and holds objects alone; `what` names one of them."""
    items = field(row, key, list, where)
    require(bool(items), f"{key!r} to hold at least one {what}", items)
    for place, item in enumerate(items):
        require(isinstance(item, dict), f"{what} {place} to be an object", item)
    return items


def one_of(value: str, allowed: Mapping[str, str], what: str) -> str:
    """What `allowed` says of a word that must be among its keys."""
    if value not in allowed:
        raise RowError(
            f"Expected {what} to be one of {tuple(allowed)}, got {shorten(value)}.{nearest(value[:80], allowed)}"
        )
    return allowed[value]


def parsed(words: Any, what: str) -> Any:
    """A value that may be given as JSON text."""
    if not isinstance(words, str):
        return words
    try:
        return read_json(words)
    except RowError as error:
        raise RowError(f"Expected {what} to be JSON, got {shorten(words)} ({error}).") from None


def function_call(name: Any, arguments: Any, what: str) -> dict[str, Any]:
    """An OpenAI tool call; the arguments may be an object or its JSON text."""
    require(isinstance(name, str) and name != "", f"{what} to have a name", name)
    return {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
