"""Which files of a source tree are read and in what language they are; why others are left out, by name or content."""

import re
from pathlib import PurePosixPath

MAX_FILE_BYTES = 1 << 20  # longer ones are data, whatever their names say
HEAD = 1000  # characters in which a file says that a program has written it
MINIFIED = 200  # characters in a line of code on average; people write 30 to 50
SMALL = 2000  # characters: in a file with less than that one long line means nothing

CODE = {
    ".py": "python", ".pyi": "python", ".pyx": "cython", ".js": "javascript", ".jsx": "jsx", ".mjs": "javascript",
    ".cjs": "javascript", ".ts": "typescript", ".tsx": "tsx", ".mts": "typescript", ".cts": "typescript",
    ".vue": "vue", ".svelte": "svelte", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp",
    ".hh": "cpp", ".hpp": "cpp", ".hxx": "cpp", ".inl": "cpp", ".ipp": "cpp", ".cu": "cuda", ".cuh": "cuda",
    ".go": "go", ".java": "java", ".kt": "kotlin", ".scala": "scala", ".rs": "rust", ".rb": "ruby", ".php": "php",
    ".cs": "csharp", ".swift": "swift", ".m": "objectivec", ".mm": "objectivec", ".lua": "lua", ".pl": "perl",
    ".pm": "perl", ".r": "r", ".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".mli": "ocaml", ".ex": "elixir",
    ".exs": "elixir", ".erl": "erlang", ".clj": "clojure", ".dart": "dart", ".zig": "zig", ".nim": "nim",
    ".sh": "bash", ".bash": "bash", ".zsh": "zsh", ".fish": "fish", ".ps1": "powershell", ".bat": "batch",
    ".sql": "sql", ".proto": "protobuf", ".thrift": "thrift", ".graphql": "graphql", ".css": "css", ".scss": "scss",
    ".less": "less", ".html": "html", ".htm": "html", ".asm": "asm", ".s": "asm", ".f90": "fortran", ".tf": "hcl",
    ".cmake": "cmake", ".el": "lisp", ".lisp": "lisp", ".scm": "scheme", ".vim": "vim", ".sol": "solidity",
    ".v": "verilog", ".sv": "systemverilog", ".vhd": "vhdl", ".tex": "tex",
}  # fmt: skip
PROSE = {
    ".md": "markdown", ".markdown": "markdown", ".rst": "rst", ".txt": "text", ".adoc": "asciidoc", ".org": "org",
    ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".json5": "json", ".ini": "ini", ".cfg": "ini",
    ".conf": "text", ".properties": "properties", ".xml": "xml", ".gradle": "groovy", ".mod": "text", ".in": "text",
    ".mk": "makefile", ".nix": "nix", ".bzl": "python",
}  # fmt: skip
BARE = {
    "readme": "text", "license": "text", "licence": "text", "copying": "text", "notice": "text", "authors": "text",
    "contributors": "text", "changelog": "text", "changes": "text", "news": "text", "history": "text",
    "install": "text", "todo": "text", "version": "text", "codeowners": "text", "makefile": "makefile",
    "gnumakefile": "makefile", "dockerfile": "dockerfile", "containerfile": "dockerfile", "gemfile": "ruby",
    "rakefile": "ruby", "procfile": "text", "jenkinsfile": "groovy", "build": "python", "workspace": "python",
}  # fmt: skip
LOCKS = {
    "package-lock.json", "npm-shrinkwrap.json", "pnpm-lock.yaml", "go.sum", "bun.lockb", "gradle.lockfile",
    "packages.lock.json", "package.resolved", "podfile.lock", "conan.lock", "go.work.sum", "lock.yaml",
}  # fmt: skip
FOREIGN = {
    "node_modules", "bower_components", "jspm_packages", "site-packages", "dist-packages", "vendor", "venv",
    "__pycache__", "__macosx",
}  # fmt: skip
WRITTEN_NAME = re.compile(
    r"(\.pb\.(go|cc|h)|_pb2(_grpc)?\.pyi?|\.g\.dart|\.freezed\.dart|\.designer\.cs|\.generated\.\w+)$"
)
WRITTEN_HEAD = re.compile(
    r"@generated\b|\bgenerated\b[^\n]{0,120}\bdo not (edit|modify)|\bdo not (edit|modify)\b[^\n]{0,120}\bgenerated\b",
    re.I,
)
MIN_NAME = re.compile(r"[.-]min\.(js|css|mjs|cjs|html)$|\.bundle\.js$|\.map$")


def foreign_directory(name: str) -> str:
    """Why a directory is not entered, '' where it is."""
    if name.startswith("."):
        return "hidden"
    return "of installed packages" if name.lower() in FOREIGN or name.endswith(".egg-info") else ""


def foreign_name(name: str, size: int) -> str:
    """Why a file is left out for its name or its size in bytes, '' where it is to be read."""
    low = name.lower()
    if not name.isprintable() or "`" in name:  # surrogates stand for bytes that are no UTF-8, and are not printable
        return "with names that are no plain text"
    if name.startswith("."):
        return "hidden"
    if low in LOCKS or low.endswith(".lock"):
        return "lock files"
    if MIN_NAME.search(low):
        return "minified"
    if WRITTEN_NAME.search(low):
        return "generated"
    if not language(name):
        return "of other kinds"
    return f"over {MAX_FILE_BYTES >> 20} MiB" if size > MAX_FILE_BYTES else ""


def foreign_content(path: str, data: bytes) -> str:
    """Why a file is left out for its bytes, '' where they are text that somebody wrote."""
    if b"\0" in data:
        return "binary"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "not UTF-8"
    if WRITTEN_HEAD.search(text[:HEAD]):
        return "generated"
    return "minified" if is_code(path) and len(text) > SMALL and len(text) > MINIFIED * (1 + text.count("\n")) else ""


def as_text(data: bytes) -> str:
    """UTF-8 without a byte order mark, lines ended by a newline alone."""
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def language(path: str) -> str:
    """The word behind a fence, by a file's name; '' for what is not read."""
    name = PurePosixPath(path)
    ending = name.suffix.lower()
    return CODE.get(ending) or PROSE.get(ending) or BARE.get(name.name.lower(), "")


def is_code(path: str) -> bool:
    """Whether a file belongs behind the documentation and settings."""
    return PurePosixPath(path).suffix.lower() in CODE
