"""One exchange of the demo: a request, the tool call it needs, the true result, the answer."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

from tuner.demo import world
from tuner.demo.wording import Lines, Wording


@dataclass(frozen=True)
class Exchange:
    """`tool` is "" for talk; `arguments` is what a split must keep apart; `code` only for the interpreter."""

    tool: str
    arguments: dict[str, Any]
    request: str
    result: str
    answer: str
    thought: str = ""
    code: str = ""
    day: date | None = None  # only for the calendar


class Phrasing:
    """How one exchange is worded: the request by chance, the replies so that they follow from the request.

    A reply drawn by chance would be noise to a model: no request tells it which one comes.
    """

    def __init__(self, lines: Lines, rng: random.Random) -> None:
        self.number = rng.randrange(len(lines))
        self.lines = lines

    def request(self, **slots: object) -> str:
        return _sentence(self.lines[self.number], **slots)

    def reply(self, lines: Lines, **slots: object) -> str:
        return _sentence(lines[self.number % len(lines)], **slots)

    def thought(self, lines: Lines) -> str:
        """What is said before the call; mostly nothing."""
        return "" if self.number % 3 else lines[self.number // 3 % len(lines)]


def _sentence(form: str, **slots: object) -> str:
    text = form.format(**slots)
    return text[0].upper() + text[1:]


def _operands(form: str, rng: random.Random) -> dict[str, int]:
    """Two numbers for an expression: differences stay positive and quotients whole."""
    if form == "{a}/{b}":
        b = rng.randint(2, 9)
        return {"a": b * rng.randint(-(-world.LOWEST // b), world.HIGHEST // b), "b": b}
    low, high = sorted(rng.sample(range(world.LOWEST, world.HIGHEST + 1), 2))
    return {"a": high, "b": low} if form == "{a}-{b}" or rng.random() < 0.5 else {"a": low, "b": high}


def calculator(wording: Wording, rng: random.Random) -> Exchange:
    """A sum, in figures or as a little story."""
    form = rng.choice(list(wording.calculator))
    operands = _operands(form, rng)
    expression = form.format(**operands)
    result = world.calculate(expression)
    phrasing = Phrasing(wording.calculator[form], rng)
    return Exchange(
        tool="calculator",
        arguments={"expression": expression},
        request=phrasing.request(**operands),
        result=result,
        answer=phrasing.reply(wording.calculator_answers, expression=expression, result=result),
        thought=phrasing.thought(wording.thoughts["calculator"]),
    )


def get_weather(wording: Wording, rng: random.Random) -> Exchange:
    """The weather of a city on a day."""
    city, day = rng.randrange(len(wording.cities)), rng.randrange(len(wording.days))
    condition, low, high = world.weather(city, day, len(wording.conditions))
    found = {"condition": wording.conditions[condition], "low": low, "high": high}
    slots = {"city": wording.cities[city], "day": wording.day_phrases[day]}
    phrasing = Phrasing(wording.weather, rng)
    return Exchange(
        tool="get_weather",
        arguments={"city": wording.cities[city], "day": wording.days[day]},
        request=phrasing.request(**slots),
        result=json.dumps(found, ensure_ascii=False),
        answer=phrasing.reply(wording.weather_answers, **slots, **found),
        thought=phrasing.thought(wording.thoughts["get_weather"]),
    )


def spoken_date(day: date, wording: Wording) -> str:
    """A date as one says it; the calendar takes it in the same words."""
    return wording.date_form.format(month=wording.months[day.month - 1], day=day.day)


def add_event(wording: Wording, rng: random.Random) -> Exchange:
    """A new entry; the calendar answers with the day of the week."""
    day = world.random_date(rng)
    slots = {
        "title": rng.choice(wording.titles),
        "date": spoken_date(day, wording),
        "time": f"{rng.randrange(8, 20):02d}:{rng.choice(('00', '30'))}",
    }
    weekday = wording.weekdays[day.weekday()]
    phrasing = Phrasing(wording.add_event, rng)
    return Exchange(
        tool="add_event",
        arguments=dict(slots),
        request=phrasing.request(**slots),
        result=json.dumps({"added": slots["title"], "weekday": weekday}, ensure_ascii=False),
        answer=phrasing.reply(wording.add_event_answers, weekday=weekday, **slots),
        thought=phrasing.thought(wording.thoughts["add_event"]),
        day=day,
    )


def list_events(wording: Wording, rng: random.Random, added: tuple[Exchange, ...] = ()) -> Exchange:
    """The plan of a date, with what this dialogue has added to it."""
    day = added[-1].day if added and added[-1].day else world.random_date(rng)
    events = [(time, wording.titles[title]) for time, title in world.standing_events(day, len(wording.titles))]
    events += [(entry.arguments["time"], entry.arguments["title"]) for entry in added if entry.day == day]
    events.sort()
    spoken = spoken_date(day, wording)
    named = wording.event_join.join(wording.event_form.format(clock=clock, title=title) for clock, title in events)
    phrasing = Phrasing(wording.list_events, rng)
    lines = wording.list_events_answers if events else wording.no_events_answers
    return Exchange(
        tool="list_events",
        arguments={"date": spoken},
        request=phrasing.request(date=spoken),
        result=json.dumps([{"time": clock, "title": title} for clock, title in events], ensure_ascii=False),
        answer=phrasing.reply(lines, date=spoken, events=named),
        thought=phrasing.thought(wording.thoughts["list_events"]),
        day=day,
    )


def interpreter(wording: Wording, rng: random.Random) -> Exchange:
    """A task for a line or two of Python, which is run here to know what it prints."""
    program = rng.choice(list(world.PROGRAMS))
    slots = {
        "n": rng.randint(world.LOWEST, world.HIGHEST),
        "b": rng.randint(2, 3 if program == "power" else 9),
        "word": rng.choice(world.WORDS),
    }
    code = world.PROGRAMS[program].format(**slots)
    result = world.run_python(code)
    phrasing = Phrasing(wording.interpreter[program], rng)
    return Exchange(
        tool="interpreter",
        arguments={"code": code},
        request=phrasing.request(**slots),
        result=result,
        answer=phrasing.reply(wording.interpreter_answers[program], **slots, result=result),
        thought=phrasing.thought(wording.thoughts["interpreter"]),
        code=code,
    )


def talk(wording: Wording, rng: random.Random) -> Exchange:
    """Small talk that names things; needs no tool."""
    request, reply = rng.choice(wording.talk)
    slots = {
        "name": rng.choice(wording.names),
        "city": rng.choice(wording.cities),
        "food": rng.choice(wording.foods),
        "hobby": rng.choice(wording.hobbies),
    }
    request = request.format(**slots)
    return Exchange(tool="", arguments={"request": request}, request=request, result="", answer=reply.format(**slots))


def greeting(wording: Wording, rng: random.Random) -> Exchange:
    """A fixed request and its reply."""
    request, reply = rng.choice(wording.greetings)
    return Exchange(tool="", arguments={}, request=request, result="", answer=reply)


KINDS: dict[str, Callable[[Wording, random.Random], Exchange]] = {
    "calculator": calculator,
    "get_weather": get_weather,
    "add_event": add_event,
    "list_events": list_events,
    "interpreter": interpreter,
    "talk": talk,
    "greeting": greeting,
}
