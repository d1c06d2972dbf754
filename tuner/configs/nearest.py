"""Suggest the names nearest to a misspelt one."""

from collections.abc import Iterable


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence for the end of an error message: the names like `name`, or all of them where none is like it."""
    import difflib

    names = sorted(set(allowed))
    if not names:
        return "Nothing is allowed here."
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Allowed: {', '.join(names)}."
