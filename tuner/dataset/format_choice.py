"""What `data_format` names: a format, one found by looking into the files ("auto"), or a function of one's own."""

import importlib
from collections.abc import Callable, Iterator, Sequence
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
from tuner.dataset.sources import Source
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


def files_by_format(data_format: str | Format, sources: Sequence[Source]) -> dict[str | Format, list[Path]]:
    """The files of each format: an entry's own `data_format` if it has one, else this; "auto" looks into each file.

    Files keep their order. A mistake in a format is told where the format is used (`choose_format`).
    """
    grouped: dict[str | Format, list[Path]] = {}
    for source in sources:
        given = data_format if source.data_format is None else source.data_format
        found = find_formats(source.files) if given == AUTO else {given: source.files}
        for name, files in found.items():
            grouped.setdefault(name, []).extend(files)
    return grouped


def find_format(files: list[Path]) -> str:
    """The one format of all files, see `find_formats`. Raises UserError also where they are in different ones."""
    found = find_formats(files)
    if len(found) > 1:
        told = ", ".join(f"{its_files[0]} is {name}" for name, its_files in found.items())
        raise UserError(f'data_format="auto": the files are in different formats: {told}. Give files of one format.')
    return next(iter(found))


def find_formats(files: list[Path]) -> dict[str, list[Path]]:
    """The format that the first rows of each file show, and the files of each, printed with the reason.

    Rows that cannot be read are passed over: their own error comes later. Raises UserError where a format is unknown or
    uncertain; it holds for every row of its file, so one in another is a bad row.
    """
    found: dict[str, list[Path]] = {}
    reasons: dict[str, str] = {}
    for file in files:
        detected, num_rows = _look_into(file)
        what = "the first row has" if num_rows == 1 else f"the first {num_rows:,} rows have"
        reasons.setdefault(detected.name, f"{what} {detected.why}")
        found.setdefault(detected.name, []).append(file)
    for name, its_files in found.items():
        others = f" (so {'is' if len(its_files) == 2 else 'are'} {len(its_files) - 1:,} more)" if its_files[1:] else ""
        print(f'{its_files[0]}: data_format = "{name}", for {reasons[name]}{others}')
    return found


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
