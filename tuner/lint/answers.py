"""Checks of what the model learns to say: empty, cut off, caught in a loop, in another script, or never trained."""

import re
from collections.abc import Iterator

import numpy as np

from tuner.lint.findings import Problem, error, excerpt, note, warning
from tuner.lint.subject import Subject, is_trained

MISSING_VALUES = {"nan", "NaN", "null", "undefined", "[object Object]"}
WORD = re.compile(r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]|[^\W\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]+")
MIN_WORDS = 12  # of prose: a shorter answer is often a name or a number
MIN_LAST_WORDS = 8  # behind its last sentence, in one line: fewer are often a heading, a signature, an item
BEGUN = re.compile(
    r"\s+(?!Best|Yours?|Kind|Warm|With|Love|Regards|Thank|Cheers|Respect|Faith|Sincere|Signed)"
    r"[A-Z][a-z']*(?:,? (?:I|[a-z'-]+)){2,}"
)  # but this began as another sentence of its paragraph
SENTENCE_END = re.compile(r"[.!?。！？…;；:：]")
# the beginning of an item or of a labelled line; addresses, options of a command, calls; items in one line
LISTED = re.compile(r"\s*([-*+•·>|]|\d+[.)、]|[a-zA-Z][.)] |[^.!?]{0,30}:\s)|.*(https?://|www\.|\s-\w|\w\(|\s[-–*•]\s)")
PROSE = re.compile(r"[\w\s,.;:!?'\"()%&€£°/-]|[，。；：！？、“”‘’（）《》「」—–…·]|[^\x00-\u2fff]")
OPEN_WORDS = {"the", "a", "an", "and", "or", "of", "your", "their", "whose"}
FENCE = re.compile(r"^[ \t]*(```+)[ \t]*([^`\n]*)$", re.MULTILINE)
INFO = re.compile(r"[\w+#.-]+")  # what stands behind the mark that opens a block: a language
LOOP_PERIODS = 48  # words of the longest repeated unit
MIN_LOOP_WORDS, MIN_LOOPS = 24, 5
CODE_SIGN = re.compile(r"[(){}\[\]=<>|\\_`@#$%^*+/~-]{2}|[(){}\[\]=<>|\\_`@$^]")
SCRIPTS = {
    "Chinese": re.compile(r"[\u3400-\u9fff]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "Korean": re.compile(r"[\uac00-\ud7af\u1100-\u11ff]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
}
LATIN_PER_CHARACTER = 5  # Latin letters that say as much as one character of Chinese: roughly a word
ASKS_FOR_LANGUAGE = re.compile(
    r"translat|language|\bin (english|chinese|french|german|spanish|japanese|korean|russian|arabic|latin)\b|pinyin"
    r"|翻译|译成|译为|英文|英语|中文|汉语|日语|法语|德语|俄语|韩语|拼音|用\w语",
    re.IGNORECASE,
)
CODE = re.compile(r"```.*?(```|\Z)|`[^`\n]*`|https?://\S+|[\w./-]+\(.*?\)|[{}=;<>]", re.DOTALL)


def empty_text(subject: Subject) -> Iterator[Problem]:
    """Turns in which nothing is said."""
    for position, message in enumerate(subject.messages):
        said = message["content"].strip()
        if message["role"] == "assistant" and is_trained(message) and not message.get("tool_calls"):
            if not said:
                yield error(f"message {position}, an answer, is empty: it teaches to say nothing. Drop the row.")
            if said in MISSING_VALUES:
                yield note(f"message {position} answers {said!r}, how a missing value is often written. Is it meant?")
        if message["role"] == "user" and not said:
            yield warning(f"message {position}, a question, is empty. Drop the row, or what it came from was lost.")


def cut_off(subject: Subject) -> Iterator[Problem]:
    """Answers that break off within something that they had begun."""
    for where, _, answer in subject.answers:
        how = broken_off(answer)
        if how:
            tail = excerpt(answer.rstrip(), max(0, len(answer.rstrip()) - 40))
            yield warning(f"{where}, an answer, {how}; it ends in {tail}. Complete it or drop the row.")


def broken_off(answer: str) -> str:
    """What an answer leaves open, in words; "" where it looks whole."""
    if open_fence(answer):
        return "opens a code block that it does not close"
    text = answer.rstrip()
    if (
        text.startswith(('{"', '[{"', '["'))
        and text[-1] not in "}]"
        and text.count("{") + text.count("[") > (text.count("}") + text.count("]"))
    ):
        return "is JSON that is not closed"
    if ending(text) != "open":
        return ""
    last_line = text.rpartition("\n")[2]
    if text[-1] in ",，、" or last_line.split()[-1] in OPEN_WORDS:
        return "stops in the middle of a sentence"
    opened = max(last_line.rfind("("), last_line.rfind("（"))
    if opened > max(last_line.rfind(")"), last_line.rfind("）")):
        return "opens a bracket that it does not close"
    return ""


def open_fence(answer: str) -> bool:
    """Whether a block of fenced code is not closed; a block is closed by at least as many of the same marks."""
    if answer.count("```") % 2 == 0:
        return False  # as many opened as closed, be it in odd places
    opened = ""
    for mark, rest in FENCE.findall(answer):
        if not opened:
            opened = mark
        elif mark.startswith(opened) and not INFO.match(rest):
            opened = ""
    return bool(opened)


def ending(answer: str) -> str:
    """How an answer ends: "sentence", "open" (prose that just stops), or "other" (short, a list, code, a number)."""
    text = answer.rstrip()
    last_line = text.rpartition("\n")[2]
    rest = SENTENCE_END.split(last_line)[-1]
    if len(WORD.findall(text[-400:])) < MIN_WORDS:
        return "other"
    if not (text[-1].isalpha() or text[-1] in ",，、"):
        return "other" if text[-1].isdigit() else "sentence"
    is_begun = len(rest) < len(last_line) and BEGUN.fullmatch(rest)
    if (
        LISTED.match(last_line)
        or PROSE.sub("", last_line)
        or (len(WORD.findall(rest)) < MIN_LAST_WORDS and not is_begun)
    ):
        return "other"
    return "open"


def loop(subject: Subject) -> Iterator[Problem]:
    """The same words again and again within an answer, as sampled text often has."""
    for where, _, answer in subject.answers:
        unit, times = repeated_unit(answer)
        if times:
            yield warning(
                f"{where}, an answer, says {excerpt(unit)} {times} times in a row. Shorten it or drop the row."
            )


def repeated_unit(answer: str) -> tuple[str, int]:
    """The words that follow themselves most, and how often; ("", 0) where nothing is repeated much."""
    words = list(WORD.finditer(answer))
    if len(words) < MIN_LOOP_WORDS:
        return "", 0
    numbers: dict[str, int] = {}
    told = [numbers.setdefault(word.group().casefold(), len(numbers)) for word in words]
    if len(told) - len(set(zip(told, told[1:], told[2:]))) < MIN_LOOP_WORDS // 2:
        return "", 0  # a quick look: in a loop, most sequences of three words were there before
    ids = np.array(told)
    for period in range(1, min(LOOP_PERIODS, len(ids) // MIN_LOOPS) + 1):
        end, length = longest_run(ids[period:] == ids[:-period])
        start = end - length
        times = (length + period) // period
        stretch = answer[words[start].start() : words[end + period - 1].end()]
        if times >= MIN_LOOPS and length + period >= MIN_LOOP_WORDS and is_prose(stretch):
            return answer[words[start].start() : words[start + period - 1].end()], times
    return "", 0


def longest_run(same: np.ndarray) -> tuple[int, int]:
    """End and length of the longest run of True in (words,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    best = int(np.argmax(ends - starts))
    return int(ends[best]), int(ends[best] - starts[best])


def is_prose(text: str) -> bool:
    """Whether a text is of words, for tables, code, drawings and rows of numbers repeat and are meant."""
    return not CODE_SIGN.search(text) and bool(re.search(r"[^\W\d_]{2}|[\u3400-\u9fff]", text))


def language_mix(subject: Subject) -> Iterator[Problem]:
    """Answers in another script than their question, which did not ask for it."""
    question = ""
    for position, message in enumerate(subject.messages):
        if message["role"] == "user":
            question = message["content"]
        said = message["content"]
        if not is_trained(message) or (said.isascii() and question.isascii()) or ASKS_FOR_LANGUAGE.search(question):
            continue
        asked, answered = main_script(question), main_script(said)
        if asked and answered and asked != answered:
            yield note(f"message {position} answers a question in {asked} script in {answered} script. Is it meant?")


def main_script(text: str) -> str:
    """The script of at least nine tenths of a text's words outside code; "" where it is short or mixed."""
    prose = CODE.sub(" ", text)
    weights = {name: len(pattern.findall(prose)) for name, pattern in SCRIPTS.items()}
    weights["Latin"] //= LATIN_PER_CHARACTER
    script = max(weights, key=lambda name: weights[name])
    total = sum(weights.values())
    if total < 8 or weights[script] < 0.9 * total:
        return ""
    return "Japanese" if weights["kana"] else script


def zero_loss(subject: Subject) -> Iterator[Problem]:
    """Rows of which nothing is trained."""
    size = subject.size
    if size.num_trained == 0 if size else subject.messages and not any(map(is_trained, subject.messages)):
        yield warning("nothing of it is trained. Drop the row, or give it an answer whose loss is on.")
    elif size and size.num_trained_kept == 0 and size.bound.too_long == "truncate":
        kept = f"the first {size.bound.max_length:,} are kept, and none of them is trained"
        yield warning(
            f"of its {size.num_tokens:,} tokens {kept}. Raise max_length, or shorten what comes before the answer."
        )


def over_length(subject: Subject) -> Iterator[Problem]:
    """Rows of more tokens than training keeps."""
    size = subject.size
    if size is None or not size.num_trained:
        return
    limit, too_long = size.bound
    if limit is None:
        return
    told = f"{size.num_tokens:,} tokens, over max_length={limit:,}"
    lost = f"{size.num_trained - size.num_trained_kept:,} of {size.num_trained:,} trained tokens"
    if size.num_tokens > limit and too_long == "truncate":
        yield warning(f"{told}: cutting it would lose {lost}. Raise max_length, or shorten or split the row.")
    elif size.num_tokens > limit and too_long == "drop":
        yield warning(f"{told}: it would be dropped, {size.num_trained:,} trained tokens. Raise max_length.")
    elif size.num_tokens > limit:
        pieces = -(-size.num_tokens // limit)
        yield note(f"{told}: it would be split into {pieces:,} pieces, each of which knows nothing of those before it.")
    elif size.num_tokens == limit and any(ending(answer.content) == "open" for answer in subject.answers):
        yield warning(
            f"exactly max_length={limit:,} tokens, and its answer has no end: it was probably cut before."
            " Take it from where it is whole, or drop the row."
        )
