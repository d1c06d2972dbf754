"""Needles in haystacks: sentences to be found again in long text, which a seeded generator makes."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tuner.errors import UserError

Encode = Callable[[str], list[int]]
NUM_KEYS = 900
DIGITS = 6


class Wording(NamedTuple):
    """A language's sentences. A needle's text is `statement` + value + `end`; `question` asks and begins the answer."""

    statement: str
    end: str
    question: str
    keys: str  # the characters of which keys are made
    forms: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # for {0}, {1}, {2} of a form


ENGLISH = Wording(
    " The secret number of {key} is",
    ".",
    "\nWhat is the secret number of {key}? The secret number of {key} is",
    "bcdfgklmnprstvz",
    (" The {0} {1} near the {2}.", " In the {2}, a {0} slowly {1}.", " Some say that the {0} {1} behind the {2}."),
    (
        ("old miller", "grey heron", "young clerk", "tired horse", "tall neighbour", "red fox", "ferryman", "baker"),
        ("waited", "slept", "laughed", "worked", "turned around", "sang", "counted stones", "listened"),
        ("harbour", "orchard", "station", "wooden bridge", "library", "market", "river", "stone wall", "garden"),
    ),
)
CHINESE = Wording(
    "{key}的密码是",
    "。",
    "\n{key}的密码是多少？{key}的密码是",
    "赵钱孙李周吴郑王冯陈沈韩杨朱秦许何吕张孔",
    ("{0}在{2}{1}。", "{2}旁边，{0}慢慢地{1}。", "有人说{0}常在{2}{1}。"),
    (
        ("老船工", "小学生", "邻居", "一位老师", "年轻的厨师", "白色的鸟", "卖花的人", "木匠"),
        ("休息", "唱歌", "看书", "等朋友", "数石头", "喝茶", "散步", "写信"),
        ("河边", "车站", "图书馆", "果园", "市场", "石桥上", "花园里", "山脚下", "码头"),
    ),
)
WORDINGS = {"en": ENGLISH, "zh": CHINESE}


class Cell(NamedTuple):
    """One place of the map: tokens of the whole document, percent of the haystack before the first needle."""

    language: str
    length: int
    depth: float
    trial: int = 0


class Document(NamedTuple):
    """Token ids, and the half-open span of each answer among them."""

    ids: list[int]
    answers: list[tuple[int, int]]


def sentences(language: str, seed: int) -> "Endless":
    """A text without end, sentence by sentence, the same for the same seed."""
    return Endless(WORDINGS[language], random.Random(f"{language} {seed}"))


class Endless(NamedTuple):
    """Sentences of a wording, drawn one by one."""

    wording: Wording
    rng: random.Random

    def draw(self) -> str:
        """The next sentence."""
        return self.rng.choice(self.wording.forms).format(*(self.rng.choice(words) for words in self.wording.words))


class Haystack:
    """Text as token ids, cut where sentences end, that grows as longer documents ask for more.

    Args:
        language: a key of `WORDINGS`.
        encode: text to ids, without special tokens.
        files: the user's texts in place of the generator's; they are repeated where they are too short.
        prefix: ids before each document, such as that of the beginning.
    """

    def __init__(
        self, language: str, encode: Encode, *, seed: int = 0, files: Sequence[str] = (), prefix: Sequence[int] = ()
    ) -> None:
        self.language, self.encode, self.seed, self.prefix = language, encode, seed, list(prefix)
        self.source = sentences(language, seed)
        self.given = [part for text in files for part in text.splitlines(keepends=True)]
        self.tokens: list[int] = []
        self.ends = [0]  # of its sentences, in tokens

    def grow(self, num_tokens: int) -> None:
        """Hold at least so many tokens."""
        while len(self.tokens) < num_tokens:
            number = len(self.ends) - 1
            text = self.given[number % len(self.given)] if self.given else self.source.draw()
            self.tokens += self.encode(text)
            self.ends.append(len(self.tokens))
            if not self.tokens and number > len(self.given):
                raise UserError("The tokenizer makes no token of the haystack's text. Is it the model's own tokenizer?")

    def document(self, cell: Cell, num_needles: int = 1) -> Document:
        """Exactly `cell.length` tokens: haystack with needles from the depth on evenly to the end, then the questions.

        Needles stand where a sentence ends, at most one sentence before their depth.

        Raises:
            UserError: needles and questions alone are longer than the document.
        """
        wording = WORDINGS[self.language]
        rng = random.Random(f"{self.seed} {cell} {num_needles}")
        keys = rng.sample(range(NUM_KEYS), num_needles)
        pairs = [(key_name(wording, key), rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for key in keys]
        values = [self.encode(f" {value}" if self.language == "en" else str(value)) for _, value in pairs]
        needles = [
            [*self.encode(wording.statement.format(key=key)), *value, *self.encode(wording.end)]
            for (key, _), value in zip(pairs, values)
        ]
        return self.hidden(cell, needles, [self.encode(wording.question.format(key=key)) for key, _ in pairs], values)

    def hidden(
        self, cell: Cell, needles: Sequence[list[int]], questions: Sequence[list[int]], values: Sequence[list[int]]
    ) -> Document:
        """Exactly `cell.length` tokens with the token ids of these needles, and what is asked and answered of each.

        Raises:
            UserError: they alone are longer than the document.
        """
        num_needles = len(needles)
        room = cell.length - len(self.prefix) - sum(map(len, [*needles, *questions, *values]))
        if room < 0:
            raise UserError(
                f"The needle is longer than the haystack: {num_needles} of them with their questions are "
                f"{cell.length - room} tokens, the length asked for is {cell.length}. Ask for lengths of at least "
                f"{cell.length - room} tokens, or for fewer needles."
            )
        ids = self.prefix + self.hide(needles, cell.depth, room)
        answers = []
        for question, value in zip(questions, values):
            ids += question
            answers.append((len(ids), len(ids) + len(value)))
            ids += value
        return Document(ids, answers)

    def hide(self, needles: Sequence[list[int]], depth: float, room: int) -> list[int]:
        """`room` tokens of haystack with the needles among them."""
        self.grow(room)
        hay = self.tokens[:room]
        wanted = [room * (depth + (100 - depth) * i / len(needles)) / 100 for i in range(len(needles))]
        ends = [*self.ends[: bisect_left(self.ends, room)], room]
        places = [ends[bisect_right(ends, place + 1e-6) - 1] for place in wanted]
        ids: list[int] = []
        for needle, begin, end in zip(needles, places, [*places[1:], room]):
            ids += needle + hay[begin:end]
        return hay[: places[0]] + ids


def key_name(wording: Wording, key: int) -> str:
    """A name for each number below `NUM_KEYS`; no two are the same."""
    letters = wording.keys
    if wording is CHINESE:
        return letters[key // 400] + letters[key // 20 % 20] + letters[key % 20]
    return (letters[key // 75].upper() + "aeiou"[key // 15 % 5] + letters[key % 15]) + "or"
