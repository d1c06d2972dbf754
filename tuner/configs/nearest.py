"""Suggest the names nearest to a misspelt one."""

from collections.abc import Iterable


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A question with the names most like `name`; empty where none is like it."""
    import difflib

    close = difflib.get_close_matches(name, sorted(set(allowed)), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence for the end of an error message: the names like `name`, or all of them where none is like it."""
    names = sorted(set(allowed))
    return did_you_mean(name, names) or f"Allowed: {', '.join(names) or 'nothing'}."
