"""Seeded dialogues in the OpenAI messages form, split so that no held-out request is ever trained on."""

import json
import random
from typing import Any, Literal

from tuner.demo import exchanges, world
from tuner.demo.chinese import CHINESE
from tuner.demo.english import ENGLISH
from tuner.demo.exchanges import Exchange
from tuner.demo.wording import Wording

Split = Literal["train", "heldout"]
LANGUAGES = (ENGLISH, CHINESE)
TOOL_WEIGHTS = {"calculator": 7, "get_weather": 3, "add_event": 5, "list_events": 3, "interpreter": 2, "talk": 1}
TALK_WEIGHTS = {"talk": 2, "greeting": 1}
TALK_SHARE = 0.12  # of the dialogues use no tool at all
HELDOUT_SHARE = 10  # one combination of arguments in so many is held out


def split_of(exchange: Exchange) -> Split:
    """Where a combination of arguments belongs, in both languages and for ever; greetings are for training."""
    if not exchange.arguments:
        return "train"
    number = world.fact_number("split", exchange.tool, exchange.arguments)
    return "train" if number % HELDOUT_SHARE else "heldout"


def draw_exchange(kind: str, wording: Wording, rng: random.Random, split: Split) -> Exchange:
    """An exchange of this kind whose arguments belong to the split."""
    while True:
        exchange = exchanges.KINDS[kind](wording, rng)
        if split_of(exchange) == split:
            return exchange


def draw_exchanges(wording: Wording, rng: random.Random, split: Split) -> list[Exchange]:
    """One or two exchanges of a dialogue; after an entry into the calendar the same date may be asked for."""
    weights = TALK_WEIGHTS if rng.random() < TALK_SHARE else TOOL_WEIGHTS
    kinds = [kind for kind in weights if split == "train" or kind != "greeting"]
    drawn: list[Exchange] = []
    added: tuple[Exchange, ...] = ()
    for _ in range(rng.choices((1, 2, 3), weights=(7, 2, 1))[0]):
        kind = rng.choices(kinds, weights=[weights[kind] for kind in kinds])[0]
        exchange = draw_exchange(kind, wording, rng, split)
        if kind == "list_events" and added:
            exchange = exchanges.list_events(wording, rng, added)
        if split_of(exchange) != split:
            continue
        drawn.append(exchange)
        if kind == "add_event":
            added += (exchange,)
    return drawn


def _messages(exchange: Exchange, number: int) -> list[dict[str, Any]]:
    user = {"role": "user", "content": exchange.request}
    answer = {"role": "assistant", "content": exchange.answer}
    if not exchange.tool:
        return [user, answer]
    call: dict[str, Any] = {"id": f"call_{number}"}
    if exchange.code:
        call |= {"type": "code_interpreter", "code_interpreter": {"input": exchange.code}}
    else:
        arguments = json.dumps(exchange.arguments, ensure_ascii=False)
        call |= {"type": "function", "function": {"name": exchange.tool, "arguments": arguments}}
    return [
        user,
        {"role": "assistant", "content": exchange.thought, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": exchange.result},
        answer,
    ]


def _tools(drawn: list[Exchange], rng: random.Random) -> list[dict[str, Any]]:
    """What the dialogue needs and, now and then, one tool that it does not."""
    names = {exchange.tool for exchange in drawn if exchange.tool}
    others = [name for name in world.SCHEMAS if name not in names]
    if others and rng.random() < (0.2 if names else 0.1):
        names.add(rng.choice(others))
    order = sorted(names)
    rng.shuffle(order)
    return [world.SCHEMAS[name] for name in order]


def dialogue(rng: random.Random, split: Split) -> dict[str, Any]:
    """One dialogue: {"messages": [...], "tools": [...]}, in one language throughout."""
    wording = rng.choice(LANGUAGES)
    drawn: list[Exchange] = []
    while not drawn:
        drawn = draw_exchanges(wording, rng, split)
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(wording.systems)})
    for number, exchange in enumerate(drawn, start=1):
        turn = _messages(exchange, number)
        turn[0]["content"] = rng.choice(wording.openers) + turn[0]["content"]
        messages += turn
    tools = _tools(drawn, rng)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def dialogues(num_dialogues: int, split: Split, seed: int) -> list[dict[str, Any]]:
    """`num_dialogues` dialogues, the same on every machine for the same seed."""
    rng = random.Random(f"{split} {seed}")
    return [dialogue(rng, split) for _ in range(num_dialogues)]
