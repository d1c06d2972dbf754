"""A chunk of rows -> findings in each, and the few facts of them that are compared once all are read."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tuner.dataset.documents import EncodedChunk, RowEncoder, parse_row
from tuner.dataset.read import Chunk, Row
from tuner.errors import UserError
from tuner.lint import answers, secrets, texts, tool_calls
from tuner.lint.findings import Problem, error, redact
from tuner.lint.subject import Size, Subject, from_refused, from_sample, size_of
from tuner.lint.together import Facts, facts_of

Check = Callable[[Subject], Iterable[Problem]]


def refused(subject: Subject) -> Iterator[Problem]:
    """Rows that training stops at, or leaves out under on_bad_row = "skip"."""
    if subject.refusal:
        yield error(subject.refusal)


CHECKS: dict[str, Check] = {
    "refused": refused,
    "empty-text": answers.empty_text,
    "cut-off": answers.cut_off,
    "missing-end": texts.missing_end,
    "loop": answers.loop,
    "tool-arguments": tool_calls.tool_arguments,
    "undeclared-tool": tool_calls.undeclared_tool,
    "result-without-call": tool_calls.result_without_call,
    "call-without-result": tool_calls.call_without_result,
    "role-order": tool_calls.role_order,
    "special-text": texts.special_text,
    "secret": secrets.secrets,
    "personal-data": secrets.personal_data,
    "language-mix": answers.language_mix,
    "control-character": texts.control_characters,
    "mojibake": texts.mojibake,
    "over-length": answers.over_length,
    "zero-loss": answers.zero_loss,
}


UNTRAINED = Size(0, 0, 0, (), None)  # of a row that is dropped because nothing of it is trained
FINDERS = (secrets.find_keys, secrets.find_personal)


class Located(NamedTuple):
    """A problem, the check that found it and the line its row begins on."""

    line: int
    check: str
    problem: Problem


class Linted(NamedTuple):
    """What a worker makes of a chunk; `position` is the chunk's."""

    found: list[Located]
    facts: Facts
    position: int


@dataclass(frozen=True)
class RowLinter:
    """Checks chunks of rows. `encoder` is None where there is no tokenizer; it must take documents of any length."""

    to_sample: Callable[[dict[str, Any]], dict[str, Any]]
    encoder: RowEncoder | None = None
    max_length: int | None = None

    def __call__(self, chunk: Chunk) -> Linted:
        """Every check on every row."""
        sizes, refusals = self._encoded(chunk)
        subjects = [
            self._subject(row, sizes.get(place), refusals.get(place, "")) for place, row in enumerate(chunk.rows)
        ]
        lines = [row.line for row in chunk.rows]
        found = [located for line, subject in zip(lines, subjects) for located in findings_in(subject, line)]
        return Linted(found, facts_of(subjects, lines), chunk.position)

    def _subject(self, row: Row, size: Size | None, refusal: str) -> Subject:
        raw = row.content.decode(errors="replace")
        content: Any = None
        if row.fault:
            return from_refused(content, raw, row.fault)
        try:
            content = parse_row(row.content)
            sample = self.to_sample(content)
        except UserError as problem:
            return from_refused(content, raw, str(problem))
        except Exception as problem:  # a user's function may raise anything
            return from_refused(content, raw, f"the data_format function raised {type(problem).__name__}: {problem}")
        return from_refused(sample, raw, refusal) if refusal else from_sample(sample, raw, size)

    def _encoded(self, chunk: Chunk) -> tuple[dict[int, Size], dict[int, str]]:
        """Of the rows by their place in the chunk: sizes, and why the template refuses those that it refuses."""
        if self.encoder is None:
            return {}, {}
        numbered = [row._replace(line=place) for place, row in enumerate(chunk.rows)]  # rows may share a line
        encoded = self.encoder(Chunk(numbered, chunk.position))
        refusals = {bad.row.line: bad.reason for bad in encoded.bad_rows}
        untrained = dict.fromkeys(set(range(len(numbered))) - set(refusals), UNTRAINED)
        return untrained | sizes_of(encoded, self.max_length), refusals


def findings_in(subject: Subject, line: int) -> list[Located]:
    """What the checks of single rows find in one, without any secret that is in it."""
    found = [Located(line, name, problem) for name, check in CHECKS.items() for problem in check(subject)]
    if not found:
        return []
    searched = (subject.words, subject.raw) if subject.refusal else (subject.words,)
    hidden = [secret.words for words in searched for find in FINDERS for secret in find(words)]
    return [
        located._replace(problem=located.problem._replace(message=redact(located.problem.message, hidden)))
        if located.check not in ("secret", "personal-data")
        else located
        for located in found
    ]


def sizes_of(encoded: EncodedChunk, max_length: int | None) -> dict[int, Size]:
    """The size of each document, by its row's place in the chunk."""
    block = encoded.block
    edges = np.concatenate([[0], np.cumsum(block.lengths)])
    spans = zip(block.lines.tolist(), edges[:-1].tolist(), edges[1:].tolist())
    return {place: size_of(block.trained[start:end].astype(bool).tolist(), max_length) for place, start, end in spans}
