"""One exchange of the demo: a request, the tool call it needs, the true result, the answer."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
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
    """Numbers for an expression: differences stay positive and quotients whole."""
    if form == "{a}+{b}":
        return {"a": rng.randint(2, 999), "b": rng.randint(2, 999)}
    if form == "{a}-{b}":
        b = rng.randint(2, 499)
        return {"a": b + rng.randint(2, 499), "b": b}
    if form == "{a}/{b}":
        b = rng.randint(2, 19)
        return {"a": b * rng.randint(3, 49), "b": b}
    if form == "{a}*{b}":
        return {"a": rng.randint(3, 199), "b": rng.randint(3, 99)}
    return {"a": rng.randint(2, 99), "b": rng.randint(2, 99), "c": rng.randint(2, 29)}


def calculator(wording: Wording, rng: random.Random) -> Exchange:
    """A sum, in figures or as a little story."""
    form = rng.choices(list(wording.calculator), weights=(4, 4, 4, 3, 2, 1, 1))[0]
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


def _spoken_date(iso_date: str, wording: Wording, form: str) -> str:
    _, month, day = (int(part) for part in iso_date.split("-"))
    return form.format(month=wording.months[month - 1], m=month, d=day)


def _spoken_time(clock: str, wording: Wording) -> str:
    hour = int(clock[:2])
    form = wording.morning if hour < 12 else wording.afternoon
    return form.format(h=hour if hour <= 12 else hour - 12)


def add_event(wording: Wording, rng: random.Random) -> Exchange:
    """A new entry; the calendar answers with the day of the week."""
    day = world.random_date(rng).isoformat()
    time = f"{rng.randrange(8, 22):02d}:{rng.choice(('00', '00', '15', '30', '45'))}"
    on_the_hour = time.endswith("00") and time != "12:00"  # noon is neither morning nor afternoon
    spoken_time = _spoken_time(time, wording) if on_the_hour and rng.random() < 0.7 else time
    title = rng.choice(wording.titles)
    spoken_date = _spoken_date(day, wording, rng.choice(wording.date_forms))
    weekday = wording.weekdays[world.weekday(day)]
    phrasing = Phrasing(wording.add_event, rng)
    return Exchange(
        tool="add_event",
        arguments={"title": title, "date": day, "time": time},
        request=phrasing.request(title=title, date=spoken_date, time=spoken_time),
        result=json.dumps({"added": title, "weekday": weekday}, ensure_ascii=False),
        answer=phrasing.reply(
            wording.add_event_answers, title=title, weekday=weekday, date=spoken_date, clock=spoken_time
        ),
        thought=phrasing.thought(wording.thoughts["add_event"]),
    )


def list_events(wording: Wording, rng: random.Random, added: tuple[dict[str, str], ...] = ()) -> Exchange:
    """The plan of a date, with what this dialogue has added to it."""
    day = added[-1]["date"] if added else world.random_date(rng).isoformat()
    events = [(time, wording.titles[title]) for time, title in world.standing_events(day, len(wording.titles))]
    events += [(event["time"], event["title"]) for event in added if event["date"] == day]
    events.sort()
    date = _spoken_date(day, wording, rng.choice(wording.date_forms))
    named = wording.event_join.join(wording.event_form.format(clock=clock, title=title) for clock, title in events)
    phrasing = Phrasing(wording.list_events, rng)
    lines = wording.list_events_answers if events else wording.no_events_answers
    return Exchange(
        tool="list_events",
        arguments={"date": day},
        request=phrasing.request(date=date),
        result=json.dumps([{"time": clock, "title": title} for clock, title in events], ensure_ascii=False),
        answer=phrasing.reply(lines, date=date, events=named),
        thought=phrasing.thought(wording.thoughts["list_events"]),
    )


def interpreter(wording: Wording, rng: random.Random) -> Exchange:
    """A task for a line or two of Python, which is run here to know what it prints."""
    program = rng.choice(list(world.PROGRAMS))
    slots = {
        "n": rng.randint(5, 199),
        "a": rng.randint(2, 12) if program == "power" else rng.randint(20, 299),
        "b": rng.randint(2, 7) if program == "power" else rng.randint(3, 19),
        "k": rng.randint(2, 5),
        "word": rng.choice(world.WORDS),
        "items": ", ".join(str(rng.randint(1, 99)) for _ in range(rng.randint(3, 4))),
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


def echo(wording: Wording, rng: random.Random) -> Exchange:
    """Say it again: names and figures of this world, in an order that nobody can guess."""
    date = world.random_date(rng).isoformat()
    figures = str(rng.randint(10, 99999))
    things = (rng.choice(wording.titles), rng.choice(wording.cities), rng.choice(wording.days), rng.choice(world.WORDS))
    said = [date, figures, *things]
    rng.shuffle(said)
    phrase = ", ".join(said[: rng.randint(3, 6)])
    request = Phrasing(wording.echo, rng).request(phrase=phrase)
    return Exchange(tool="", arguments={"phrase": phrase}, request=request, result="", answer=phrase)


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
    "echo": echo,
    "greeting": greeting,
}
