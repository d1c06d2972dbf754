"""The facts of the demo's world: its tools, and what each of them truly answers."""

import contextlib
import io
import json
import random
import zlib
from datetime import date
from typing import Any

YEAR = 2026
LOWEST, HIGHEST = 11, 39  # numbers that people ask about
WORDS = ("planet", "window", "garden", "silver", "music", "river", "orange", "letter")
PROGRAMS = {
    "sum": "print(sum(range(1, {n} + 1)))",
    "squares": "print(sum(i * i for i in range(1, {n} + 1)))",
    "power": "print({n} ** {b})",
    "remainder": "print({n} % {b})",
    "repeat": 'print("{word} " * {b})',
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


def random_date(rng: random.Random) -> date:
    """A day of the demo's year, late in a month: no hour of an appointment has the same number."""
    return date(YEAR, rng.randint(1, 12), rng.randint(20, 28))


def standing_events(day: date, num_titles: int) -> list[tuple[str, int]]:
    """What the calendar holds on a date before anyone adds to it: (time, title by index); often nothing."""
    number = fact_number("events", day.isoformat())
    if number % 2:
        return []
    return [(f"{8 + number // 3 % 12:02d}:00", number // 50 % num_titles)]
