"""Documents of plain text."""

from typing import Any

from tuner.dataset.formats.fields import Row, field, require


def text(row: Row) -> dict[str, Any]:
    """{"text": ...}: one document of plain text, trained from its first token to its end mark."""
    document = field(row, "text", str)
    require(document != "", "some text", document)
    return {"text": document}


TEXT_EXAMPLE = {"text": "Call me Ishmael."}
