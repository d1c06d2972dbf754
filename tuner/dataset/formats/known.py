"""The formats by name."""

from collections.abc import Callable
from typing import Any

from tuner.dataset.formats.fields import Row
from tuner.dataset.formats.instructions import alpaca
from tuner.dataset.formats.openai_messages import openai
from tuner.dataset.formats.plain_text import text

FORMATS: dict[str, Callable[[Row], dict[str, Any]]] = {"openai": openai, "alpaca": alpaca, "text": text}
