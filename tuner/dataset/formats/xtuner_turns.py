"""XTuner's conversations: exchanges of an input and an output, each with its own system text."""

from typing import Any

from tuner.dataset.formats.fields import Row, field, objects, require
from tuner.dataset.formats.openai_messages import conversation
from tuner.dataset.messages import Message, RowError
from tuner.nearest import nearest

TURN_KEYS = ("system", "input", "output", "need_eos_token", "output_with_loss")


def xtuner(row: Row) -> dict[str, Any]:
    """{"conversation": [{"input", "output", "system"?, "output_with_loss"?}, ...]} as XTuner's map functions write it.

    One exchange with an empty input is a document of plain text, as in XTuner's pre-training files.
    """
    turns = objects(row, "conversation", "turn")
    messages: list[Message] = []
    for place, turn in enumerate(turns):
        _check(turn, f"turn {place}")
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        messages.append({"role": "user", "content": turn.get("input") or ""})
        answer: Message = {"role": "assistant", "content": turn["output"]}
        if turn.get("output_with_loss") is not None:
            answer["loss"] = turn["output_with_loss"]
        messages.append(answer)
    if len(turns) == 1 and not turns[0].get("input") and not turns[0].get("system"):
        require(turns[0].get("output_with_loss") is not False, "a text to train on (output_with_loss)", False)
        return {"text": turns[0]["output"]}
    return conversation(messages, None)


def _check(turn: Row, where: str) -> None:
    for key in turn:
        close = nearest(key, TURN_KEYS, cutoff=0.85)
        if key not in TURN_KEYS and close:  # a misspelt key would lose what it holds
            raise RowError(f"Expected the keys of {where} to be among {TURN_KEYS}, got {key!r}.{close}")
    answer = field(turn, "output", str, where)
    require(answer != "", f"'output' of {where} to hold an answer", answer)
    for key in ("input", "system"):
        require(isinstance(turn.get(key), str | None), f"{key!r} of {where} to be text", turn.get(key))
    trained = turn.get("output_with_loss")
    require(isinstance(trained, bool | None), f"'output_with_loss' of {where} to be true or false", trained)
    ended = turn.get("need_eos_token")
    require(ended in (None, True), f"'need_eos_token' of {where} to be true, for every turn ends with its mark", ended)


XTUNER_EXAMPLE = {
    "conversation": [
        {"system": "Be brief.", "input": "Who wrote Hamlet?", "output": "Shakespeare.", "output_with_loss": False},
        {"input": "When?", "output": "Around 1600."},
    ]
}
