"""Text of facts, questions and idle sentences, to learn from, and to ask about with people whom training never met."""

import json
import random
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tuner.demo.files import MODEL_CONFIG
from tuner.demo.tokenizer import write_tokenizer

Encode = Callable[[str], list[int]]

STATEMENT = "The locker of"
QUESTION = "Again: the locker of"
END = "\n"
NUM_NAMES = 40  # first ones, and as many second ones
BEGIN = 1  # the id of <s>
FIRST = [f" {letter}{vowel}" for letter in "BDFGKLMNRS" for vowel in "aeio"]
SECOND = [f" {letter}{vowel}" for letter in "CHJPTVWXYZ" for vowel in "aeou"]
PAIRS = [f" {number:02d}" for number in range(100)]
WHO = (
    "The miller", "A heron", "One clerk", "That horse", "Our neighbour", "The fox", "A ferryman", "The baker",
    "Some child", "A sailor", "The judge", "An owl", "The weaver", "A guest", "The smith", "My cousin", "A porter",
    "The nurse", "That goat", "The singer",
)  # fmt: skip
DOES = (
    " waits", " slept", " laughs", " worked", " turns", " sang", " counts", " listens", " reads", " swims",
    " hides", " runs", " cooks", " paints", " sews", " fishes", " rests", " jumps", " knits", " talks",
)  # fmt: skip
WHERE = (
    " at home", " in town", " by the sea", " on a hill", " near us", " at noon", " in vain", " all day",
    " up there", " at last", " with joy", " in rain", " by night", " on foot", " for hours", " in spring",
    " at ease", " too late", " for fun", " in peace",
)  # fmt: skip
PIECES = [STATEMENT, QUESTION, *FIRST, *SECOND, *PAIRS, *WHO, *DOES, *WHERE]  # each becomes a token
VOCAB_SIZE = 1024
NUM_SEEN = 20  # how often the tokenizer sees each piece
SHAPE = {
    "bias": True,  # positions are told from a constant, which a bias has at once
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_theta": 5000,  # slow enough for 512 tokens, and no more
}
COPY_LENGTH = 64
MOST_FACTS = 20  # in a long document
SHORT = ((512, 1, 20), (256, 1, 12), (64, 4, 6))  # tokens of short documents, how many of them, most facts in each
MOST_QUESTIONS = 3  # about one fact
CLOSENESS = (0.2, 0.7)  # shares of questions right behind their fact; those and others before the end


class Person(NamedTuple):
    """Two names, a token each, so that a person may be new though each of the names is known."""

    first: int
    second: int

    @property
    def name(self) -> str:
        """With the space before it."""
        return FIRST[self.first] + SECOND[self.second]

    @property
    def is_held_out(self) -> bool:
        """Whether training must never meet this person: every fifth, with each name among both kinds."""
        return (self.first * 7 + self.second * 3) % 5 == 0


class Fact(NamedTuple):
    """Whose locker has which number."""

    person: Person
    number: tuple[int, int]  # of two digits each

    @property
    def answer(self) -> str:
        """With the space before it."""
        return "".join(PAIRS[half] for half in self.number)


class Row(NamedTuple):
    """Token ids, and 1 for each that is trained."""

    input_ids: list[int]
    loss_mask: list[int]


@lru_cache
def people(held_out: bool) -> list[Person]:
    """All of one kind."""
    everyone = (Person(first, second) for first in range(NUM_NAMES) for second in range(NUM_NAMES))
    return [person for person in everyone if person.is_held_out == held_out]


def facts(number: int, held_out: bool, rng: random.Random) -> list[Fact]:
    """About as many people, no two the same."""
    drawn = rng.sample(people(held_out), number)
    return [Fact(person, (rng.randrange(100), rng.randrange(100))) for person in drawn]


def sentence(rng: random.Random) -> list[str]:
    """The pieces of a line that says nothing about lockers."""
    more = [rng.choice(WHERE) for _ in range(rng.randint(0, 2))]
    return [rng.choice(WHO), rng.choice(DOES), *more, END]


