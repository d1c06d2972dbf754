"""The data files a user names, and digests of their content that are not taken twice."""

import glob
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tuner.dataset import hub
from tuner.dataset.cache import hash_file
from tuner.dataset.read import file_kind
from tuner.dataset.reading.stamps import Stamp, check_unchanged, stamp
from tuner.dataset.repository.listing import KIND as TREE
from tuner.dataset.repository.trees import tree_digest
from tuner.demo.files import resolve
from tuner.errors import UserError
from tuner.nearest import did_you_mean

DataPath = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
ENTRY_KEYS = ("path", "weight", "data_format")
ENTRY_WORDS = "dict(path=...) with weight=..., data_format=... or both"
SETTLED_SECONDS = 2.0  # a file younger than this may change again without a new time stamp


class Entry(NamedTuple):
    """An entry of data_path as it is written; a weight or a data_format only where it gives one of its own."""

    name: str
    paths: list[str]
    weight: float | None = None
    data_format: str | Callable[..., Any] | None = None


class Source(NamedTuple):
    """An entry of data_path: its files, and its own weight and data_format if it has them."""

    name: str
    weight: float | None
    files: list[Path]
    data_format: str | Callable[..., Any] | None = None


def expand(path: DataPath) -> list[Path]:
    """The files that `path` names, in order; see `find_sources`."""
    return [file for source in find_sources(path) for file in source.files]


def find_sources(path: DataPath, data_format: object = None) -> list[Source]:
    """Entries of data_path -> sources: paths, globs (sorted), `demo:` and `hub:` names, or dicts of ENTRY_KEYS.

    Where the data_format is "repository", an entry's own or else this, a path may be a directory, and a pattern names
    the directories that match it, if some do.
    Raises UserError for what is missing, empty, unknown or named twice, and for weights that cannot be shares.
    """
    sources, trees = [], set()
    for name, patterns, weight, own in map(parse_entry, as_entries(path)):
        are_trees = (own or data_format) == TREE
        files = [file for pattern in patterns for file in _expand_one(pattern, are_trees=are_trees)]
        sources.append(Source(name, weight, files, own))
        trees.update(files if are_trees else [])
    unweighted = [source.name for source in sources if source.weight is None]
    if unweighted and len(unweighted) < len(sources):
        raise UserError(
            f"data_path gives a weight to some sources and none to {', '.join(unweighted)}. Give all of them one, "
            "dict(path=..., weight=...), or none."
        )
    files = [file for source in sources for file in source.files]
    twice = sorted({str(file) for file in files if files.count(file) > 1})
    if twice:
        raise UserError(f"data_path names these files more than once: {', '.join(twice)}. Name each file once.")
    for file in files:
        try:
            _check(file, may_be_tree=file in trees)
        except OSError as error:  # a name too long, a directory that may not be entered
            raise UserError(f"{str(file)[:200]} cannot be looked at: {error.strerror}. Check the path.") from error
    return sources


def as_entries(path: object) -> list[Any]:
    """The entries of data_path. Raises UserError for what is neither one nor a list of some."""
    if isinstance(path, str | Mapping):
        return [path]
    if not isinstance(path, list | tuple):
        raise UserError(f"data_path = {path!r}. Expected: a path, {ENTRY_WORDS}, or a list of these.")
    if not path:
        raise UserError("data_path is an empty list. Give at least one file.")
    return list(path)


def parse_entry(entry: object) -> Entry:
    """What an entry of data_path says. Raises UserError for what is none; its data_format is looked at elsewhere."""
    if isinstance(entry, str):
        return Entry(entry, [entry])
    if not isinstance(entry, Mapping):
        raise UserError(f"data_path holds {entry!r}. Expected: a path, or {ENTRY_WORDS}.")
    unknown = [str(key) for key in entry if key not in ENTRY_KEYS]
    if unknown or "path" not in entry or len(entry) == 1:
        hint = did_you_mean(unknown[0], ENTRY_KEYS) if unknown else ""
        raise UserError(f"data_path has an entry with {sorted(map(str, entry))}. Expected: {ENTRY_WORDS}.{hint}")
    path, weight = entry["path"], entry.get("weight")
    paths = [path] if isinstance(path, str) else path
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(part, str) for part in paths):
        raise UserError(f"data_path has an entry with path={path!r}. Expected: a path or a list of paths.")
    if "weight" in entry and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf
    ):
        raise UserError(
            f"data_path gives {path} the weight {weight!r}. Expected: a number above 0; leave out what weighs nothing."
        )
    return Entry(", ".join(paths), list(paths), None if weight is None else float(weight), entry.get("data_format"))


def content_digest(path: Path, record: dict[str, Any]) -> str:
    """sha256 of a file's bytes, or of a tree's; out of `record` (see `read_record`) if all is as it was then."""
    before = stamp(path)
    if record.get("stamp") == list(before):
        return str(record["sha256"])
    record.clear()
    began = time.time()
    if path.is_dir():
        digest, num_files, left_out = tree_digest(path)
        record.update(num_files=num_files, left_out=left_out)
    else:
        digest = hash_file(path)
    check_unchanged(path, before)
    if is_settled(before, began):
        record.update(stamp=list(before), sha256=digest)
    return digest


def is_settled(file: Stamp, began: float) -> bool:
    """Whether the stamp of a file, read from the time `began` on, tells it from every later state of it."""
    return began - max(file.mtime_ns, file.ctime_ns) / 1e9 > SETTLED_SECONDS


def record_path(cache_dir: Path, path: Path) -> Path:
    """Where what is known of a data file is kept between runs."""
    return cache_dir / "sources" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def read_record(file: Path) -> dict[str, Any]:
    """What was known of a data file; nothing if there is no (whole) record."""
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Keep a record; readers see the old or the new one, never a half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(file)


def _expand_one(pattern: str, *, are_trees: bool) -> list[Path]:
    if pattern.startswith(hub.PREFIX):
        return [hub.fetch(pattern)]
    if not pattern or "://" in pattern:
        raise UserError(f"data_path names {pattern!r}. Expected: a file or a pattern; fetch what lies elsewhere first.")
    name = os.path.expanduser(resolve(pattern))
    if os.path.exists(name) or not glob.has_magic(name):
        return [Path(name)]
    matches = glob.glob(name, recursive=True)
    found = sorted(Path(match) for match in matches if are_trees and os.path.isdir(match))
    found = found or sorted(Path(match) for match in matches if os.path.isfile(match))
    if not found:
        raise UserError(f"No file matches {pattern!r}. Check the pattern and the directory {os.getcwd()}.")
    return found


def _check(file: Path, *, may_be_tree: bool) -> None:
    if file.is_dir() and may_be_tree:
        return
    if file.is_dir():
        raise UserError(
            f'{file} is a directory. Name its files, for example "{file / "*.jsonl"}"; a tree of source code is read '
            f'with data_format = "{TREE}".'
        )
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file} is a link to {os.readlink(file)}, which is not there. Mend the link.")
    if not file.exists():
        raise UserError(f"There is no data file {file}.{_nearest(file)}")
    if not file.is_file():
        raise UserError(f"{file} is a pipe, a socket or a device. Write what it gives to a file: it is read twice.")
    if not os.access(file, os.R_OK):
        raise UserError(f"{file} may not be read by this user. Change its permissions.")
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty. Expected: at least one row.")
    file_kind(file)


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f" There is no directory {file.parent} either."
    return did_you_mean(file.name, os.listdir(file.parent))
