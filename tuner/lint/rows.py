"""A chunk of rows -> findings in each, and the few facts of them that are compared once all are read."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tuner.dataset.chat_template import Segment
from tuner.dataset.documents import convert
from tuner.dataset.read import Chunk, Row
from tuner.dataset.reading.strict_json import parse_row
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.dataset.tokenize import Document
from tuner.errors import UserError
from tuner.lint import answers, secrets, texts, tool_calls
from tuner.lint.findings import Problem, error, redact
from tuner.lint.subject import NO_BOUND, Bound, Subject, from_refused, from_sample, size_of
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


class Converted(NamedTuple):
    """How far a row went towards tokens: what was made of it last, and why it went no further."""

    content: Any  # the sample; of a refused row what it was when it was refused
    segments: list[Segment] | Document
    refusal: str


@dataclass(frozen=True)
class RowLinter:
    """Checks chunks of rows. `encoder` is None where there is no tokenizer."""

    to_sample: Callable[[dict[str, Any]], dict[str, Any]]
    encoder: SampleEncoder | None = None
    bound: Bound = NO_BOUND

    def __call__(self, chunk: Chunk) -> Linted:
        """Every check on every row."""
        rows = [self._convert(row) for row in chunk.rows]
        documents: list[Document | None] = [None] * len(rows)
        if self.encoder is not None:
            documents = [*self.encoder.encode([row.segments for row in rows])]
        subjects = [self._subject(*parts) for parts in zip(chunk.rows, rows, documents)]
        lines = [row.line for row in chunk.rows]
        found = [located for line, subject in zip(lines, subjects) for located in findings_in(subject, line)]
        return Linted(found, facts_of(subjects, lines), chunk.position)

    def _convert(self, row: Row) -> Converted:
        content: Any = None
        segments: list[Segment] | Document = []
        try:
            if row.fault:
                raise UserError(row.fault)
            content = parse_row(row.content)
            content = convert(content, self.to_sample)
            if self.encoder is not None:
                segments = self.encoder.segments(content)
        except UserError as problem:
            return Converted(content, [], str(problem))
        return Converted(content, segments, "")

    def _subject(self, row: Row, converted: Converted, document: Document | None) -> Subject:
        raw = row.content.decode(errors="replace")
        if converted.refusal:
            return from_refused(converted.content, raw, converted.refusal)
        size = None if document is None else size_of(document.trained.tolist(), self.bound)
        return from_sample(converted.content, raw, size)


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
