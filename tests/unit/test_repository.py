"""Source trees as documents: order against `ast`, fences read back, what is left out, shards that follow content."""

import ast
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuner.dataset import sources
from tuner.dataset.chat_template import CHAT_TEMPLATES
from tuner.dataset.documents import fit
from tuner.dataset.formats import FORMATS
from tuner.dataset.ledger import Ledger
from tuner.dataset.prepare import build_shards
from tuner.dataset.read import read_chunks
from tuner.dataset.repository import listing, trees
from tuner.dataset.repository.imports import dependencies
from tuner.dataset.repository.order import dependencies_first, in_order
from tuner.dataset.shards import Shards
from tuner.dataset.sources import find_sources
from tuner.errors import UserError

PACKAGE = {
    "README.md": "A package.\n```python\nimport app\n```\n",
    "pyproject.toml": "[project]\n",
    "docs/README.md": "More.\n",
    "app/__init__.py": '"""import app.yak"""\nfrom app.zebra import run\n',
    "app/zebra.py": "from . import base, yak\nfrom .inner.deep import (\n    x,  # import nothing\n)\nimport os, re\n",
    "app/base.py": "VALUE = 'import app.zebra'\n",
    "app/yak.py": "def late():\n    from app import \\\n        base\n    import app.inner.deep as deep\n",
    "app/inner/__init__.py": "",
    "app/inner/deep.py": "from ...app import base\nif True: import app.cycle_a\n",
    "app/cycle_a.py": "import app.cycle_b\n",
    "app/cycle_b.py": "from app.cycle_a import x\n",
    "tools/helper.py": "import json\n",
    "tools/a_tool.py": "import helper\nfrom app import *\n",
}


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def imports_by_ast(path: str, texts: dict[str, str]) -> set[str]:
    """Modules of the tree that a file names, found by the parser of Python itself; roots are tree and folder."""
    modules = {}
    for name in texts:
        if name.endswith(".py"):
            parts = PurePosixPath(name).with_suffix("").parts
            modules[parts[:-1] if parts[-1] == "__init__" else parts] = name
    package = PurePosixPath(path).parent.parts
    found = set()
    for node in ast.walk(ast.parse(texts[path])):
        if isinstance(node, ast.Import):
            found |= {modules.get((*base, *alias.name.split("."))) for alias in node.names for base in ((), package)}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            parts = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {modules.get((*parts, alias.name)) or modules.get(parts) for alias in node.names}
    return {name for name in found if name} - {path}


