"""What the content of a shard depends on, beside the data file: code and settings, as text to be hashed."""

import hashlib
import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pprint import pformat
from types import CodeType
from typing import Any

from tuner.errors import UserError

# Modules of this package that act before rows are read or after shards are written: a change in them changes none.
AFTER_SHARDS = (
    *("__init__", "build", "cache", "collate", "detection", "joining", "listing"),
    *("packing", "prepare", "sampler", "sources", "workers", "mixture", "contributions", "hub", "token_files"),
    *("windows", "streaming", "ahead", "ordering", "places", "packed", "buckets", "stages", "staged"),
    *("needles", "needle_file", "needle_grid", "json_schema"),
)

PLAIN = str | int | float | bool | list | tuple | dict | set | frozenset | None


def digest(ingredients: dict[str, Any]) -> str:
    """A directory name for a set of ingredients."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The ingredients that differ, with their values where a person can read them."""
    named = [key for key in after if before.get(key) != after[key]]
    short = {key: len(f"{before.get(key)}{after[key]}") < 40 for key in named}
    return [f"{key} ({before.get(key)} -> {after[key]})" if short[key] else key for key in named]


@cache
def code_digest() -> str:
    """Hash of the modules that turn rows into tokens: another version of them makes other shards."""
    modules = sorted(Path(__file__).parent.rglob("*.py"))
    sources = [file.read_bytes() for file in modules if file.stem not in AFTER_SHARDS]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def callable_digest(function: Callable[..., Any]) -> str:
    """Hash of a user's function: its text, what its closure holds, and what it uses of its own module."""
    return hashlib.sha256("\0".join(sorted(_texts(function, {}).values())).encode()).hexdigest()


def _texts(function: Callable[..., Any], seen: dict[str, str]) -> dict[str, str]:
    """Source text by name, of a function and of the functions and constants of its module that it names."""
    try:
        seen[f"{function.__module__}.{function.__qualname__}"] = inspect.getsource(function)
    except (OSError, TypeError, AttributeError) as error:
        raise UserError(
            f"data_format={function!r}: its source text is not to be found, so a change in it would go unseen. "
            "Give a function that is defined in a file."
        ) from error
    if not inspect.isfunction(function):  # a class or an instance of one: its text is all
        return seen
    used = dict(inspect.getclosurevars(function).nonlocals)
    used |= {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    for name, value in used.items():
        for inner in _leaves(value):
            own = inspect.isfunction(inner) and inner.__module__ == function.__module__
            if own and f"{inner.__module__}.{inner.__qualname__}" not in seen:
                _texts(inner, seen)
        if isinstance(value, PLAIN):
            seen[f"{function.__module__}.{name}"] = f"{name}={pformat(_named(value))}"
    return seen


def _leaves(value: Any) -> list[Any]:
    """What a constant holds, at any depth; of other values themselves."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


def _named(value: Any) -> Any:
    """A constant as it prints in every process: functions and objects in it by name, not by their address."""
    if isinstance(value, dict):
        return {repr(_named(key)): _named(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(repr(_named(inner)) for inner in value)
    if isinstance(value, list | tuple):
        return [_named(inner) for inner in value]
    return value if isinstance(value, PLAIN) else f"<{type(value).__name__} {getattr(value, '__qualname__', '')}>"


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
