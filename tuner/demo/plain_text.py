"""Plain paragraphs about the same world, for continued pre-training."""

import random

from tuner.demo import exchanges, world
from tuner.demo.dialogues import LANGUAGES, draw_exchange
from tuner.demo.exchanges import Exchange
from tuner.demo.wording import Wording


def _date_fact(wording: Wording, rng: random.Random) -> str:
    day = world.random_date(rng)
    spoken = exchanges.spoken_date(day, wording)
    return rng.choice(wording.calendar_facts).format(date=spoken, weekday=wording.weekdays[day.weekday()])


def _told(exchange: Exchange) -> str:
    """An exchange as a piece of prose: code with what it printed, otherwise the question and its answer."""
    if exchange.code:
        return f"{exchange.request}\n```python\n{exchange.code}\n```\n{exchange.answer}"
    return f"{exchange.request} {exchange.answer}"


def paragraph(rng: random.Random) -> dict[str, str]:
    """{"text": ...}: three to six true statements in one language."""
    wording = rng.choice(LANGUAGES)
    kinds = [kind for kind in exchanges.KINDS if kind != "greeting"]
    pieces = []
    for _ in range(rng.randint(3, 6)):
        told = _told(draw_exchange(rng.choice(kinds), wording, rng, "train"))
        pieces.append(_date_fact(wording, rng) if rng.random() < 0.2 else told)
    return {"text": "\n".join(pieces)}


def paragraphs(num_paragraphs: int, seed: int) -> list[dict[str, str]]:
    """`num_paragraphs` paragraphs, the same on every machine for the same seed."""
    rng = random.Random(f"text {seed}")
    return [paragraph(rng) for _ in range(num_paragraphs)]
