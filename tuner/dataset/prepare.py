"""Data files -> shards, each made once and opened at once ever after; the ledger is printed."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tuner.dataset.cache import build_once, one_at_a_time, writing
from tuner.dataset.documents import ON_BAD_ROW, TOO_LONG, EncodedChunk, RowEncoder
from tuner.dataset.fingerprint import changes, code_digest, digest
from tuner.dataset.format_choice import Format, choose_format, files_by_format, mistake_in
from tuner.dataset.ledger import Ledger
from tuner.dataset.messages import PARALLEL_TOOL_CALLS
from tuner.dataset.mixture import Share
from tuner.dataset.read import Chunk, file_kind, read_chunks
from tuner.dataset.reading.stamps import Stamp, check_unchanged, stamp
from tuner.dataset.rendering import LOSS_ON, Rendering
from tuner.dataset.repository.listing import told
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.dataset.shards import FORMAT_VERSION, Shards, ShardWriter, is_whole
from tuner.dataset.sources import (
    DataPath,
    Source,
    content_digest,
    find_sources,
    read_record,
    record_path,
    write_record,
)
from tuner.dataset.templates import TEMPLATE_NAMES
from tuner.dataset.workers import Workers, num_cores, progress_interval, travels
from tuner.demo.files import cache_root
from tuner.errors import UserError
from tuner.nearest import nearest

SMALL_BYTES = 4 << 20  # tokenised sooner than a worker process has started: there is one for each so many


def build_shards(
    path: DataPath,
    *,
    data_format: str | Format,
    chat_template: str | Rendering,
    tokenizer: Any,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "raise",
    cache_dir: str | Path | None = None,
) -> Shards:
    """Tokenise data files (see `find_sources`), or open what an earlier run has made of them.

    `data_format` is a key of FORMATS, "auto", module:function or a function row -> sample, for entries of `path` that
    have none of their own; `chat_template` is one of TEMPLATE_NAMES or a Rendering, which also says what is trained.
    Documents over `max_length` tokens are cut short, cut into pieces or dropped, as `too_long` says; a bad row stops
    the work or is written aside, as `on_bad_row` says.
    `cache_dir` is by default `shards` in $TUNER_CACHE or ~/.cache/tuner. Raises UserError for bad settings or data.
    """
    sources, preparations = choose_preparations(
        path, data_format, chat_template, tokenizer, max_length, too_long, on_bad_row, cache_dir
    )
    directories = {file: made for own, preparation in preparations for file, made in preparation.run(own).items()}
    files = [file for source in sources for file in source.files]
    shares = [Share(source.name, source.weight, len(source.files)) for source in sources if source.weight is not None]
    shards = Shards([directories[file] for file in files], files, shares)
    read, left_out = count_trees([record for own, made in preparations for record in made.trees(own)])
    shards.ledger = replace(shards.ledger, tree_files=read, left_out=left_out.total())
    print(shards.ledger.table(), flush=True)
    if not len(shards):
        why = shards.ledger.why_empty(preparations[0][1].rows.samples.rendering.loss_on)
        raise UserError(f"No document is left of {', '.join(map(str, files))}: {why}. See the token ledger above.")
    return shards


def choose_preparations(
    path: DataPath,
    data_format: str | Format,
    chat_template: str | Rendering,
    tokenizer: Any,
    max_length: int,
    too_long: str,
    on_bad_row: str,
    cache_dir: str | Path | None,
) -> tuple[list[Source], list[tuple[list[Path], "Preparation"]]]:
    """The files, and how those of each format become shards; arguments and errors are those of `build_shards`."""
    rendering = Rendering(chat_template) if isinstance(chat_template, str) else chat_template
    _check_settings(data_format, rendering, max_length, too_long, on_bad_row)
    sources = find_sources(path, data_format)
    samples = SampleEncoder.from_tokenizer(tokenizer, rendering)
    directory = Path(cache_dir).expanduser() if cache_dir is not None else cache_root() / "shards"
    preparations = []
    for given, files in files_by_format(data_format, sources).items():
        name, to_sample = choose_format(given, files)
        rows = RowEncoder(to_sample, samples, max_length, too_long, on_bad_row)
        settings = {"data_format": name, **asdict(rendering)}
        preparations.append((files, Preparation(rows, settings, directory, num_workers=num_cores())))
    return sources, preparations


class _Missing(NamedTuple):
    """A shard to make, and the state of its data file when its digest was asked for."""

    directory: Path
    ingredients: dict[str, Any]
    seen: Stamp


@dataclass(frozen=True)
class Preparation:
    """Makes the shards that are missing in `cache_dir`, with `rows` on at most `num_workers` processes."""

    rows: RowEncoder
    settings: dict[str, Any]
    cache_dir: Path
    num_workers: int

    def run(self, files: list[Path]) -> dict[Path, Path]:
        """One shard per file, so that another file or an edited one costs only itself: the directory of each.

        Of several processes that ask for the same, as the ranks of a run do, one makes what is missing.
        """
        work = digest({"files": [str(file.absolute()) for file in files], **self.settings, **self.fixed})
        with one_at_a_time(self.cache_dir, work) as tell:
            return self._run(files, tell)

    def _run(self, files: list[Path], tell: Callable[[str], None]) -> dict[Path, Path]:
        directories = []
        missing = {}
        for file in files:
            seen = stamp(file)
            ingredients = self._ingredients(file)
            directory = self.cache_dir / digest(ingredients)
            directories.append(directory)
            if not is_whole(directory):
                missing[file] = _Missing(directory, ingredients, seen)
        tell_trees(self.trees(files))
        if missing:
            self._make(missing, tell)
        for file, directory in zip(files, directories):
            _report_bad_rows(file, directory)
        return dict(zip(files, directories))

    def trees(self, files: list[Path]) -> list[dict[str, Any]]:
        """What was found out of the files that are source trees."""
        return [read_record(record_path(self.cache_dir, file)) for file in files if file.is_dir()]

    @property
    def fixed(self) -> dict[str, Any]:
        """What the content of every shard depends on beside `settings` and its rows."""
        fingerprint = self.rows.samples.encoder.fingerprint
        return {
            "tokenizer": fingerprint.tokenizer,
            "text of the chat template": fingerprint.template,
            "max_length": self.rows.max_length,
            "too_long": self.rows.too_long,
            "on_bad_row": self.rows.on_bad_row,
            "tuner's code": code_digest(),
            "shard format": FORMAT_VERSION,
        }

    def _ingredients(self, file: Path) -> dict[str, Any]:
        """All that the content of a file's shard depends on; the file is read for its digest only if it has changed."""
        place = record_path(self.cache_dir, file)
        with writing(place.parent):
            record = read_record(place)
        before = record.get("ingredients")
        ingredients = {
            "file content": content_digest(file, record),
            "file ending": file_kind(file),
            **self.settings,
            **self.fixed,
        }
        if before is not None and before != ingredients and not is_whole(self.cache_dir / digest(ingredients)):
            # the time before may have been another stage of the same run
            what = ", ".join(changes(before, ingredients))
            print(f"{file}: tokenised again; since the time before has changed: {what}")
        if before != ingredients or read_record(place) != record:
            with writing(place.parent):
                write_record(place, {**record, "ingredients": ingredients})
        return ingredients

    def _make(self, missing: dict[Path, _Missing], tell: Callable[[str], None]) -> None:
        size = sum(shard.seen.size for shard in missing.values())
        num_workers = min(self.num_workers, -(-size // max(1, SMALL_BYTES)))
        if num_workers > 1 and not travels(self.rows, "Tokenising"):
            num_workers = 1
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", mininterval=progress_interval())
        with bar, Workers(self.rows, num_workers=num_workers) as workers:
            for file, shard in missing.items():
                write = partial(_write, file=file, shard=shard, workers=workers, bar=bar, tell=tell)
                build_once(shard.directory, write, is_whole)


def _write(
    directory: Path,
    *,
    file: Path,
    shard: _Missing,
    workers: Workers[Chunk, EncodedChunk],
    bar: Any,
    tell: Callable[[str], None],
) -> None:
    writer = ShardWriter(directory)
    ledger, position = Ledger(), 0
    try:
        for chunk in workers.map(read_chunks(file)):
            if chunk.bad_rows and shard.ingredients["on_bad_row"] == "raise":
                check_unchanged(file, shard.seen)  # or the row was bad because it was half written
                raise bad_row_error(file, chunk)
            writer.append(chunk.block, chunk.bad_rows)
            ledger += chunk.ledger
            bar.set_postfix_str(f"{ledger.read.tokens:,} tokens", refresh=False)
            bar.update(chunk.position - position)
            position = chunk.position
            tell(f"{bar.n / max(1, bar.total):.0%} is tokenised, of {file.name} {ledger.read.tokens:,} tokens")
        check_unchanged(file, shard.seen)
        writer.close(ledger, shard.ingredients)
    finally:
        writer.abandon()


def tell_trees(records: list[dict[str, Any]]) -> None:
    """Say how many files of source trees are read, how many are left out and why, from the records of the trees."""
    if not records:
        return
    read, left_out = count_trees(records)
    others = f"; left out are {told(left_out)}" if left_out else ""
    print(f"source trees: {len(records):,}, of which {read:,} files are read{others}", flush=True)


def count_trees(records: list[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """Files of source trees that are read, and those that are not, by reason."""
    left_out: Counter[str] = sum((Counter(record.get("left_out")) for record in records), Counter())
    return sum(record.get("num_files", 0) for record in records), left_out


def bad_row_error(file: Path, chunk: EncodedChunk) -> UserError:
    """What to say of a chunk with a bad row where that stops the work."""
    bad = chunk.bad_rows[0]
    return UserError(
        f"{file}:{bad.row.line}: bad row: {bad.reason}\n"
        'Mend the row, or set on_bad_row = "skip" to leave such rows out; they are then counted and written to a file.'
    )


def _report_bad_rows(file: Path, directory: Path) -> None:
    skipped = json.loads((directory / "meta.json").read_bytes())["ledger"]["skipped"]
    if skipped:
        print(f"{file}: {skipped:,} bad rows skipped; they are in {directory / 'bad_rows.jsonl'}")
        print(f"  and why, line by line, in {directory / 'bad_rows.reasons.jsonl'}")


def _check_settings(
    data_format: str | Format, rendering: Rendering, max_length: int, too_long: str, on_bad_row: str
) -> None:
    mistake = mistake_in(data_format)
    problems = [f"data_format={data_format!r}: {mistake}"] if mistake else []
    for name, value, allowed in (
        ("chat_template", rendering.chat_template, TEMPLATE_NAMES),
        ("loss_on", rendering.loss_on, LOSS_ON),
        ("parallel_tool_calls", rendering.parallel_tool_calls, PARALLEL_TOOL_CALLS),
        ("too_long", too_long, TOO_LONG),
        ("on_bad_row", on_bad_row, ON_BAD_ROW),
    ):
        if value is not None and value not in allowed:
            problems.append(f"{name}={value!r} is not known. Allowed: {', '.join(allowed)}.{nearest(value, allowed)}")
    if max_length < 2:
        problems.append(f"max_length={max_length} leaves no token to predict. Give at least 2.")
    if problems:
        raise UserError("\n".join(problems))
