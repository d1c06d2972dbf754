"""Suggest the names nearest to a misspelt one, as the end of an error message."""

from collections.abc import Iterable


def close_names(word: object, allowed: Iterable[object], *, cutoff: float = 0.6) -> list[str]:
    """Up to three of `allowed` that resemble `word`, the closest first; `cutoff` is difflib's ratio, 1 for equal."""
    import difflib  # here, since --help and list-cfg misspell nothing

    return difflib.get_close_matches(str(word), sorted({str(name) for name in allowed}), n=3, cutoff=cutoff)


def did_you_mean(word: object, allowed: Iterable[object], *, cutoff: float = 0.6) -> str:
    """' Did you mean x or y?', or nothing where nothing is near."""
    close = close_names(word, allowed, cutoff=cutoff)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def did_you_mean_or_all(word: object, allowed: Iterable[object]) -> str:
    """`did_you_mean`, or ' Allowed: ' and every name where nothing is near."""
    names = sorted({str(name) for name in allowed})
    return did_you_mean(word, names) or f" Allowed: {', '.join(names) or 'nothing'}."


def nearest(word: object, allowed: Iterable[object], *, cutoff: float = 0.5) -> str:
    """' Nearest: 'x'.' where it is the allowed word that was expected, or nothing where nothing is near."""
    close = close_names(word, allowed, cutoff=cutoff)
    return f" Nearest: {close[0]!r}." if close else ""