def leads_to(needed: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = needed.get(waiting.pop(), set()) - found
        found |= fresh
        waiting += fresh
    return found


def test_every_module_comes_behind_those_it_imports_unless_they_import_it() -> None:
    order = in_order(PACKAGE)
    assert order[:3] == ["README.md", "docs/README.md", "pyproject.toml"]
    expected = {path: imports_by_ast(path, PACKAGE) for path in PACKAGE if path.endswith(".py")}
    assert dependencies(PACKAGE) == expected
    assert sum(map(len, expected.values())) == 12
    late = {(a, b) for a, needed in expected.items() for b in needed if order.index(b) > order.index(a)}
    assert late == {("app/cycle_b.py", "app/cycle_a.py")}, "the cycle is entered at its first name"


@pytest.mark.parametrize(
    ("files", "path", "expected"),
    [
        (
            {"src/a.ts": "import x from './b.js'; // from './no'\nexport * from '../lib'\nconst c = require('./c')"},
            "src/a.ts",
            ["src/b.ts", "lib/index.tsx", "src/c.jsx"],
        ),
        ({"m/main.c": '#include "../inc/x.h"\n/* #include "y.h" */\n# include <z/z.h>\n'}, "m/main.c",
         ["inc/x.h", "include/z/z.h"]),
        ({"go.mod": "module ex.com/m\n", "cmd/main.go": 'import (\n\t"fmt"\n\tp "ex.com/m/pkg/p"\n)\n'}, "cmd/main.go",
         ["pkg/p/one.go", "pkg/p/two.go"]),
        ({"s/com/a/Main.java": "package com.a;\nimport com.b.Tool;\nimport static com.b.Out.In.go;\nimport com.c.*;"},
         "s/com/a/Main.java", ["s/com/b/Tool.java", "s/com/b/Out.java", "s/com/c/One.kt"]),
        ({"src/lib.rs": "pub mod one;\nuse crate::two::{deep::X, Y};\nmod inline { use super::one; }"}, "src/lib.rs",
         ["src/one.rs", "src/two/mod.rs", "src/two/deep.rs"]),
    ],
    ids=["script", "c", "go", "jvm", "rust"],
)  # fmt: skip
def test_imports_of_other_languages_are_resolved_inside_the_tree(
    files: dict[str, str], path: str, expected: list[str]
) -> None:
    others = ["no.ts", "src/no.ts", "y.h", "m/y.h", "pkg/p/one_test.go", "s/com/b/Other.java", "src/three.rs"]
    texts = {**dict.fromkeys([*others, *expected], ""), **files}
    assert dependencies(texts)[path] == set(expected)
    order = in_order(texts)
    assert all(order.index(other) < order.index(path) for other in expected)


NAMES = st.sampled_from("abcdefgh")


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.sets(NAMES)), st.randoms())
def test_any_graph_is_put_in_one_order_that_breaks_only_cycles(needed: dict[str, set[str]], rng: random.Random) -> None:
    names = list("abcdefgh")
    order = dependencies_first(needed, names)
    assert sorted(order) == names
    for name in names:
        for other in needed.get(name, set()) - {name}:
            assert order.index(other) < order.index(name) or name in leads_to(needed, other)
    rng.shuffle(names)
    assert dependencies_first(dict(sorted(needed.items(), key=lambda _: rng.random())), names) == order


def read_back(text: str) -> dict[str, str]:
    """What a reader of Markdown finds: a path, a fence, lines up to the same fence."""
    found, lines = {}, text.split("\n")
    while any(lines):
        path, fence = lines.pop(0), re.match("`+", lines[0])
        assert fence
        assert len(fence[0]) >= 3
        lines.pop(0)
        end = lines.index(fence[0])
        found[path] = "".join(f"{line}\n" for line in lines[:end])
        assert lines[end + 1] == ""
        lines = lines[end + 2 :]
    return found


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["a.py", "b.md", "c/d.rs"]), st.text("`~x\n ", max_size=30), min_size=1))
def test_no_text_ends_its_own_fence(texts: dict[str, str]) -> None:
    files = [{"path": path, "text": text} for path, text in texts.items()]
    found = read_back("".join(FORMATS["repository"]({"files": files})["texts"]))
    assert found == {path: text + "\n" * (not text.endswith("\n")) for path, text in texts.items()}


def test_unclosed_comments_and_brackets_take_no_time_to_search() -> None:
    unclosed = {
        "a.c": "/* " * 200_000,
        "b.py": '"""' + "from " * 20_000,
        "e.py": "from " * 5_000,
        "c.go": "import (\n" * 2_000,
    }
    assert dependencies({**unclosed, "d.java": "import a" * 100_000}) == {path: set() for path in [*unclosed, "d.java"]}


HOSTILE: dict[str, str | bytes] = {
    "readme": "The root.\n", "keep.py": b"\xef\xbb\xbfx = 1\r\ny = 2\r", "poetry.lock": "x", "go.sum": "x",
    "a.min.js": "x", "packed.js": "var a=1;" * 400, "made.go": "// Code generated by x. DO NOT EDIT.\n",
    "photo.png": b"\x89", "nul.py": b"a\0b", "latin.py": b"# \xe9\n", "long.py": "x = 1\n" * 200_000, ".env": "KEY=1",
    ".git/config": "x", "node_modules/x/index.js": "x", "data.csv": "1,2\n", "prose.md": "word " * 1000,
}  # fmt: skip


