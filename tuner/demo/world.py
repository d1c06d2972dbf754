"""The facts of the demo's world: its tools, and what each of them truly answers."""

import contextlib
import io
import json
import random
import zlib
from datetime import date
from typing import Any

YEAR = 2026
WORDS = (
    "planet", "window", "garden", "silver", "music", "river", "orange", "letter", "summer", "bridge", "pencil",
    "winter", "banana", "castle", "forest", "island", "kitten", "lemon", "market", "number", "ocean", "paper", "rabbit",
    "school", "table", "velvet", "water", "yellow", "cloud", "dragon",
)
PROGRAMS = {
    "sum": "print(sum(range(1, {n} + 1)))",
    "squares": "print(sum(i * i for i in range(1, {n} + 1)))",
    "gcd": "import math\nprint(math.gcd({a}, {b}))",
    "power": "print({a} ** {b})",
    "remainder": "print({a} % {b})",
    "sort": "print(sorted([{items}]))",
    "largest": "print(max([{items}]))",
    "binary": "print(bin({n})[2:])",
    "prime": "print(all({n} % i for i in range(2, {n})))",
    "length": 'print(len("{word}"))',
    "repeat": 'print("{word} " * {k})',
}


def _schema(name: str, description: str, *parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    body = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": body}}


SCHEMAS: dict[str, dict[str, Any]] = {
    "calculator": _schema("calculator", "Work out an expression", "expression"),
    "get_weather": _schema("get_weather", "Weather of a city on a day", "city", "day"),
    "add_event": _schema("add_event", "Put an event into the calendar", "title", "date", "time"),
    "list_events": _schema("list_events", "Events of a date", "date"),
    "interpreter": {"type": "code_interpreter", "description": "Run Python code."},
}


def run_python(code: str) -> str:
    """What a program of ours prints, without white space at the end; the interpreter's and the calculator's truth."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # only the programs of this module come here
    return printed.getvalue().strip()


def calculate(expression: str) -> str:
    """The value of an arithmetic expression; whole where it is whole: '84/4' -> '21'."""
    return run_python(f"print(format({expression}, '.10g'))")


def fact_number(*key: object) -> int:
    """A number that belongs to this key for ever, on every machine."""
    return zlib.crc32(json.dumps(key).encode())


def weather(city: int, day: int, num_conditions: int) -> tuple[int, int, int]:
    """(condition, low, high) of a city and a day, all by index; degrees Celsius, the same in every language."""
    number = fact_number("weather", city, day)
    low = number // 7 % 25
    return number % num_conditions, low, low + 3 + number // 1000 % 8


def weekday(iso_date: str) -> int:
    """Day of the week of an ISO date, Monday = 0."""
    return date.fromisoformat(iso_date).weekday()


def random_date(rng: random.Random) -> date:
    """A day of the demo's year."""
    return date.fromordinal(date(YEAR, 1, 1).toordinal() + rng.randrange(365))


def standing_events(iso_date: str, num_titles: int) -> list[tuple[str, int]]:
    """What the calendar holds on a date before anyone adds to it: (time, title by index); often nothing."""
    number = fact_number("events", iso_date)
    if number % 2:
        return []
    return [(f"{8 + number // 3 % 12:02d}:00", number // 50 % num_titles)]
