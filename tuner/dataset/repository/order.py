"""The order of a tree's files in a document: README and its like, then code, each file behind those that it imports."""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from tuner.dataset.repository.imports import dependencies
from tuner.dataset.repository.kinds import is_code


def in_order(texts: Mapping[str, str]) -> list[str]:
    """The paths of these files: README, others without code, code in order of dependency; the same however given."""
    prose = sorted((path for path in texts if not is_code(path)), key=_importance)
    return prose + dependencies_first(dependencies(texts), filter(is_code, texts))


def dependencies_first(needed: Mapping[str, Iterable[str]], names: Iterable[str]) -> list[str]:
    """Each name behind those that it needs, unless they need it in turn; by name where there is a choice.

    A depth-first search from the first name on. Where names need each other in a cycle, the one that is reached first
    comes last of them: what it needs is looked for before it is written, and leads back to it.
    """
    found: dict[str, None] = {}
    entered: set[str] = set()
    everything = sorted(names)
    known = set(everything)
    for name in everything:
        path = [] if name in entered else [(name, iter(sorted(needed.get(name, ()))))]
        entered.add(name)
        while path:
            current, waiting = path[-1]
            following = next((other for other in waiting if other in known and other not in entered), None)
            if following is None:
                found[current] = None
                path.pop()
            else:
                entered.add(following)
                path.append((following, iter(sorted(needed.get(following, ())))))
    return list(found)


def _importance(path: str) -> tuple[bool, int, str]:
    name = PurePosixPath(path)
    return (name.stem.lower() != "readme", len(name.parts) if name.stem.lower() == "readme" else 0, path)