def texts_of(root: Path) -> dict[str, str]:
    rows = [json.loads(row.content) for chunk in read_chunks(root) for row in chunk.rows]
    return {file["path"]: file["text"] for row in rows for file in row["files"]}


def test_what_nobody_wrote_is_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", HOSTILE)
    (tmp_path / "outside.py").write_text("secret = 1\n")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.py")
    (root / "odd\nname.py").write_text("x = 1\n")
    assert texts_of(root) == {"readme": "The root.\n", "keep.py": "x = 1\ny = 2\n", "prose.md": "word " * 1000}
    _, num_files, left_out = trees.tree_digest(root)
    assert num_files == 3
    assert left_out == {
        "lock files": 2, "minified": 2, "generated": 1, "of other kinds": 2, "binary": 1, "not UTF-8": 1, "links": 2,
        "over 1 MiB": 1, "hidden": 2, "of installed packages": 1, "pipes, sockets or devices": 1,
        "with names that are no plain text": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, besides the marks of the template."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(list(CHAT_TEMPLATES["internlm2"].special_tokens))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


Make = Callable[..., Shards]


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(sources, "SETTLED_SECONDS", -10.0)  # the trees of these tests are young

    def call(path: Any, **changes: Any) -> Shards:
        given = {
            "data_format": "repository",
            "max_length": 10_000,
            "too_long": "split",
            "cache_dir": tmp_path / "cache",
        }
        return build_shards(path, chat_template="internlm2", tokenizer=tokenizer, **{**given, **changes})

    return call


def documents(shards: Shards, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(shards.document(place).ids.tolist()) for place in range(len(shards))]


def test_a_long_tree_is_split_between_files_and_a_long_file_where_it_must(tmp_path, make, tokenizer) -> None:
    sizes = [100, 250, 40, 900, 30, 30, 500, 10]
    texts = {f"{place}.md": "x" * size for place, size in enumerate(sizes)}
    made = documents(make(str(write(tmp_path / "tree", texts)), max_length=400), tokenizer)
    whole = "".join(made)
    assert read_back(whole.removeprefix("<s>").removesuffix("</s>")) == {
        path: f"{text}\n" for path, text in texts.items()
    }
    assert max(map(len, (re.sub("</?s>", "-", text) for text in made))) <= 400
    heads = [[line[0] for line in re.findall(r"^\d\.md$", text.replace("<s>", ""), re.M)] for text in made]
    assert heads == [["0", "1"], ["2"], ["3"], [], ["4", "5"], ["6"], ["7"]]
    inside = [text for text in made if not re.match(r"(<s>)?\d\.md\n", text)]
    assert len(inside) == 3, "two more pieces of the file of 900, one more of that of 500"
    cut = make(str(tmp_path / "tree"), max_length=400, too_long="truncate")
    assert (cut.ledger.kept.documents, cut.ledger.kept.tokens) == (1, 400)
    assert cut.ledger.truncated.tokens == cut.ledger.read.tokens - 400


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4), st.integers(2, 50))
def test_pieces_are_the_longest_runs_of_whole_files(files: list[list[int]], max_length: int) -> None:
    lengths = np.array([sum(sizes) for sizes in files])
    borders = [np.cumsum(sizes)[:-1].tolist() for sizes in files]
    cuts, ledger = fit(lengths, np.ones(lengths.sum(), bool), max_length, "split", borders)
    expected, first = [], 0
    for sizes in files:
        room, size = max_length, 0
        for tokens in sizes:
            if size and size + tokens > max_length:
                expected.append(size)
                size = 0
            size += tokens
            while size > room:
                expected.append(room)
                size -= room
        expected.append(size)
        first += sum(sizes)
    assert (cuts.ends - cuts.starts).tolist() == [size for size in expected if size > 1], "one token has no label"
    (ledger + Ledger(rows=len(files))).check()


def test_marks_of_the_template_in_code_are_letters(tmp_path, make, tokenizer) -> None:
    shards = make(str(write(tmp_path / "tree", {"a.py": "x = '<|im_start|></s>'\n"})))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = shards.document(0).ids.tolist()
    assert [number for number in ids if number in special] == [ids[0], ids[-1]]
    assert "<|im_start|></s>" in tokenizer.decode(ids[1:-1])


