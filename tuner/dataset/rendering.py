"""How conversations are rendered: by which template, and which of their words are trained, with which weight."""

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.dataset.messages import Message, RowError

# Which of the model's own words are trained: every turn; the last one; in turns with tool calls only, the calls and
# the mark that ends the turn; or what is said there before the first call.
LOSS_ON = ("assistant", "last", "calls", "thoughts")
LEAST_WEIGHT, MOST_WEIGHT = 1e-3, 1e3  # a weight beyond them is a slip, and its products would leave fp16
LOSS_WORDS = f"true or false, or a weight from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"


@dataclass(frozen=True)
class Rendering:
    """A chat template by name and what it trains; `build_shards` takes it in the place of the name alone."""

    chat_template: str
    loss_on: str = "assistant"
    train_newline: bool = False
    parallel_tool_calls: str = "template"  # a key of messages.PARALLEL_TOOL_CALLS


def is_loss(value: object) -> bool:
    """Whether a message may have this `loss`: true, false, or what its tokens count in the loss; 0 is false."""
    return isinstance(value, bool | int | float) and (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT)


def message_weight(message: Message) -> float:
    """What a token of this message counts in the loss: 0 is not trained. Raises RowError for a `loss` that is none."""
    if message["role"] != "assistant":
        return 0.0
    loss = message.get("loss", True)
    if not is_loss(loss):
        raise RowError(f"Expected the loss of a message to be {LOSS_WORDS}, got {repr(loss)[:80]}.")
    return float(loss)


def chosen(messages: Sequence[Message], loss_on: str) -> Sequence[Message]:
    """The messages, `loss: False` on those of the model that `loss_on` leaves out whole."""
    if loss_on == "assistant":
        return messages
    if loss_on == "last":
        last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        kept = {last}
    else:
        kept = {place for place, message in enumerate(messages) if message.get("tool_calls")}
    return [message if place in kept else {**message, "loss": False} for place, message in enumerate(messages)]


def trains_part(loss_on: str, *, is_call: bool) -> bool:
    """Whether the calls of a turn (and its end), or the words before them, are trained where the turn is."""
    return loss_on != ("thoughts" if is_call else "calls")
