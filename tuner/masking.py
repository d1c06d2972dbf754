"""Tokens and passwords in what is kept or shown of a run are masked here: in configs, settings and told failures."""

import ast
import io
import os
import re
import tokenize
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

MASK = "***"
MIN_LENGTH = 8  # of a value in the environment: a shorter one would mask words
CERTAIN = {"password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey"}
KEY_OF = {"api", "access", "private", "auth", "signing", "encryption", "account", "service"}
TOKEN_OF = {"api", "access", "auth", "hf", "hub", "huggingface", "github", "gitlab", "wandb", "bearer", "refresh"}
TOKEN_OF |= {"session", "slack", "openai", "security", "private", "secret"}
PARTS = re.compile(r"[^\W\d_]+")
BEFORE_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
RANDOM = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[\w+/=.~-]{16,}|[0-9a-f]{20,}|[0-9A-F]{20,}")
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bsk-(?=[\w-]*\d)[\w-]{16,}|\b[rs]k_live_\w{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}"
    r"|\bxox[abprs]-[\w-]{16,}|\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[\w-]{20,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z ]*PRIVATE KEY[A-Z ]*-----|\Z)"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?i:(?<=\bbearer )[\w.+/=~-]{8,})",
    re.DOTALL,
)
ASSIGNED = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)([\"']?\s?[=:]\s?[\"']?)([^\s\"',;&(){}\[\]]+)")


class Masked(NamedTuple):
    """A config's text without secrets, and where they stood: `line 3: hub_token`."""

    text: str
    places: list[str]


def mask(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without what looks like a token or password, and without those that the environment holds."""
    for value in sorted(secret_values(environment), key=len, reverse=True):
        text = text.replace(value, MASK)
    text = SHAPES.sub(MASK, text)
    return ASSIGNED.sub(lambda found: found[1] + found[2] + (MASK if hides(found[1], found[3]) else found[3]), text)


def mask_source(source: str, environment: Mapping[str, str] = os.environ) -> Masked:
    """The text of a config with its literal secrets replaced by `***`; every other byte stays. It must be valid Python.

    A literal is one by its own look, or by the name that it is given: api_key = "...", dict(password="...").
    """
    data = source.encode()
    starts = [0]
    for ended in data.splitlines(keepends=True):  # columns of `ast` are bytes in the lines that bytes.splitlines gives
        starts.append(starts[-1] + len(ended))
    found: list[tuple[int, int, bytes]] = []
    places = []
    for node, name in named_literals(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        value = str(node.value) if isinstance(node, ast.Constant) else data[start:end].decode()
        clean = MASK if name and hides(name, value) else mask(value, environment)
        if clean != value:
            found.append((start, end, repr(clean).encode()))
            places.append(f"line {node.lineno}: {name or 'a text'}")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        clean = mask(token.string, environment)
        if token.type == tokenize.COMMENT and clean != token.string:
            line = data[starts[token.start[0] - 1] : starts[token.start[0]]].decode()
            start = starts[token.start[0] - 1] + len(line[: token.start[1]].encode())
            found.append((start, start + len(token.string.encode()), clean.encode()))
            places.append(f"line {token.start[0]}: a comment")
    for start, end, written in sorted(found, reverse=True):  # from the end: places stay valid
        data = data[:start] + written + data[end:]
    return Masked(data.decode(), places)


def hides(name: str, value: str) -> bool:
    """Whether a value of that name is a secret: by the name alone, or because it also looks drawn at random."""
    if not value or value == MASK:
        return False
    words = words_of(name)
    pairs = list(pairwise(words))
    is_key = any(second == "key" and first in KEY_OF for first, second in pairs)
    is_token = any(second == "token" and first in TOKEN_OF for first, second in pairs)
    if is_key or is_token or not CERTAIN.isdisjoint(words):
        return True
    return bool(words) and words[-1] in ("key", "token") and RANDOM.fullmatch(value) is not None


def secret_values(environment: Mapping[str, str]) -> set[str]:
    """The values of variables such as HF_TOKEN or WANDB_API_KEY; paths of files that hold secrets are none."""
    return {
        value
        for name, value in environment.items()
        if len(value) >= MIN_LENGTH
        and not value.startswith(("/", "~", "."))
        and (hides(name, value) or not {"token", "key"}.isdisjoint(words_of(name)))
    }


def words_of(name: str) -> list[str]:
    """myApiKey, my_api_key, MY-API-KEY -> my, api, key."""
    return PARTS.findall(BEFORE_CAPITAL.sub("_", name).lower())


def named_literals(tree: ast.AST, name: str = "") -> Iterator[tuple[ast.Constant | ast.JoinedStr, str]]:
    """Every text in the code and the nearest name that it is given: of a variable, an argument or a key."""
    if isinstance(tree, ast.JoinedStr) or (isinstance(tree, ast.Constant) and isinstance(tree.value, str)):
        yield tree, name
        return
    if isinstance(tree, ast.Dict):
        for key, value in zip(tree.keys, tree.values):
            if key is not None:
                yield from named_literals(key, name)
            yield from named_literals(value, _text(key) or name)
        return
    # what is looked up, os.environ["HF_TOKEN"], is no value of the name that the result is given
    own = "" if isinstance(tree, (ast.Call, ast.Subscript)) else _name_of(tree) or name
    for child in ast.iter_child_nodes(tree):
        yield from named_literals(child, own)


def _name_of(node: ast.AST) -> str:
    """The name that a statement or an argument gives to what stands in it; empty for other nodes."""
    if isinstance(node, ast.keyword):
        return node.arg or ""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    if isinstance(target, ast.Subscript):
        return _text(target.slice)
    return target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""


def _text(node: ast.AST | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
