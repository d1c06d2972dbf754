"""Look at the fields of a row, with an error that says what is expected and what came."""

from collections.abc import Mapping
from typing import Any

from tuner.dataset.messages import RowError
from tuner.nearest import nearest

Row = Mapping[str, Any]


def require(holds: bool, what: str, got: object) -> None:
    """Raise "Expected {what}, got {got}." unless it holds; the value is written out only then, for it may be long."""
    if not holds:
        written = repr(got)
        raise RowError(f"Expected {what}, got {type(got).__name__} {written[:80]}{'...' if len(written) > 80 else ''}.")


def field(row: Row, key: str, kind: type, where: str = "the row") -> Any:
    """The value of a key that must be there and of this kind; RowError says what is missing or wrong, and where."""
    if key not in row:
        keys = sorted(map(str, row))
        raise RowError(f"Expected {key!r} in {where}, which has {keys}.{nearest(key, keys)}")
    value = row[key]
    require(isinstance(value, kind), f"{key!r} of {where} to be a {kind.__name__}", value)
    return value
