"""Config nodes to objects: every dict with a `type` is called with its other entries, from the inside out."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tuner.errors import UserError
from tuner.nearest import did_you_mean_or_all

Node = Any


def assemble(node: Node) -> Any:
    """Build one node on its own; `Assembly` builds several that share parts."""
    return Assembly({}).build(node)


class Assembly:
    """Builds nodes of one config; a node that has a name at the config's top level becomes one object.

    Config loaders copy dicts, so "the same dict" can only mean "equal to a named one": a recipe's `tokenizer` that
    stands in two places is built once, while equal nodes that were never given a name (the policy and the reference
    model of a preference recipe) stay two objects.
    """

    def __init__(self, config: Mapping[str, Node]) -> None:
        self._named = {name: plain(node) for name, node in config.items() if is_node(node)}
        self._built: dict[str, Any] = {}

    def build(self, node: Node) -> Any:
        """The object of a node; lists, tuples and dicts without a `type` are built part by part.

        Raises:
            UserError: an argument that the node's type does not know, or one it needs and was not given.
        """
        if isinstance(node, Mapping):
            return self._build_named(node) if is_node(node) else {key: self.build(part) for key, part in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(self.build(part) for part in node)
        return node

    def _build_named(self, node: Mapping[str, Node]) -> Any:
        own = plain(node)
        name = next((name for name, named in self._named.items() if named == own), None)
        if name is None:
            return self._call(node)
        if name not in self._built:
            self._built[name] = self._call(node)
        return self._built[name]

    def _call(self, node: Mapping[str, Node]) -> Any:
        target = node["type"]
        arguments = {key: part for key, part in node.items() if key != "type"}
        check_arguments(target, arguments)
        return target(**{key: self.build(part) for key, part in arguments.items()})


def is_node(value: Node) -> bool:
    """Whether a config value stands for an object to build."""
    return isinstance(value, Mapping) and callable(value.get("type"))


def plain(node: Node) -> Node:
    """A node as dicts and lists of its own: a lazily imported type compares equal only once it has been looked at."""
    if isinstance(node, Mapping):
        return {key: plain(part) for key, part in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(part) for part in node]
    return node


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise UserError unless `target(**arguments)` binds; said before anything is built."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # some built-in types have none; the call itself will say what is wrong
        return
    known = [name for name, parameter in signature.parameters.items() if parameter.kind in NAMED]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    for name in arguments:
        if name not in known and not takes_any:
            raise UserError(f"{target.__qualname__} has no argument {name!r}.{did_you_mean_or_all(name, known)}")
    missing = [name for name in known if name not in arguments and is_required(signature.parameters[name])]
    if missing:
        raise UserError(f"{target.__qualname__} needs {', '.join(missing)}. Add it to its dict in the config.")


NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a parameter has no default."""
    return parameter.default is inspect.Parameter.empty