def test_shards_follow_the_content_and_nothing_else(tmp_path, make, monkeypatch, capsys) -> None:
    files = {f"pkg/{name}.py": f"import pkg.{other}\n" for name, other in zip("abc", "bca")}
    root = write(tmp_path / "tree", files)
    first = make(str(root))
    assert "source trees: 1, of which 3 files are read" in capsys.readouterr().out
    before = root / "pkg/a.py"
    times = before.stat()
    before.write_text("import pkg.c\n")
    os.utime(before, ns=(times.st_atime_ns, times.st_mtime_ns))
    edited = make(str(root))
    assert edited.directories != first.directories, "same size and mtime, other bytes"
    before.write_text("import pkg.b\n")
    assert make(str(root)).directories == first.directories
    (root / "pkg/.hidden").write_text("x")
    assert make(str(root)).directories == first.directories
    assert "left out are 1 hidden" in capsys.readouterr().out
    (root / "pkg/new.py").write_text("")
    assert make(str(root)).directories != first.directories
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: Any) -> None:
            self._path = path

        def __enter__(self) -> list[Any]:
            with scandir(self._path) as entries:
                return sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(listing.os, "scandir", Backwards)
    again = make(str(write(tmp_path / "elsewhere/copy", dict(reversed(files.items())))), cache_dir=tmp_path / "other")
    names = {path.name for path in first.directories[0].iterdir()} - {"meta.json"}
    assert all(
        (again.directories[0] / name).read_bytes() == (first.directories[0] / name).read_bytes() for name in names
    )


def test_a_directory_of_directories_is_one_repository_each_and_large_ones_are_several_rows(
    tmp_path, make, monkeypatch
) -> None:
    root = write(tmp_path / "all", {"one/a.py": "a", "two/b.py": "b", "two/c.py": "c", ".x/y.py": "no"})
    assert [make(str(root)).source(place) for place in range(2)] == [f"{root}:1", f"{root}:2"]
    pattern = find_sources(f"{root}/*", "repository")
    assert [file.name for file in pattern[0].files] == ["one", "two"]
    monkeypatch.setattr(trees, "PART_BYTES", 1)
    assert [chunk.rows[0].line for chunk in read_chunks(root)] == [1, 2, 3]
    assert list(texts_of(root)) == ["a.py", "b.py", "c.py"]


def test_trees_that_cannot_be_read_are_one_message(tmp_path, make, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    tree = write(tmp_path / "tree", {"a.py": "x = 1\n", "b.py": "y = 1\n"})
    with pytest.raises(UserError, match=r"empty holds no source file. Name a directory of source code"):
        make(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"photos holds no source file: left out are 1 of other kinds"):
        make(str(write(tmp_path / "photos", {"a.png": "x"})))
    with pytest.raises(UserError, match=r'tree is a directory.*read with data_format = "repository"'):
        make(str(tree), data_format="text")
    with pytest.raises(UserError, match=r"There is no data file .*/tre\. Did you mean tree\?"):
        make(str(tmp_path / "tre"))
    opened = os.open

    def fails(with_error: Callable[[Path], None]) -> None:
        def call(path: Any, *arguments: Any, **others: Any) -> int:
            if str(path).endswith("b.py"):
                with_error(Path(path))
            return opened(path, *arguments, **others)

        monkeypatch.setattr(trees.os, "open", call)

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    fails(forbidden)
    with pytest.raises(UserError, match=r"b.py may not be read by this user. Change its permissions, or take it out"):
        make(str(tree))
    fails(lambda path: path.write_text("changed = 1\n") and None)
    with pytest.raises(UserError, match=r"b.py changed while its tree was being read"):
        make(str(tree))
    fails(lambda path: path.unlink())
    with pytest.raises(UserError, match=r"b.py was removed while its tree was being read"):
        make(str(tree))
