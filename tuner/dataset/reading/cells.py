"""Cells of a table to the JSON of a row."""

import datetime
import decimal
import json
import math
import uuid
from typing import Any

from tuner.dataset.reading.rows import Row, bounded
from tuner.dataset.reading.strict_json import loads
from tuner.errors import UserError

# columns whose text is JSON where it is an array or an object: a table has no other way to hold a list of messages
JSON_COLUMNS = frozenset({
    *("messages", "conversation", "conversations", "history", "tools", "chosen", "rejected"),
    *("tokens", "input_ids", "labels", "loss_mask"),
})  # fmt: skip
WRITTEN = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)


def row_of_cells(number: int, cells: dict[str, Any]) -> Row:
    """A row of a table as a JSON row; what is no text, number, list or object makes it a faulty one.

    Cells without a value (null, and NaN, which tables write for it) are left out, at any depth.
    """
    try:
        clean = {name: _value(_parsed(name, cell), name) for name, cell in cells.items() if not _is_missing(cell)}
        return bounded(Row(number, json.dumps(clean, ensure_ascii=False).encode()))
    except UserError as error:
        return Row(number, json.dumps(cells, ensure_ascii=True, default=repr).encode(), str(error))


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _parsed(name: str, cell: Any) -> Any:
    """The list or object in the text of a column that is known for them; other text is text."""
    if name not in JSON_COLUMNS or not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return loads(cell)
    except UserError as error:
        if name in ("chosen", "rejected"):  # text in some files, a list of messages in others
            return cell
        raise UserError(f"column {name!r}: {error}") from error


def _value(cell: Any, name: str) -> Any:
    """A cell in the types of JSON. Raises UserError naming the column."""
    if isinstance(cell, str | int | float):
        return cell
    if isinstance(cell, dict):
        return {key: _value(part, name) for key, part in cell.items() if not _is_missing(part)}
    if isinstance(cell, list | tuple):
        return [None if _is_missing(part) else _value(part, name) for part in cell]
    if isinstance(cell, WRITTEN):
        return str(cell)
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"column {name!r} holds bytes that are no UTF-8 text. Leave the column out.") from error
    raise UserError(f"column {name!r} holds a {type(cell).__name__}. Expected: text, numbers, lists or objects.")
