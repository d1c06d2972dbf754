"""Strings that look like keys, tokens and personal data; they are named and masked, never shown."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tuner.lint.findings import Problem, note, warning
from tuner.lint.subject import Subject


class Secret(NamedTuple):
    """A string that should not be learnt, and what it looks like."""

    kind: str
    words: str


KEYS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Hugging Face token": r"\bhf_[A-Za-z]{34}\b",
    "an API key of the form sk-...": r"\bsk-(?:[a-z]+\d*-)*[A-Za-z0-9_-]{32,}",
    "a Google API key": r"\bAIza[\w-]{35}(?![\w-])",
    "a Slack token": r"\bxox[abprs]-\d{8,}-[\w-]{16,}",
    "a Stripe key": r"\b[rs]k_live_[A-Za-z0-9]{24,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a PyPI token": r"\bpypi-AgEI[\w-]{50,}",
    "a JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:\\[nr]|\s)+(?:[\w+/=:., -]|\\[nr]|\s){100,}",
    "a password or key": r"(?i:passw(?:or)?d|secret|token|api[_-]?key|access[_-]?key)\w*[\"'\\]*\s*[:=]\s*[\\]*[\"']"
    r"(?=[^\"'\\]*\d)(?=[^\"'\\]*[A-Za-z])[\w+/=.-]{24,200}[\\]*[\"']",
}
PERSONAL = {
    "an e-mail address": r"\b[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b",
    "a credit card number": r"(?<![\d.,-])(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6011|65\d\d|3[47]\d\d)"
    r"(?:[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}|[ -]?\d{6}[ -]?\d{5})(?![\d.-])",
}
# What every match holds: a row without any of them is passed over at once.
HINT = re.compile(
    r"AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|hf_|sk-|AIza|xox|k_live_|npm_|pypi-|eyJ|PRIVATE KEY|@|\d{4}[ -]?\d{4}"
    r"|(?i:passw|secret|token|api.?key|access.?key)"
)
KEY = re.compile("|".join(f"(?P<k{place}>{pattern})" for place, pattern in enumerate(KEYS.values())))
PERSON = re.compile("|".join(f"(?P<k{place}>{pattern})" for place, pattern in enumerate(PERSONAL.values())))
NOBODY = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|domain|email|company|yourcompany)\b", re.IGNORECASE
)
PLACEHOLDER = re.compile(
    r"example|your|dummy|placeholder|sample|test|xxxx|changeme|\.\.\.|0123456|123456789|abcdef", re.IGNORECASE
)
MIN_ENTROPY = 3.0  # bits per character: drawn at random there are four and more, in words and rows of x fewer


def secrets(subject: Subject) -> Iterator[Problem]:
    """Keys and tokens, each once a row."""
    for secret in find_keys(subject.words):
        yield warning(
            f"holds what looks like {secret.kind}, {masked(secret.words)}. Take it out, and revoke it if it is real."
        )


def personal_data(subject: Subject) -> Iterator[Problem]:
    """E-mail addresses and numbers of credit cards, counted by row."""
    found = find_personal(subject.words)
    for kind, number in Counter(secret.kind for secret in found).items():
        first = next(secret for secret in found if secret.kind == kind)
        more = f" and {number - 1} more" if number > 1 else ""
        yield note(f"holds what looks like {kind}, {masked(first.words)}{more}. Take it out if it is a real person's.")


def find_keys(text: str) -> list[Secret]:
    """What looks like a credential, without placeholders, each once."""
    if not HINT.search(text):
        return []
    found = [Secret(kind, words) for kind, words in _matches(KEY, KEYS, text)]
    return [secret for secret in dict.fromkeys(found) if _is_random(secret)]


def find_personal(text: str) -> list[Secret]:
    """Addresses and card numbers that can be somebody's, each once."""
    if not HINT.search(text):
        return []
    found = [Secret(kind, words) for kind, words in _matches(PERSON, PERSONAL, text)]
    return [secret for secret in dict.fromkeys(found) if _can_be_real(secret)]


def masked(words: str) -> str:
    """At most the first four characters, and the length."""
    return f"{words[: min(4, len(words) // 4)]}*** ({len(words)} characters)"


def entropy(words: str) -> float:
    """Bits per character of a text, as if its characters were drawn one by one."""
    counts = Counter(words).values()
    return -sum(count / len(words) * math.log2(count / len(words)) for count in counts)


def _matches(pattern: re.Pattern[str], kinds: dict[str, str], text: str) -> Iterator[tuple[str, str]]:
    names = list(kinds)
    for match in pattern.finditer(text):
        yield names[int(str(match.lastgroup)[1:])], match.group()


def _is_random(secret: Secret) -> bool:
    if PLACEHOLDER.search(secret.words):
        return False
    value = secret.words.rstrip("\"'\\")
    if secret.kind == "a password or key":
        value = re.split(r"[\"'\\]", value)[-1]
    return entropy(value) >= MIN_ENTROPY


def _can_be_real(secret: Secret) -> bool:
    if secret.kind == "an e-mail address":
        return not NOBODY.search(secret.words)
    digits = [int(character) for character in secret.words if character.isdigit()]
    doubled = [
        digit if place % 2 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(digits, len(digits) % 2)
    ]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 3  # Luhn's check digit
