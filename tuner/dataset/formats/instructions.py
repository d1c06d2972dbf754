"""One instruction and its answer in a row, with what was said before."""

from typing import Any

from tuner.dataset.formats.fields import Row, field, require
from tuner.dataset.messages import Message, RowError


def alpaca(row: Row) -> dict[str, Any]:
    """{"instruction", "input"?, "output" or "response", "system"?, "history"?: [[question, answer], ...]}."""
    question = field(row, "instruction", str)
    more = row.get("input") or ""
    require(isinstance(more, str), "'input' to be a str", more)
    question = f"{question}\n{more}" if more and question else question + more
    require(question != "", "'instruction' or 'input' to ask something", question)
    there = [key for key in ("output", "response") if key in row]
    given = [key for key in there if row[key] is not None] or there[:1]
    require(len(given) == 1, "either 'output' or 'response' in the row", sorted(map(str, row)))
    answer = field(row, given[0], str)
    require(answer != "", f"{given[0]!r} to hold the answer to train on", answer)
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": field(row, "system", str)})
    history = row.get("history") or []
    require(isinstance(history, list), "'history' to be a list of pairs", history)
    for pair in history:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        require(whole and pair[1] != "", "each entry of 'history' to be [question, answer]", pair)
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return {"messages": [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def qa(row: Row) -> dict[str, Any]:
    """{"question", "answer"} or {"prompt", "completion" or "response"}, and "system"?: one exchange, as in GSM8K."""
    asked = [key for key in ("question", "prompt") if row.get(key) is not None]
    said = [key for key in ("answer", "completion", "response") if row.get(key) is not None]
    keys = sorted(map(str, row))
    if len(asked) != 1:
        raise RowError(f"Expected either 'question' or 'prompt' in the row, which has {keys}.")
    if len(said) != 1:
        raise RowError(f"Expected one of 'answer', 'completion' and 'response' in the row, which has {keys}.")
    question, answer = field(row, asked[0], str), field(row, said[0], str)
    require(question != "", f"{asked[0]!r} to ask something", question)
    require(answer != "", f"{said[0]!r} to hold the answer to train on", answer)
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": field(row, "system", str)})
    return {"messages": [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ALPACA_EXAMPLE = {
    "instruction": "Translate to English.",
    "input": "白日依山尽",
    "output": "The white sun sets behind the hills.",
    "history": [["Do you know Chinese?", "A little."]],
}
QA_EXAMPLE = {"question": "What is 6 times 7?", "answer": "6 * 7 = 42\n#### 42"}
