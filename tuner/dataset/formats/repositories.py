"""Source trees: the files of a repository, one behind the other in one document."""

import re
from collections.abc import Mapping
from typing import Any

from tuner.dataset.formats.fields import Row, field, objects, require
from tuner.dataset.repository.kinds import language
from tuner.dataset.repository.order import in_order


def repository(row: Row) -> dict[str, Any]:
    """{"files": [{"path": ..., "text": ...}, ...]}, or a directory: a tree of source code as one document.

    data_path names a directory, or a pattern of directories: each is a repository; one that has no file of its own, but
    directories, is a directory of repositories. README comes first, then other files without code, then code, each
    file behind those that it imports (Python, JavaScript and TypeScript, C and C++, Go, Java, Kotlin, Scala, Rust);
    cycles are broken by name. Each file is a path and a Markdown fence longer than any inside. A document longer than
    max_length is cut between files by too_long = "split". In a row, "in_order": true keeps the files as they are given.
    """
    files = objects(row, "files", "file")
    texts: dict[str, str] = {}
    for place, file in enumerate(files):
        path = field(file, "path", str, f"file {place}")
        require(path.isprintable() and path != "", f"'path' of file {place} to be a path", path)
        require(path not in texts, f"'path' of file {place} to be no other file's", path)
        texts[path] = field(file, "text", str, f"file {place}")
    paths = list(texts) if row.get("in_order") is True else in_order(texts)
    return {"texts": [fenced(path, texts) for path in paths]}


def fenced(path: str, texts: Mapping[str, str]) -> str:
    """A file as Markdown: its path, and its text between fences."""
    text = texts[path]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{path}\n{fence}{language(path)}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}\n\n"


REPOSITORY_EXAMPLE = {
    "files": [
        {"path": "main.py", "text": "from greeting import HELLO\n\nprint(HELLO)\n"},
        {"path": "greeting.py", "text": 'HELLO = "Hello"\n'},
        {"path": "README.md", "text": "Says hello.\n"},
    ]
}
