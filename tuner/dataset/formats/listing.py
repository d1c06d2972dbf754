"""The formats as text for the terminal: a line for each and a row that it reads."""

import json
from collections.abc import Iterator

from tuner.dataset.formats.detection import SIGNS
from tuner.dataset.formats.known import EXAMPLES, FORMATS, UNTRAINED
from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

FOOTER = """\
Name one as data_format, in a config or as data_format=NAME. "auto" looks into the rows, says what they are and why.
A function of your own, row to {"messages": [...], "tools"?: [...]} or {"text": ...}, goes in the same place: as
module:function (my_rows:to_sample is to_sample in ./my_rows.py), or imported in a config.
`tuner list-formats NAME` shows a row over several lines, and what the format does with it."""


def overview() -> Iterator[str]:
    """Each format's name, its first line of documentation and an example row on one line."""
    for name, to_sample in FORMATS.items():
        summary = (to_sample.__doc__ or "").strip().partition("\n")[0]
        yield f"{name}: {summary}{' Not trained on yet.' if name in UNTRAINED else ''}"
        yield f"    {json.dumps(EXAMPLES[name], ensure_ascii=False)}"
    yield ""
    yield FOOTER


def details(name: str) -> Iterator[str]:
    """One format: its documentation, what "auto" knows it by, a row, and the sample that the row becomes."""
    if name not in FORMATS:
        raise UserError(f"There is no format {name}.{did_you_mean_or_all(name, FORMATS)}")
    documentation = [line.strip() for line in (FORMATS[name].__doc__ or "").strip().splitlines()]
    yield "\n".join([f"{name}: {documentation[0]}", *documentation[1:]])
    if name in UNTRAINED:
        yield UNTRAINED[name]
    yield f'"auto" knows it by {SIGNS[name].words}.'
    yield f"\nA row:\n{json.dumps(EXAMPLES[name], ensure_ascii=False, indent=2)}"
    yield f"\nThe sample:\n{json.dumps(FORMATS[name](EXAMPLES[name]), ensure_ascii=False, indent=2)}"
