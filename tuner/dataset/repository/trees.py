"""Rows of source trees: a row for each repository, its files in order, or several where it is large."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tuner.dataset.reading.rows import Row
from tuner.dataset.repository.kinds import as_text, foreign_content
from tuner.dataset.repository.listing import Found, Repository, mistake, repositories, told
from tuner.dataset.repository.order import in_order
from tuner.errors import UserError

PART_BYTES = 4 << 20  # of text in a row, a million tokens: tokenising takes about 80 times as much memory


class Digest(NamedTuple):
    """A hash of the files of a tree, how many are read, and how many are not, by reason."""

    sha256: str
    num_files: int
    left_out: Counter[str]


def tree_digest(root: Path) -> Digest:
    """What the rows of a tree depend on: paths and bytes, not times, not its place, not the order of listing.

    Raises:
        UserError: a tree that changes while it is read, or of which nothing is left.
    """
    whole = hashlib.sha256()
    found = repositories(root)
    names = [repository.root.name if len(found) > 1 else "" for repository in found]
    left_out: Counter[str] = Counter()
    num_files = 0
    for name, repository in zip(names, found):
        left_out += repository.left_out
        for file in repository.files:
            data = _read(repository.root, file)
            reason = foreign_content(file.path, data)
            left_out.update([reason] if reason else [])
            num_files += not reason
            named = [os.fsencode(name).hex(), file.path, hashlib.sha256(data).hexdigest()]
            whole.update(json.dumps(named).encode())
    if not num_files:
        raise nothing_left(root, left_out)
    return Digest(whole.hexdigest(), num_files, left_out)


def nothing_left(root: Path, left_out: Counter[str]) -> UserError:
    """What to say of a tree without a file to train on."""
    why = f": left out are {told(left_out)}" if left_out else ""
    return UserError(f"{root} holds no source file{why}. Name a directory of source code.")


def read_tree(root: Path) -> Iterator[tuple[Row, int]]:
    """The rows of a tree, in order of the repositories' names, each with the bytes of the files read by then.

    A row is {"files": [{"path":, "text":}, ...], "in_order": true}, of at most PART_BYTES, or of one file.

    Raises:
        UserError: a tree that changes while it is read, or of which nothing is left.
    """
    line = position = 0
    found = repositories(root)
    for repository in found:
        texts = _texts(repository)
        position += sum(file.size for file in repository.files)
        for paths in _parts(in_order(texts), {path: len(text.encode()) for path, text in texts.items()}):
            line += 1
            files = [{"path": path, "text": texts[path]} for path in paths]
            yield Row(line, json.dumps({"files": files, "in_order": True}, ensure_ascii=False).encode()), position
    if not line:
        raise nothing_left(root, sum((repository.left_out for repository in found), Counter()))


def _texts(repository: Repository) -> dict[str, str]:
    texts = {}
    for file in repository.files:
        data = _read(repository.root, file)
        if not foreign_content(file.path, data):
            texts[file.path] = as_text(data)
    return texts


def _parts(paths: list[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """Files in order, in runs of at most PART_BYTES."""
    part: list[str] = []
    size = 0
    for path in paths:
        if part and size + sizes[path] > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(path)
        size += sizes[path]
    if part:
        yield part


def _read(root: Path, file: Found) -> bytes:
    """The bytes of a file that is still the one that was listed, and no link that has taken its place."""
    path = root / file.path
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            data = stream.read()
            status = os.fstat(descriptor)
    except OSError as error:
        raise mistake(path, error) from error
    now = Found(file.path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if now != file or len(data) != file.size:
        raise UserError(f"{path} changed while its tree was being read. Start again once it is complete.")
    return data
