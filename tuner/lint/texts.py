"""Checks of characters: marks of chat templates in plain text, control characters, text in the wrong encoding."""

import re
from collections.abc import Iterator

from tuner.dataset.chat_template import CHAT_TEMPLATES
from tuner.lint.findings import Problem, excerpt, note, warning
from tuner.lint.subject import Subject

MARK = re.compile(
    r"<\|\w{2,40}\|>|\[UNUSED_TOKEN_\d+\]|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^<>｜\n]{1,40}｜>|<eo[hmac]>"
    r"|\A\s*<s>|</s>\s*<s>|</s>\s*\Z"  # elsewhere they are HTML: text that is struck out
)
QUOTED = re.compile(r"```.*?(?:```|\Z)|(`{1,2})[^`\n]+\1", re.DOTALL)
QUOTES = ('""', "''", "“”", "‘’", "「」", "《》")
PAIRS = {
    **{template.before_role: template.turn_end for template in CHAT_TEMPLATES.values()},
    **{"[INST]": "[/INST]", "<<SYS>>": "<</SYS>>", "<start_of_turn>": "<end_of_turn>"},
    "<|action_start|>": "<|action_end|>",
}
CONTROL = re.compile(  # a form feed alone on its line is a page break, common in source code
    r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffe\uffff]|(?<!\n)\x0c|\x0c(?!\n)"
)
HIDDEN = re.compile(
    r"[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069]|(?<=[A-Za-z0-9])[\u200c\u200d](?=[A-Za-z0-9])"
)
# What UTF-8 looks like when it is read byte by byte as Windows-1252 or Latin-1: a leading byte, then the others.
AS_CP1252 = {bytes([code]).decode("cp1252", errors="ignore") or chr(code): code for code in range(0x80, 0xC0)}
AS_CP1252 |= {chr(code): code for code in range(0x80, 0xC0)}
CONTINUATION = "[" + "".join(map(re.escape, AS_CP1252)) + "]"
MISREAD = re.compile(
    f"(?:[\u00c2-\u00df]{CONTINUATION}|[\u00e0-\u00ef]{CONTINUATION}{{2}}|[\u00f0-\u00f4]{CONTINUATION}{{3}})+"
)
ALL_PUNCTUATION = re.compile("[^“”‘’…–—«»\u00a0][“”‘’…–—«»\u00a0]+")  # French: é, a space that does not break, »


def special_text(subject: Subject) -> Iterator[Problem]:
    """Marks of a chat template written out in a text."""
    for text in subject.texts:
        marks = list(MARK.finditer(text.content)) if may_have_marks(text.content) else []
        if not marks:
            continue
        quoted = [span.span() for span in QUOTED.finditer(text.content)]
        bare = [mark for mark in marks if not _is_quoted(mark, quoted)]
        first = (bare or marks)[0]
        shown = excerpt(text.content, first.start(), first.end(), around=12)
        told = f"{text.where} holds {first.group().strip()!r} as text, {shown}"
        if bare:
            yield warning(f"{told}: harmless here, but a template was probably applied already. Give the raw messages.")
        else:
            yield note(f"{told}. It is encoded as the letters it is.")


def _is_quoted(mark: re.Match[str], spans: list[tuple[int, int]]) -> bool:
    """Whether a mark is spoken of: it stands in code, or has quotation marks around it."""
    around = mark.string[max(0, mark.start() - 1) : mark.start()] + mark.string[mark.end() : mark.end() + 1]
    return around in QUOTES or any(start <= mark.start() < end for start, end in spans)


def may_have_marks(text: str) -> bool:
    """A quick look: every mark has one of these."""
    return "<" in text or "[" in text


def missing_end(subject: Subject) -> Iterator[Problem]:
    """Turns that are marked in the text itself and of which one has no end."""
    for text in subject.texts:
        if not may_have_marks(text.content):
            continue
        prose = QUOTED.sub("", text.content) if "`" in text.content else text.content
        for start, end in PAIRS.items():
            begun, ended = prose.count(start), prose.count(end)
            if begun > ended:
                yield warning(
                    f"{text.where} has {begun} {start!r} and {ended} {end!r}: the model would not learn to stop there."
                    " Give the raw messages, or complete the marks."
                )


def control_characters(subject: Subject) -> Iterator[Problem]:
    """Characters that nobody sees."""
    for text in subject.texts:
        if text.content.isprintable():  # none of them is, nor is the end of a line
            continue
        found = CONTROL.search(text.content)
        if found:
            shown = excerpt(text.content, found.start(), found.end(), around=12)
            yield warning(f"{text.where} has the control character {_code(found)} in {shown}. Remove it.")
        found = HIDDEN.search(text.content)
        if found:
            shown = excerpt(text.content, found.start(), found.end(), around=12)
            told = f"{text.where} has the invisible character {_code(found)} in {shown}. Remove it, unless it is meant."
            yield warning(told) if text.role == "assistant" else note(told)


def _code(found: re.Match[str]) -> str:
    return f"U+{ord(found.group()):04X}"


def mojibake(subject: Subject) -> Iterator[Problem]:
    """Text in UTF-8 that somebody read as Latin-1 or Windows-1252, and characters that were lost in decoding."""
    for text in subject.texts:
        found = misread(text.content)
        if found:
            wrong, meant = found
            yield warning(
                f"{text.where} has {wrong!r}, probably {meant!r} read in the wrong encoding. Read the source as UTF-8."
            )
        if "\ufffd" in text.content:
            place = text.content.index("\ufffd")
            shown = excerpt(text.content, place, place + 1, around=12)
            yield warning(f"{text.where} has U+FFFD, which stands for a lost character, in {shown}. Read it anew.")


def misread(text: str) -> tuple[str, str] | None:
    """The first misread piece and what it was meant to be; None where there is none."""
    if text.isascii():
        return None
    for found in MISREAD.finditer(text):
        piece = found.group()
        data = bytes(AS_CP1252.get(character) or ord(character) for character in piece)
        try:
            meant = data.decode()
        except UnicodeDecodeError:
            continue
        is_usual = piece[0] in "ÂÃ" or len(data) > 2
        if is_usual and (piece == "Â\u00a0" or not ALL_PUNCTUATION.fullmatch(piece)):
            return piece, meant
    return None