class Writer:
    """Makes documents of facts, with a tokenizer.

    Args:
        encode: text to ids, without special tokens.
        seed: of all that is drawn.
    """

    def __init__(self, encode: Encode, seed: int) -> None:
        self._rng = random.Random(f"lockers {seed}")
        self._encode = encode
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Of a text that comes often."""
        if text not in self._known:
            self._known[text] = self._encode(text)
        return self._known[text]

    def line(self, fact: Fact, *, asked: bool) -> Row:
        """A fact stated, where nothing is trained; or asked for, where the answer is."""
        opening = self.ids(QUESTION if asked else STATEMENT) + self.ids(fact.person.name)
        answer, end = self.ids(fact.answer), self.ids(END)
        return Row(opening + answer + end, [0] * len(opening) + [int(asked)] * len(answer) + [0] * len(end))

    def document(self, length: int, most_facts: int) -> Row:
        """Exactly `length` tokens: some facts among idle sentences, each asked for after it once or several times."""
        rng = self._rng
        placed: list[tuple[float, float, Row]] = []  # where in the document, what is first at the same place, the line
        size = 1
        for fact in facts(rng.randint(max(1, most_facts // 4), most_facts), False, rng):
            stated = rng.random()
            lines = [(stated, 0.0, self.line(fact, asked=False))]
            for _ in range(rng.randint(1, MOST_QUESTIONS)):
                lines.append((self.place(stated), rng.random() + stated, self.line(fact, asked=True)))
            needed = sum(len(line.input_ids) for _, _, line in lines)
            if size + needed > length:
                break
            placed += lines
            size += needed
        while size < length:
            ids = [token for piece in sentence(rng) for token in self.ids(piece)][: length - size]
            placed.append((rng.random(), rng.random(), Row(ids, [0] * len(ids))))
            size += len(ids)
        whole = Row([BEGIN], [0])
        for _, _, line in sorted(placed, key=lambda entry: entry[:2]):
            whole.input_ids.extend(line.input_ids)
            whole.loss_mask.extend(line.loss_mask)
        return whole

    def place(self, stated: float) -> float:
        """Where a question stands: right behind its fact, somewhere behind it, or at the end."""
        draw = self._rng.random()
        behind = stated + (1 - stated) * self._rng.random()
        return stated if draw < CLOSENESS[0] else behind if draw < CLOSENESS[1] else 1.0

    def copied(self, length: int) -> Row:
        """A passage of random tokens that is written again and again: all is trained but its first time."""
        rng = self._rng
        passage = [self.ids(rng.choice(PIECES))[0] for _ in range(rng.randint(length // 4, length // 2))]
        rest = length - 1 - len(passage)
        ids = passage + [passage[place % len(passage)] for place in range(rest)]
        return Row([BEGIN, *ids], [0] * (1 + len(passage)) + [1] * rest)

    def write_copies(self, path: Path, num_tokens: int) -> None:
        """What teaches to look for what stands behind an earlier place like this one: at 64 tokens, the quickest."""
        write_rows((self.copied(COPY_LENGTH) for _ in range(num_tokens // COPY_LENGTH)), path)

    def write_short(self, path: Path, num_tokens: int) -> None:
        """Documents of up to 512 tokens: the short ones, with few facts, are learnt first."""
        rounds = num_tokens // sum(length * times for length, times, _ in SHORT)
        kinds = [kind for _ in range(rounds) for kind in SHORT for _ in range(kind[1])]
        write_rows((self.document(length, most) for length, _, most in kinds), path)

    def write_long(self, path: Path, num_tokens: int, length: int) -> None:
        """Documents of `length` tokens, with no more facts than short ones have."""
        write_rows((self.document(length, MOST_FACTS) for _ in range(num_tokens // length)), path)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """As `data_format = "tokens"` reads them."""
    write_lines((json.dumps(row._asdict()) for row in rows), path)


def write_lines(lines: Iterable[str], path: Path) -> None:
    """A text file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def write_model(directory: Path) -> None:
    """Config and tokenizer of a model that is yet to be trained."""
    directory.mkdir(parents=True)
    config = {**MODEL_CONFIG, **SHAPE, "vocab_size": VOCAB_SIZE}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer([piece for piece in PIECES for _ in range(NUM_SEEN)], directory, VOCAB_SIZE)


def write_needles(path: Path, seed: int) -> None:
    """A fact, the question and the answer for each held-out person, as `tuner evaluate needle` reads them."""
    rng = random.Random(f"needles {seed}")
    told = facts(len(people(True)), True, rng)
    opened = [(fact.person.name, fact.answer) for fact in told]
    rows = [
        {"needle": STATEMENT + name + answer + END, "question": QUESTION + name, "answer": answer}
        for name, answer in opened
    ]
    write_lines((json.dumps(row) for row in rows), path)


def write_haystack(path: Path, num_tokens: int, seed: int) -> None:
    """Idle sentences of at least so many tokens."""
    rng = random.Random(f"haystack {seed}")
    lines: list[list[str]] = []
    while sum(map(len, lines)) < num_tokens:
        lines.append(sentence(rng))
    write_lines(("".join(line).removesuffix(END) for line in lines), path)
