"""Which files of a tree a file imports, by the rules of its language as far as they can be read off the text.

What a rule does not see (search paths of build systems, aliases of bundlers, same-package names of Java) is no edge.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import PurePosixPath

SCRIPT_ENDINGS = ("", ".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".vue", ".svelte", ".mts", ".cts")
JVM_ENDINGS = (".java", ".kt", ".scala")

# What is never closed goes on to the end, so that no text takes long to search.
PYTHON_APART = re.compile(  # strings and comments, in which the word import means nothing
    r"""\"{3}(?:[^"\\]|\\.|"(?!""))*(?:\"{3}|\Z)|'{3}(?:[^'\\]|\\.|'(?!''))*(?:'{3}|\Z)|"""
    r"""\"(?:[^"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|\#[^\n]*""",
    re.S,
)
PYTHON_IMPORT = re.compile(r"\bimport\b[ \t]*(\([^)]*\)?|[^\n;]*)")
PYTHON_FROM = re.compile(r"\bfrom\b([.\w \t]*)$")
MOST_PARTS = 30  # of a dotted name
FROM_WIDTH = 500  # characters on the same line that may stand before `import`
C_APART = re.compile(r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`[^`]*`)|//[^\n]*|/\*.*?(?:\*/|\Z)""", re.S)
C_INCLUDE = re.compile(r"""^[ \t]*#[ \t]*(?:include|import)[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)""", re.M)
SCRIPT_IMPORT = re.compile(r"""(?:\bfrom|\bimport|\brequire)\s*\(?\s*["'](\.[^"'\n]*)["']""")
GO_IMPORT = re.compile(r"""^import\s+(?:\(([^)]*)\)?|(?:[\w.]+[ \t]+)?("[^"\n]+"))""", re.M)
GO_MODULE = re.compile(r"^module\s+(\S+)", re.M)
JVM_IMPORT = re.compile(r"^[ \t]*import\s+(?:static\s+)?([\w.]{1,500}?)(\.[*_])?[ \t]*(?:;|$|\bas\b)", re.M)
RUST_MODULE = re.compile(r"^[ \t]*(?:pub(?:\([^)\n]*\))?\s+)?mod\s+(\w+)\s*;", re.M)
RUST_USE = re.compile(r"\buse\s+((?:crate|self|super)\b[^;]*)")


class Tree:
    """The paths of a repository, asked in the ways that imports are resolved."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.files = set(texts)
        self.texts = texts
        self.directories: dict[str, list[str]] = defaultdict(list)  # with the files that lie in each
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for path in sorted(texts):
            self.directories[posixpath.dirname(path)].append(path)
            self.by_name[posixpath.basename(path)].append(path)
            for folder in _above(posixpath.dirname(path)):
                self.directories[folder] += []
        self.folders: dict[str, list[str]] = defaultdict(list)
        for folder in self.directories:
            self.folders[posixpath.basename(folder)].append(folder)
        self.go_modules = {
            module[1]: posixpath.dirname(path)
            for path in self.by_name["go.mod"]
            if (module := GO_MODULE.search(texts[path]))
        }

    def first(self, candidates: Iterable[str]) -> str | None:
        """The first of these paths that is a file."""
        return next((path for path in candidates if path in self.files), None)

    def ending_with(self, tail: str) -> list[str]:
        """The files whose paths end with these whole names."""
        return [path for path in self.by_name[posixpath.basename(tail)] if f"/{path}".endswith(f"/{tail}")]


def dependencies(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Of each file in a language with imports (path -> text of a whole tree), the other files that it imports."""
    tree = Tree(texts)
    found = {}
    for path, text in texts.items():
        if imported := IMPORTS.get(PurePosixPath(path).suffix.lower()):
            found[path] = {name for name in imported(path, text, tree) if name is not None} - {path}
    return found


def of_python(path: str, text: str, tree: Tree) -> Iterator[str | None]:
    """The modules that are named: `from a import b` is a/b.py where that is a file, else a.py or a/__init__.py."""
    own = posixpath.dirname(path)
    plain = PYTHON_APART.sub('""', text).replace("\\\n", " ")
    for statement in PYTHON_IMPORT.finditer(plain):
        begin = statement.start()
        before = PYTHON_FROM.search(plain[max(begin - FROM_WIDTH, plain.rfind("\n", 0, begin) + 1) : begin])
        source = "".join(before[1].split()) if before else ""
        words = [name.split() for name in statement[1].strip("() \t\n").replace("\n", " ").split(",")]
        named = [name[0] for name in words if name]
        if not source:
            for name in named:
                yield from (_absolute(own, name.split(".")[:size], tree) for size in _longest(name, own, tree))
            continue
        parts = source.strip(".").split(".") if source.strip(".") else []
        dots = len(source) - len(source.lstrip("."))
        base = own if dots else None
        for _ in range(dots - 1):
            base = posixpath.dirname(base or "")
        for name in named:
            yield _module(base, [*parts, name], own, tree) or _module(base, parts, own, tree)


def _longest(name: str, own: str, tree: Tree) -> list[int]:
    """How many parts of a dotted name lead to a file, at most; nothing where none does."""
    parts = name.split(".")[:MOST_PARTS]
    return next(([size] for size in range(len(parts), 0, -1) if _absolute(own, parts[:size], tree)), [])


def _module(base: str | None, parts: list[str], own: str, tree: Tree) -> str | None:
    return _absolute(own, parts, tree) if base is None else _python_file(base, parts, tree)


def _absolute(own: str, parts: list[str], tree: Tree) -> str | None:
    """As Python searches from the directory that holds the whole package, then in those above it and in src."""
    root = own
    while root and posixpath.join(root, "__init__.py") in tree.files:
        root = posixpath.dirname(root)
    for base in (*_above(root), "src"):
        place = posixpath.join(base, parts[0])
        if place in tree.directories or f"{place}.py" in tree.files or f"{place}.pyi" in tree.files:
            return _python_file(base, parts, tree)
    return None


def _python_file(base: str, parts: list[str], tree: Tree) -> str | None:
    place = posixpath.join(base, *parts)
    inside = posixpath.join(place, "__init__.py")
    return tree.first([inside, f"{inside}i", *((f"{place}.py", f"{place}.pyi", f"{place}.pyx") if parts else ())])


def of_c(path: str, text: str, tree: Tree) -> Iterator[str | None]:
    """Includes: beside the file, then from each directory above it and its include and src, then by a unique tail."""
    own = posixpath.dirname(path)
    for quoted, bracketed in C_INCLUDE.findall(_without_comments(text)):
        name = quoted or bracketed
        places = [join for base in _above(own) for join in (base, f"{base}/include", f"{base}/src")]
        found = tree.first(_normal(base, name) for base in places[0 if quoted else 1 :])
        tails = tree.ending_with(posixpath.normpath(name).lstrip("./")) if found is None else []
        yield tails[0] if len(tails) == 1 else found


def of_script(path: str, text: str, tree: Tree) -> Iterator[str | None]:
    """Relative names in import, export and require, with the endings and the index files that bundlers try."""
    for name in SCRIPT_IMPORT.findall(_without_comments(text)):
        place = _normal(posixpath.dirname(path), name)
        stem = place[: -len(ending)] if (ending := posixpath.splitext(place)[1]) in (".js", ".jsx", ".mjs") else place
        tried = [stem + ending for stem in (place, stem) for ending in SCRIPT_ENDINGS]
        yield tree.first([*tried, *(f"{place}/index{ending}" for ending in SCRIPT_ENDINGS[1:])])


def of_go(path: str, text: str, tree: Tree) -> Iterator[str | None]:
    """All files, but tests, of the packages that are imported out of the modules whose go.mod is in the tree."""
    del path
    for block, single in GO_IMPORT.findall(_without_comments(text)):
        for name in re.findall(r'"([^"\n]+)"', block or single):
            modules = [module for module in tree.go_modules if f"{name}/".startswith(f"{module}/")]
            if modules:
                module = max(modules, key=len)
                folder = posixpath.join(tree.go_modules[module], name[len(module) :].lstrip("/")).rstrip("/")
                inside = tree.directories.get(folder, [])
                yield from (file for file in inside if file.endswith(".go") and not file.endswith("_test.go"))


def of_jvm(path: str, text: str, tree: Tree) -> Iterator[str | None]:
    """The file of the class that is imported, or of the one around it; of a.b.* all files of such a directory."""
    for name, star in JVM_IMPORT.findall(_without_comments(text)):
        parts = name.split(".")
        if star:
            folder = "/".join(parts)
            places = [place for place in tree.folders[parts[-1]] if f"/{place}".endswith(f"/{folder}")]
            inside = [file for place in places for file in tree.directories[place]]
            yield from (file for file in inside if file.endswith(JVM_ENDINGS))
        sizes = range(len(parts), max(1, len(parts) - 3), -1)
        tails = ["/".join(parts[:size]) + ending for size in sizes for ending in JVM_ENDINGS]
        found = next((match for tail in tails if (match := tree.ending_with(tail))), [])
        yield max(found, key=lambda other: len(posixpath.commonprefix([path, other])), default=None)


def of_rust(path: str, text: str, tree: Tree) -> Iterator[str | None]:
    """`mod name;`, and `use` of crate, self and super, as far as its names are files."""
    own, name = posixpath.split(path)
    inside = own if name in ("mod.rs", "lib.rs", "main.rs") else posixpath.join(own, name[: -len(".rs")])
    crates = [
        base for base in _above(own) if {f"{base}/lib.rs".lstrip("/"), f"{base}/main.rs".lstrip("/")} & tree.files
    ]
    plain = _without_comments(text)
    for module in RUST_MODULE.findall(plain):
        yield _rust_file(inside, [module], tree)
    for used in RUST_USE.findall(plain):
        for parts in _spread("".join(re.sub(r"\bas\s+\w+", "", used).split())):
            base = {"crate": crates[0] if crates else own, "self": inside, "super": inside}[parts[0]]
            while parts and parts[0] in ("crate", "self", "super"):
                base = posixpath.dirname(base) if parts.pop(0) == "super" else base
            yield next(
                (
                    file
                    for size in range(min(len(parts), MOST_PARTS), 0, -1)
                    if (file := _rust_file(base, parts[:size], tree))
                ),
                None,
            )


def _rust_file(base: str, parts: list[str], tree: Tree) -> str | None:
    place = posixpath.join(base, *parts)
    return tree.first([f"{place}.rs", f"{place}/mod.rs"])


def _spread(used: str) -> Iterator[list[str]]:
    """`a::{b,c::d}` -> [a, b], [a, c, d]; braces inside braces are read as if they stood in the outer ones."""
    head, _, inner = used.partition("::{")
    for tail in inner.replace("{", "").replace("}", "").split(","):
        yield [part for part in f"{head}::{tail}".split("::") if part]


def _without_comments(text: str) -> str:
    """Text of a language with // and /* */; strings stay, for they name what is imported."""
    return C_APART.sub(lambda match: match[1] or " ", text)


def _above(folder: str) -> list[str]:
    """A directory, those above it, and the root, "" of all."""
    names = [name for name in folder.split("/") if name]
    return [*reversed(list(accumulate(names, posixpath.join))), ""]


def _normal(base: str, name: str) -> str:
    return posixpath.normpath(posixpath.join(base, name)).lstrip("/")


Imports = Callable[[str, str, Tree], Iterator[str | None]]
IMPORTS: dict[str, Imports] = {
    **dict.fromkeys((".py", ".pyi", ".pyx"), of_python),
    **dict.fromkeys(
        (".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".inl", ".ipp", ".cu", ".cuh", ".m", ".mm"), of_c
    ),
    **dict.fromkeys((".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".mts", ".cts", ".vue", ".svelte"), of_script),
    **dict.fromkeys(JVM_ENDINGS, of_jvm),
    ".go": of_go,
    ".rs": of_rust,
}
