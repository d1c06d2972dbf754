"""`tuner lint`: from data files, or a config that names them, to a report and an exit code."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tuner.config import PRESETS, loads, render
from tuner.dataset.format_choice import Format, choose_format, files_by_format
from tuner.dataset.formats import FORMATS
from tuner.dataset.formats.detection import AUTO
from tuner.dataset.formats.known import UNTRAINED
from tuner.dataset.read import Chunk, read_chunks
from tuner.dataset.reading.stamps import stamp
from tuner.dataset.rendering import Rendering
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.dataset.sources import find_sources
from tuner.dataset.workers import Workers, num_cores, progress_interval, travels
from tuner.errors import UserError
from tuner.lint.findings import Finding, Report, counted
from tuner.lint.rows import Linted, RowLinter
from tuner.lint.subject import NO_BOUND, Bound
from tuner.lint.together import MAX_OPEN_KEPT, TOGETHER, Facts, join
from tuner.new_files import open_new

SMALL_BYTES = 16 << 20  # checked sooner than worker processes have started
EXIT_CLEAN, EXIT_FOUND = 0, 2


class Target(NamedTuple):
    """What to check, and how training would read it; without a tokenizer no tokens are counted."""

    path: Any  # as `find_sources` takes it
    data_format: str | Format
    tokenizer: Any = None
    rendering: Rendering | None = None
    bound: Bound = NO_BOUND


def lint(
    data: Sequence[str],
    *,
    data_format: str | None = None,
    max_length: int | None = None,
    model: str | None = None,
    json_file: Path | None = None,
    limit: int = 5,
) -> int:
    """Check data files, or those of a config or preset (with name=value settings behind it); print what was found.

    Returns 0 if nothing is above a note, else 2. `data_format` and `max_length` win over a config's; `model` is a
    directory whose tokenizer counts tokens; `json_file` gets every finding and must not exist yet.

    Raises:
        UserError: files, settings or a config that cannot be read.
        KeyboardInterrupt: Ctrl-C, once what was read until then is reported.
    """
    target = find_target(data, data_format, model)
    if max_length is not None:
        target = target._replace(bound=target.bound._replace(max_length=max_length))
    if max_length is not None and target.tokenizer is None:
        raise UserError(f"--max-length {max_length} counts tokens, which needs a tokenizer: --model DIR.")
    grouped = files_by_format(target.data_format, find_sources(target.path, target.data_format))
    linters = [(row_linter(target, data_format), files) for data_format, files in grouped.items()]
    with ExitStack() as stack:
        report = Report(limit, stack.enter_context(open_new(json_file)) if json_file else None)
        num_rows, is_complete = check_files(linters, report)
    for line in report.lines():
        print(line)
    num_files = sum(len(files) for _, files in linters)
    done = f"{counted(num_rows, 'row')} of {counted(num_files, 'file')} checked"
    print(f"{done}." if report.counts else f"{done}, nothing found.")
    if not is_complete:
        print("Stopped by Ctrl-C: the rows behind these were not read, so the report is not complete.", flush=True)
        raise KeyboardInterrupt
    if target.tokenizer is None:
        print("Lengths in tokens were not checked: --model DIR names a tokenizer, --max-length N a bound.")
    return EXIT_CLEAN if report.is_clean else EXIT_FOUND


def find_target(data: Sequence[str], data_format: str | None, model: str | None) -> Target:
    """What the command line names: a config with settings, or data files."""
    if data[0] in PRESETS or data[0].endswith(".py"):
        target = target_of_config(data[0], data[1:])
    else:
        target = Target(list(data), AUTO)
    if data_format is not None:
        target = target._replace(data_format=data_format)
    if model is None:
        return target
    from tuner.model.tokenizer import build_tokenizer  # brings torch and transformers

    tokenizer = build_tokenizer(model)
    return target._replace(tokenizer=tokenizer, rendering=target.rendering or Rendering("auto"))


def target_of_config(name: str, settings: Sequence[str]) -> Target:
    """The data, format and tokenizer of a config; nothing of its model is looked at."""
    from tuner.check import DATA_PARTS, check
    from tuner.engine.assemble import Assembly

    pairs = [setting.partition("=") for setting in settings]
    if any(not equals for _, equals, _ in pairs):
        raise UserError(f"Behind a config come its settings, name=value; got {' '.join(settings)}.")
    config = loads(render(name, {key: value for key, _, value in pairs}), name)
    check(config, DATA_PARTS)
    node = config.train_dataloader.dataset.shards
    target = Assembly(config).build({**node, "type": as_target})
    assert isinstance(target, Target)
    return target


def as_target(
    path: Any,
    *,
    data_format: str | Format,
    chat_template: str | Rendering,
    tokenizer: Any,
    max_length: int,
    too_long: str = "truncate",
    **_: Any,
) -> Target:
    """Takes the place of `build_shards` in a config."""
    rendering = Rendering(chat_template) if isinstance(chat_template, str) else chat_template
    return Target(path, data_format, tokenizer, rendering, Bound(max_length, too_long))


def row_linter(target: Target, data_format: str | Format) -> RowLinter:
    """The checks for a target's files of one format, with an encoder where there is a tokenizer."""
    if isinstance(data_format, str) and data_format in UNTRAINED:  # there is nothing to encode, but much to check
        return RowLinter(FORMATS[data_format])
    _, to_sample = choose_format(data_format, [])
    if target.tokenizer is None or target.rendering is None:
        return RowLinter(to_sample)
    return RowLinter(to_sample, SampleEncoder.from_tokenizer(target.tokenizer, target.rendering), target.bound)


