"""What `data_format` names: a format, one found by looking into the files ("auto"), or a function of one's own."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuner.dataset.fingerprint import callable_digest
from tuner.dataset.formats import FORMATS
from tuner.dataset.formats.detection import AUTO, NUM_ROWS, Detected, detect
from tuner.dataset.formats.known import UNTRAINED
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.formats.xtuner_turns import xtuner
from tuner.dataset.read import Row, read_chunks
from tuner.dataset.reading.strict_json import parse_row
from tuner.errors import UserError
from tuner.nearest import did_you_mean

Format = Callable[[dict[str, Any]], dict[str, Any]]
SAMPLE_KEYS = ("messages", "text", "ids", "conversation")


@dataclass(frozen=True)
class OwnFormat:
    """A user's function row -> sample, what it returns checked like any other row; XTuner's map functions will do."""

    function: Format

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError where the sample is none; what the function itself raises passes through."""
        sample = self.function(row)
        given = [key for key in SAMPLE_KEYS if key in sample] if isinstance(sample, dict) else []
        if len(given) != 1:
            raise UserError(
                'Expected the data_format function to return {"messages": [...], "tools"?: [...]} or {"text": ...}, '
                f"got {type(sample).__name__} {sample!r:.80}."
            )
        if given == ["conversation"]:
            return xtuner(sample)
        if given == ["messages"]:
            if not isinstance(sample["messages"], list):
                given_words = f"{sample['messages']!r:.80}"
                raise UserError(f"Expected 'messages' of the data_format function to be a list, got {given_words}.")
            return conversation(sample["messages"], sample.get("tools"))
        if given == ["text"] and not (isinstance(sample["text"], str) and sample["text"]):
            raise UserError(f"Expected 'text' of the data_format function to be some text, got {sample['text']!r:.80}.")
        return sample


def mistake_in(data_format: object) -> str | None:
    """What is wrong with a `data_format` that can be told without looking into the data; None where nothing is."""
    known = (AUTO, *FORMATS)
    allowed = f"allowed is one of {', '.join(known)}, or module:function, or a function row -> sample."
    if callable(data_format):
        return None
    if not isinstance(data_format, str):
        return allowed
    if data_format in UNTRAINED:
        return UNTRAINED[data_format]
    if ":" in data_format:
        try:
            load_function(data_format)
        except UserError as error:
            return str(error)
        return None
    return None if data_format in known else allowed + did_you_mean(data_format, known)


def choose_format(data_format: str | Format, files: list[Path]) -> tuple[str, Format]:
    """What identifies the format in a shard's key, and the function row -> sample itself.

    Raises UserError for an unknown name, rows that show no format, and a format that no method trains on.
    """
    name = find_format(files) if data_format == AUTO else data_format
    if (mistake := mistake_in(name)) is not None:
        raise UserError(f"data_format={name!r}: {mistake}")
    if isinstance(name, str) and name in FORMATS:
        return name, FORMATS[name]
    function = load_function(name) if isinstance(name, str) else name
    return callable_digest(function), OwnFormat(function)


def load_function(path: str) -> Format:
    """`module:function`, imported; a module in the current directory will do. Raises UserError where there is none."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{module_name!r} cannot be imported ({error}). Expected module:function, such as my_rows:to_sample for "
            "to_sample in ./my_rows.py."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{module_name} has no function {name!r}.{did_you_mean(name, names)}")
    return function


def find_format(files: list[Path]) -> str:
    """The format that the first rows of all files show, printed with the reason.

    Rows that cannot be read are passed over: their own error comes later. Raises UserError where the format is unknown,
    uncertain, or not the same in all files; the format holds for every row, so one in another is a bad row.
    """
    found: dict[str, Path] = {}
    for file in files:
        detected, num_rows = _look_into(file)
        if detected.name not in found:
            what = "the first row has" if num_rows == 1 else f"the first {num_rows:,} rows have"
            print(f'{file}: data_format = "{detected.name}", for {what} {detected.why}')
        found.setdefault(detected.name, file)
    if len(found) > 1:
        told = ", ".join(f"{file} is {name}" for name, file in found.items())
        raise UserError(f'data_format="auto": the files are in different formats: {told}. Give files of one format.')
    return next(iter(found))


def _look_into(file: Path) -> tuple[Detected, int]:
    rows = list(islice(_readable(file), NUM_ROWS))
    try:
        return detect(rows), len(rows)
    except UserError as error:
        raise UserError(f'data_format="auto": {file}: {error}') from None


def _readable(file: Path) -> Iterator[Any]:
    for chunk in read_chunks(file):
        for row in chunk.rows:
            if (content := _content(row)) is not None:
                yield content


def _content(row: Row) -> dict[str, Any] | None:
    try:
        return None if row.fault else parse_row(row.content)
    except UserError:
        return None
