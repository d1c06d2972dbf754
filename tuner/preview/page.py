"""Packs as one HTML page that needs nothing else: no script, no font, no address; whatever users wrote is escaped."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from tuner.preview.characters import Vocabulary
from tuner.preview.histograms import Histogram, png
from tuner.preview.samples import (
    DocumentView,
    Excerpt,
    PackView,
    Span,
    heading,
    notes,
    pack_heading,
    spans,
    tail_spans,
)

TAIL_TOKENS = 2_000  # shown of what was cut off
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0 0 .6rem; } h3 { font-size: .85rem; margin: 0; }
section { border: 2px solid var(--line); border-radius: 6px; margin: 1.2rem 0; padding: .7rem; }
article { border-left: 4px solid #2a7f4f; margin: .6rem 0; padding-left: .6rem; }
pre { font: 13px/1.6 ui-monospace, monospace; margin: .2rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.m, .t, .s, .c { border-radius: 2px; box-shadow: inset -1px 0 #8885; }
.t { background: #8fd6a3; color: #06250f; }
.s { color: #a0218f; font-weight: bold; }
.t.s { color: #7a1040; }
.c { background: #f3b0a8; color: #4a0d06; text-decoration: line-through; }
.r { background: #2457c5; border-radius: 3px; color: #fff; padding: 0 .3em; }
.w { background: #8a5a00; border-radius: 3px; color: #fff; padding: 0 .3em; }
.n { color: #888; font-size: .85rem; margin: .3rem 0; }
img { background: #fff; display: block; margin: .8rem 0; max-width: 100%; }
"""


def page(excerpts: Iterable[Excerpt], vocabulary: Vocabulary, histograms: Sequence[Histogram], *, title: str) -> str:
    """The whole page."""
    heads = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = [f"<h1>{escape(title)}</h1>", LEGEND]
    for pack, shown in excerpts:
        body += draw_pack(pack, vocabulary, shown)
    body += map(picture, histograms)
    return "\n".join(['<!DOCTYPE html>\n<html lang="en"><head>', *heads, "</head><body>", *body, "</body></html>\n"])


LEGEND = (
    '<p class="n">Point at a token for its id, its position in the document and its mark: '
    '<span class="t">trained</span> <span class="m">masked</span> <span class="s">special token</span> '
    '<span class="t s">trained special token</span> <span class="c">cut off by max_length</span> '
    '<span class="r">✂1</span> where the part of sequence-parallel rank 1 begins, '
    '<span class="w">×0.5</span> where labels weigh so much. '
    "⏎ ⇥ ␀ and ⟨U+200B⟩ stand for characters that are not seen; ⟨E4⟩ for a byte that is part of a character.</p>"
)


def draw_pack(pack: PackView, vocabulary: Vocabulary, shown: int) -> Iterator[str]:
    """A pack as a block, its documents inside."""
    yield f'<section class="pack"><h2>{escape(pack_heading(pack))}</h2>'
    for document in pack.documents[:shown]:
        yield draw_document(document, vocabulary, pack.cuts)
    yield from (f'<p class="n">{escape(note)}</p>' for note in notes(pack, shown))
    yield "</section>"


def draw_document(document: DocumentView, vocabulary: Vocabulary, cuts: Sequence[int]) -> str:
    """A document with a border of its own."""
    tokens = "".join(map(token, spans(document, vocabulary, cuts)))
    # a parser drops a line break that opens a <pre>, so one that nobody needs goes first
    text = f'<article class="document"><h3>{escape(heading(document))}</h3><pre>\n{tokens}'
    if document.tail is None:
        return f"{text}</pre></article>"
    if document.tail.problem:
        note = f"whether its end was cut is not known: {document.tail.problem}"
    else:
        text += "".join(map(cut_token, tail_spans(document, vocabulary, TAIL_TOKENS)))
        note = f"{len(document.tail.ids):,} tokens were cut off, for they go beyond max_length"
        note += f"; the first {TAIL_TOKENS:,} are shown" if len(document.tail.ids) > TAIL_TOKENS else ""
    return f'{text}</pre><p class="n">{escape(note)}</p></article>'


def token(span: Span) -> str:
    """One token, or those of one character."""
    kind = " ".join([("t" if span.trained else "m"), *(["s"] if span.special else [])])
    cut = "" if span.cut is None else f'<span class="r">✂{span.cut}</span>'
    weight = f'<span class="w">×{span.weight:g}</span>' if span.changed else ""
    mark = "trained" if span.weight == 1 else f"trained with weight {span.weight:g}" if span.trained else "masked"
    return cut + weight + _marked(span, kind, mark)


def cut_token(span: Span) -> str:
    """A token that training does not see."""
    return _marked(span, "c", "cut off")


def _marked(span: Span, kind: str, mark: str) -> str:
    ids = ", ".join(map(str, span.ids))
    note = f"id {ids} · position {span.position} · {mark}{' · special' if span.special else ''}"
    return f'<span class="{kind}" title="{escape(note)}">{escape(span.text)}</span>'


def picture(histogram: Histogram) -> str:
    """A histogram as an image within the page; its text is there for those who do not see it."""
    data = base64.b64encode(png(histogram)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(histogram.bars())}">'
