"""What a language must bring to the demo's world: names, requests, replies."""

from collections.abc import Mapping
from dataclasses import dataclass

Lines = tuple[str, ...]
Topics = Mapping[str, Lines]


@dataclass(frozen=True)
class Wording:
    """All text of one language; lists that name the same things have the same order in every language."""

    code: str
    cities: Lines
    days: Lines  # the value of the argument `day`
    day_phrases: Lines  # the same days as they stand in a sentence
    conditions: Lines
    weekdays: Lines  # Monday first
    months: Lines
    titles: Lines
    names: Lines
    foods: Lines
    hobbies: Lines
    date_form: str  # slots: month, day
    calculator: Topics  # expression -> requests
    calculator_answers: Lines
    weather: Lines
    weather_answers: Lines
    add_event: Lines
    add_event_answers: Lines
    list_events: Lines
    list_events_answers: Lines
    no_events_answers: Lines
    event_form: str
    event_join: str
    interpreter: Topics  # name of a program -> requests
    interpreter_answers: Topics
    thoughts: Topics  # tool -> what is said before the call
    talk: tuple[tuple[str, str], ...]  # request and reply, with slots
    greetings: tuple[tuple[str, str], ...]  # request and reply, fixed
    systems: Lines
    openers: Lines
    calendar_facts: Lines