def check_files(linters: Sequence[tuple[RowLinter, Sequence[Path]]], report: Report) -> tuple[int, bool]:
    """Put what every check finds in its files into the report; returns the number of rows, and whether these are all.

    Ctrl-C ends the reading; the rows that were read are compared all the same.
    """
    names = [str(file) for _, files in linters for file in files]
    numbers = {name: number for number, name in enumerate(names)}
    facts: list[Facts] = []
    is_complete = True
    try:
        for file, its_facts in check_rows(linters, report):
            its_facts.rows["file"] = numbers[str(file)]
            facts.append(its_facts)
    except KeyboardInterrupt:
        is_complete = False
    joined = join(facts)
    for check, compare in TOGETHER.items():
        for row, problem in compare(joined, names):
            line = int(joined.rows["line"][row])
            report.add(Finding(names[joined.rows["file"][row]], line, check, *problem))
    return len(joined.rows), is_complete


def check_rows(linters: Sequence[tuple[RowLinter, Sequence[Path]]], report: Report) -> Iterator[tuple[Path, Facts]]:
    """Put what is found in single rows into the report; the facts of each chunk, with its file."""
    size = sum(stamp(file).size for _, files in linters for file in files)
    num_open = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="checking", mininterval=progress_interval()) as bar:
        for file, linted in chain.from_iterable(starmap(partial(linted_chunks, report, bar), linters)):
            add_all(linted, str(file), report)
            del linted.facts.open_answers[MAX_OPEN_KEPT - num_open :]
            num_open += len(linted.facts.open_answers)
            yield file, linted.facts


def linted_chunks(report: Report, bar: Any, linter: RowLinter, files: Sequence[Path]) -> Iterator[tuple[Path, Linted]]:
    """The chunks of some files, checked on as many processes as they are worth."""
    size = sum(stamp(file).size for file in files)
    num_workers = num_cores() if size > SMALL_BYTES and travels(linter, "Checking") else 1
    with Workers(linter, num_workers=num_workers) as workers:
        for file in files:
            position = 0
            for linted in workers.map(readable_chunks(file, report)):
                yield file, linted
                bar.update(linted.position - position)
                position = linted.position


def readable_chunks(file: Path, report: Report) -> Iterator[Chunk]:
    """The chunks of a file; where it cannot be read on, that is a finding and its end."""
    try:
        yield from read_chunks(file)
    except UserError as problem:
        report.add(Finding(str(file), 0, "unreadable", "error", str(problem)))


def add_all(linted: Linted, file: str, report: Report) -> None:
    """Put the findings of a chunk into the report."""
    for line, check, problem in linted.found:
        report.add(Finding(file, line, check, *problem))
