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


class Pattern(NamedTuple):
    """What a kind of string looks like; a text without any of the hints, in lower case, has none and is passed over."""

    hints: tuple[str, ...]
    words: re.Pattern[str]


def _pattern(hints: str, *parts: str) -> Pattern:
    return Pattern(tuple(hints.split(",")), re.compile("|".join(parts)))


KEYS = {
    "an AWS access key": _pattern("akia,asia", r"(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": _pattern(
        "ghp_,gho_,ghu_,ghs_,ghr_,github_pat_",
        r"gh[pousr]_[A-Za-z0-9]{36}\b",
        r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b",
    ),
    "a GitLab token": _pattern("glpat-", r"glpat-[\w-]{20,}"),
    "a Hugging Face token": _pattern("hf_", r"hf_[A-Za-z]{34}\b"),
    "an API key of the form sk-...": _pattern("sk-", r"\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z0-9]{20})[\w-]{32,}"),
    "a Google API key": _pattern("aiza", r"AIza[\w-]{35}(?![\w-])"),
    "a Slack token": _pattern("xox", r"xox[abprs]-\d{8,}-[\w-]{16,}"),
    "a Stripe key": _pattern("k_live_", r"\b[rs]k_live_[A-Za-z0-9]{24,}"),
    "an npm token": _pattern("npm_", r"npm_[A-Za-z0-9]{36}\b"),
    "a PyPI token": _pattern("pypi-ag", r"pypi-AgEI[\w-]{50,}"),
    "a JSON web token": _pattern("eyj", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"),
    "a private key": _pattern(
        "private key",
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----(?:\\[nr]|\s)+(?:[\w+/=:., -]|\\[nr]|\s){100,}",
    ),
    "a password or key": _pattern(
        "password,passwd,secret,token,api_key,api-key,apikey,access_key,access-key,accesskey",
        r"(?i:password|passwd|secret|token|api[_-]?key|access[_-]?key)\w*[\"'\\]*\s*[:=]\s*[\\]*[\"']"
        r"(?=[^\"'\\]*\d)(?=[^\"'\\]*[A-Za-z])[\w+/=.-]{24,200}[\\]*[\"']",
    ),
}
PERSONAL = {
    "an e-mail address": _pattern(
        "@", r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"
    ),
    "a credit card number": _pattern(
        "0,1,2,3,4,5,6,7,8,9",
        r"(?<![\d.,-])(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6011|65\d\d)[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}(?![\d-]|[.,]\d)",
        r"(?<![\d.,-])3[47]\d\d[ -]?\d{6}[ -]?\d{5}(?![\d-]|[.,]\d)",
    ),
}
NOBODY = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|(?:your|my)?-?domain|(?:your)?email|(?:your)?company)\b"
    r"|^(?:your|name|user|username|email|someone|git|john\.?doe|jane\.?doe)(?![a-z])",
    re.IGNORECASE,
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
    return [secret for secret in _matches(KEYS, text) if _is_random(secret)]


def find_personal(text: str) -> list[Secret]:
    """Addresses and card numbers that can be somebody's, each once."""
    return [secret for secret in _matches(PERSONAL, text) if _can_be_real(secret)]


def masked(words: str) -> str:
    """At most the first four characters, and the length."""
    return f"{words[: min(4, len(words) // 4)]}*** ({len(words)} characters)"


def entropy(words: str) -> float:
    """Bits per character of a text, as if its characters were drawn one by one."""
    counts = Counter(words).values()
    return -sum(count / len(words) * math.log2(count / len(words)) for count in counts)


def _matches(kinds: dict[str, Pattern], text: str) -> list[Secret]:
    lower = text.lower()
    found = [
        Secret(kind, words)
        for kind, pattern in kinds.items()
        if any(hint in lower for hint in pattern.hints)
        for words in pattern.words.findall(text)
    ]
    return list(dict.fromkeys(found))


def _is_random(secret: Secret) -> bool:
    value = secret.words
    if secret.kind == "a password or key":
        value = re.split(r"[\"'\\]", value.rstrip("\"'\\"))[-1]
    return not PLACEHOLDER.search(value) and entropy(value) >= MIN_ENTROPY


def _can_be_real(secret: Secret) -> bool:
    if secret.kind == "an e-mail address":
        return not NOBODY.search(secret.words)
    digits = [int(character) for character in secret.words if character.isdigit()]
    doubled = [
        digit if place % 2 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(digits, len(digits) % 2)
    ]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 3  # Luhn's check digit
