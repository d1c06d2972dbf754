"""Packs for the terminal: in colour, or with brackets where there is none."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

from tuner.preview.characters import Vocabulary
from tuner.preview.samples import (
    DocumentView,
    PackView,
    Span,
    heading,
    notes,
    pack_heading,
    spans,
    tail_spans,
)

TAIL_TOKENS = 200  # shown of what was cut off
RESET = "\x1b[0m"
INDENT = "│ "


class Look(NamedTuple):
    """How a kind of token looks: two shades in turn, so that neighbours are told apart, and brackets without colour."""

    shades: tuple[str, str]
    opening: str
    closing: str


LOOKS: dict[str, Look] = {
    "trained": Look(("38;5;231;48;5;22", "38;5;231;48;5;28"), "⟦", "⟧"),
    "masked": Look(("38;5;252;48;5;236", "38;5;252;48;5;239"), "", ""),
    "special": Look(("1;38;5;213;48;5;236", "1;38;5;213;48;5;239"), "«", "»"),
    "trained special": Look(("1;38;5;229;48;5;22", "1;38;5;229;48;5;28"), "«", "»"),
    "cut": Look(("9;38;5;231;48;5;88", "9;38;5;231;48;5;124"), "⟪cut: ", "⟫"),
}
CUT_SIGN = "⟨✂{}⟩"
WEIGHT_SIGN = "⟨×{:g}⟩"


def legend(*, colour: bool, cuts: bool) -> str:
    """What the marks mean, those of sequence-parallel cuts where there are any."""
    if colour:
        words = "  ".join(_painted(name, look.shades[0]) for name, look in LOOKS.items())
    else:
        words = "⟦trained⟧  masked  «special token»  ⟪cut: taken by max_length⟫"
    return f"{words}  {CUT_SIGN.format(1)} here begins the part of sequence-parallel rank 1" if cuts else words


def draw_pack(pack: PackView, vocabulary: Vocabulary, *, shown: int, colour: bool) -> Iterator[str]:
    """Lines of a pack: its border, and the first `shown` of its documents with theirs."""
    yield f"━━ {pack_heading(pack)} ━━"
    for place, document in enumerate(pack.documents[:shown]):
        yield f"{'├' if place else '┌'}─ {heading(document)}"
        yield from (f"{INDENT}{line}" for line in draw_document(document, vocabulary, pack.cuts, colour=colour))
    yield from (f"├─ {note}" for note in notes(pack, shown))
    yield "└─"


def draw_document(
    document: DocumentView, vocabulary: Vocabulary, cuts: Iterable[int] = (), *, colour: bool
) -> list[str]:
    """The document's text in lines, its tokens marked."""
    draw = _in_colour if colour else _in_brackets
    text = draw(spans(document, vocabulary, tuple(cuts)))
    if document.tail is not None:
        text += _draw_tail(document, vocabulary, colour=colour)
    return text.removesuffix("\n").split("\n")


def _draw_tail(document: DocumentView, vocabulary: Vocabulary, *, colour: bool) -> str:
    assert document.tail is not None
    if document.tail.problem:
        return f"\n(whether its end was cut is not known: {document.tail.problem})"
    shown = tail_spans(document, vocabulary, TAIL_TOKENS)
    text = "".join(span.text if colour else _bracketed(span) for span in shown)
    rest = len(document.tail.ids) - TAIL_TOKENS
    text += f" ... and {rest:,} tokens more" if rest > 0 else ""
    note = f"\n({len(document.tail.ids):,} tokens were cut off, for they go beyond max_length)"
    look = LOOKS["cut"]
    return (_painted(text, look.shades[0]) if colour else f"{look.opening}{text}{look.closing}") + note


def _in_colour(shown: Iterable[Span]) -> str:
    parts = []
    for place, span in enumerate(shown):
        parts.append(_signs(span))
        parts.append(_painted(span.text, LOOKS[_kind(span)].shades[place % 2]))
    return "".join(parts)


def _in_brackets(shown: Iterable[Span]) -> str:
    """Neighbours that are trained share a pair of brackets, unless a cut lies between them."""
    parts = []
    for trained, group in groupby(shown, key=lambda span: span.trained):
        text = "".join(map(_bracketed, group))
        parts.append(f"{LOOKS['trained'].opening}{text}{LOOKS['trained'].closing}" if trained else text)
    return "".join(parts)


def _bracketed(span: Span) -> str:
    look = LOOKS["special"]
    return _signs(span) + (f"{look.opening}{span.text}{look.closing}" if span.special else span.text)


def _signs(span: Span) -> str:
    """What is told before a span: that a rank's part begins, that its labels weigh more or less than others."""
    cut = "" if span.cut is None else CUT_SIGN.format(span.cut)
    return cut + (WEIGHT_SIGN.format(span.weight) if span.changed else "")


def _kind(span: Span) -> str:
    if span.special:
        return "trained special" if span.trained else "special"
    return "trained" if span.trained else "masked"


def _painted(text: str, codes: str) -> str:
    """Colour up to the end of each line, since some terminals would fill what is behind it."""
    return "\n".join(f"\x1b[{codes}m{line}{RESET}" if line else "" for line in text.split("\n"))


def wants_colour(asked: bool | None, *, is_terminal: bool, environment: Mapping[str, str]) -> bool:
    """`--color` or `--no-color` decides; else colour is for terminals, unless NO_COLOR is set (no-color.org)."""
    return asked if asked is not None else is_terminal and not environment.get("NO_COLOR")
