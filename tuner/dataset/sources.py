"""The data files a user names, and digests of their content that are not taken twice."""

import glob
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tuner.dataset.cache import hash_file
from tuner.dataset.read import file_kind
from tuner.dataset.reading.stamps import check_unchanged, stamp
from tuner.demo.files import resolve
from tuner.errors import UserError
from tuner.nearest import did_you_mean

SETTLED_SECONDS = 2.0  # a file younger than this may change again without a new time stamp


def expand(path: str | list[str]) -> list[Path]:
    """Paths, globs and `demo:` names -> files, globs sorted. Raises UserError for what is missing, empty or unknown."""
    patterns = [path] if isinstance(path, str) else list(path)
    if not patterns:
        raise UserError("data_path is an empty list. Give at least one file.")
    files = [file for pattern in patterns for file in _expand_one(pattern)]
    twice = sorted({str(file) for file in files if files.count(file) > 1})
    if twice:
        raise UserError(f"data_path names these files more than once: {', '.join(twice)}. Name each file once.")
    for file in files:
        _check(file)
    return files


def content_digest(path: Path, record: dict[str, Any]) -> str:
    """sha256 of a file's bytes; out of `record` (see `read_record`) if the file is as it was then."""
    before = stamp(path)
    if record.get("stamp") == list(before):
        return str(record["sha256"])
    record.clear()
    began = time.time()
    digest = hash_file(path)
    check_unchanged(path, before)
    if began - max(before.mtime_ns, before.ctime_ns) / 1e9 > SETTLED_SECONDS:
        record.update(stamp=list(before), sha256=digest)
    return digest


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


def _expand_one(pattern: str) -> list[Path]:
    name = os.path.expanduser(resolve(pattern))
    if os.path.exists(name) or not glob.has_magic(name):
        return [Path(name)]
    found = sorted(Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not found:
        raise UserError(f"No file matches {pattern!r}. Check the pattern and the directory {os.getcwd()}.")
    return found


def _check(file: Path) -> None:
    if file.is_dir():
        raise UserError(f'{file} is a directory. Name its files, for example "{file / "*.jsonl"}".')
    if not file.is_file():
        raise UserError(f"There is no data file {file}.{_nearest(file)}")
    if not os.access(file, os.R_OK):
        raise UserError(f"{file} may not be read by this user. Change its permissions.")
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty. Expected: at least one row.")
    file_kind(file)


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f" There is no directory {file.parent} either."
    return did_you_mean(file.name, os.listdir(file.parent))
