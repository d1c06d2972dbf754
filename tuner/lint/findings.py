"""What the checks find: one line each, counted by check and severity, a few of them kept to be shown."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

SEVERITIES = ("error", "warning", "note")
MIN_HIDDEN = 6  # a piece of a secret this long is never shown


class Problem(NamedTuple):
    """What a check says of a row: how bad it is, what came, and what to do."""

    severity: str
    message: str


class Finding(NamedTuple):
    """A problem and where it is; line 0 is the file as a whole."""

    file: str
    line: int
    check: str
    severity: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.check}: {self.message}"


def error(message: str) -> Problem:
    """It stops training, or teaches what is certainly wrong."""
    return Problem("error", message)


def warning(message: str) -> Problem:
    """It trains, and is almost certainly not what was meant."""
    return Problem("warning", message)


def note(message: str) -> Problem:
    """It is often meant, and worth a look."""
    return Problem("note", message)


def excerpt(text: str, start: int = 0, end: int | None = None, *, around: int = 0) -> str:
    """A part of a text on one line, quoted, with what was left out marked; at most 60 characters and `around`."""
    end = min(len(text) if end is None else end, start + 60)
    first, last = max(0, start - around), min(len(text), end + around)
    before, after = "..." * (first > 0), "..." * (last < len(text))
    return before + json.dumps(text[first:last], ensure_ascii=False) + after


def redact(message: str, secrets: Sequence[str]) -> str:
    """The message with every piece of a secret of six characters or more starred out."""
    hidden: set[int] = set()
    for secret in secrets:
        for start in range(len(message) - MIN_HIDDEN + 1):
            if message[start : start + MIN_HIDDEN] in secret:
                hidden.update(range(start, start + MIN_HIDDEN))
    return "".join("*" if place in hidden else character for place, character in enumerate(message))


class Report:
    """Counts of all findings, and the first `limit` of each check and severity; with `json_file`, all as JSON lines."""

    def __init__(self, limit: int, json_file: TextIO | None = None) -> None:
        self.limit, self._json = limit, json_file
        self.counts: Counter[tuple[str, str]] = Counter()
        self._kept: dict[tuple[str, str], list[Finding]] = {}

    def add(self, finding: Finding) -> None:
        """Count a finding, keep it if it is among the first, write it if there is a file."""
        key = finding.check, finding.severity
        self.counts[key] += 1
        kept = self._kept.setdefault(key, [])
        if len(kept) < self.limit:
            kept.append(finding)
        if self._json is not None:
            self._json.write(json.dumps(finding._asdict(), ensure_ascii=False) + "\n")

    def total(self, severity: str) -> int:
        """How many findings have this severity."""
        return sum(count for (_, own), count in self.counts.items() if own == severity)

    @property
    def is_clean(self) -> bool:
        """Whether nothing above a note was found."""
        return not self.total("error") and not self.total("warning")

    def lines(self) -> Iterator[str]:
        """The findings by check, the worst first, and the table of counts."""
        for check in self._checks():
            counts = [self.counts[check, severity] for severity in SEVERITIES]
            yield f"{check}: {', '.join(counted(n, word) for n, word in zip(counts, SEVERITIES) if n)}"
            kept = [finding for severity in SEVERITIES for finding in self._kept.get((check, severity), [])]
            yield from (f"  {finding}" for finding in kept[: self.limit])
            if sum(counts) > len(kept[: self.limit]):
                yield f"  ... and {sum(counts) - len(kept[: self.limit]):,} more"
            yield ""
        yield from self._table()

    def _checks(self) -> list[str]:
        def badness(check: str) -> tuple[list[bool], str]:
            return [not self.counts[check, severity] for severity in SEVERITIES], check

        return sorted({check for check, _ in self.counts}, key=badness)

    def _table(self) -> Iterator[str]:
        if not self.counts:
            return
        width = max(len(check) for check, _ in self.counts)
        yield f"{'check':<{width}}" + "".join(f"{severity + 's':>10}" for severity in SEVERITIES)
        for check in self._checks():
            yield f"{check:<{width}}" + "".join(f"{self.counts[check, severity]:>10,}" for severity in SEVERITIES)
        yield f"{'all':<{width}}" + "".join(f"{self.total(severity):>10,}" for severity in SEVERITIES)


def counted(number: int, word: str) -> str:
    """A number with its noun: 1 row, 1,200 rows."""
    return f"{number:,} {word}{'s' * (number != 1)}"
