"""Find the place that a dotted path such as `model.llm.attention` names in a loaded config."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tuner.configs.literals import Setting, fit, write
from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Target(NamedTuple):
    """A place in the config, `parent[key]`, and the expression that names it in the file."""

    path: str
    expression: str
    parent: Any
    key: str | int

    @property
    def value(self) -> Any:
        """What stands there now; None for an argument that the config leaves at its default."""
        return self.parent.get(self.key) if isinstance(self.parent, Mapping) else self.parent[self.key]

    def fit(self, given: object) -> object:
        """`given` as a value of the type that stands there now; parts of the assembly cannot be replaced."""
        present = self.value
        if present is None:
            return fit(Setting(self.path, None, (), 0, 0, 0), given)
        if self.key == "type" or not isinstance(present, (bool, int, float, str, list, tuple)):
            raise UserError(f"{self.path} is a part of the assembly, not a value; copy the config and edit it there.")
        return fit(Setting(self.path, present, (type(present).__name__,), 0, 0, 0), given)


def find(config: Any, path: str) -> Target:
    """Keys of dicts, numbers in lists, and arguments that a `type` accepts; anything else is a UserError."""
    first, *rest = path.split(".")
    if first not in config:
        raise UserError(f"Unknown option {path}: the config has no {first}.{did_you_mean_or_all(first, config)}")
    target = Target(path, first, config, first)
    for name in rest:
        target = descend(target, name)
    return target


def descend(target: Target, name: str) -> Target:
    """One name further down the path."""
    node, where = target.value, f"Unknown option {target.path}"
    key: str | int = name
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise UserError(f"{where}: {target.expression} is a list; {name} is none of its {len(node)} places from 0.")
        key = int(name)
    elif isinstance(node, Mapping):
        allowed = {*node, *arguments(node)}
        if name not in allowed:
            raise UserError(f"{where}: {target.expression} has no {name}.{did_you_mean_or_all(name, allowed)}")
    else:
        raise UserError(f"{where}: {target.expression} is a {type(node).__name__}, with nothing below it.")
    return Target(target.path, f"{target.expression}[{write(key)}]", node, key)


def arguments(node: Mapping[str, Any]) -> set[str]:
    """Names that the `type` of an assembly node declares; nothing is known of a plain dict."""
    if "type" not in node:
        return set()
    try:
        return {parameter.name for parameter in parameters(node["type"]) if parameter.kind in NAMED}
    except ImportError as error:
        raise UserError(str(error)) from error


def parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a type takes; of a builtin that does not say so, anything."""
    try:
        return list(inspect.signature(target).parameters.values())
    except ValueError:
        return [inspect.Parameter("anything", inspect.Parameter.VAR_KEYWORD)]
