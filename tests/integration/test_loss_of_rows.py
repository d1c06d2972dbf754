"""From rows to batches: what a setting or a row says of the loss is what the step trains and the ledger counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import WEATHER, bytelevel

from tuner.dataset.build import build_shards
from tuner.dataset.rendering import Rendering
from tuner.dataset.shards import Shards
from tuner.errors import UserError

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = {"messages": [USER, said("One."), USER, said("Two.")]}
CALLING = {
    "messages": [USER, said("Wait.", tool_calls=[CALL]), {"role": "tool", "content": "22"}, said("Warm.")],
    "tools": [{"type": "function", "function": WEATHER}],
}


def shards_of(folder: Path, rows: list[dict[str, Any]], rendering: Rendering | str, **changes: Any) -> Shards:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "data_format": "openai",
        "chat_template": rendering,
        "tokenizer": bytelevel("qwen2.5"),
        "max_length": 2000,
        "cache_dir": folder / "cache",
    }
    return build_shards(str(folder / "rows.jsonl"), **settings | changes)


def trained_texts(shards: Shards) -> list[str]:
    tokenizer = bytelevel("qwen2.5")
    documents = map(shards.document, range(len(shards)))
    return [tokenizer.decode(document.ids[document.trained]) for document in documents]


CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("rendering", "expected"),
    [
        ("qwen2.5", ["One.<|im_end|>Two.<|im_end|>", f"Wait.\n{CALL_TEXT}Warm.<|im_end|>"]),
        (Rendering("qwen2.5", "last"), ["Two.<|im_end|>", "Warm.<|im_end|>"]),
        (Rendering("qwen2.5", "last", train_newline=True), ["Two.<|im_end|>\n", "Warm.<|im_end|>\n"]),
        (Rendering("qwen2.5", "calls"), [CALL_TEXT]),
        (Rendering("qwen2.5", "thoughts"), ["Wait.\n"]),
    ],
)
def test_a_choice_reaches_the_shards(tmp_path: Path, rendering: Rendering | str, expected: list[str]):
    shards = shards_of(tmp_path, [TALK, CALLING], rendering)
    assert trained_texts(shards) == expected
    left_out = 2 - len(expected)
    assert shards.ledger.untrained.documents == left_out, "without calls there is nothing to train: counted, no error"
    assert shards.ledger.kept.documents == len(expected)


def test_a_choice_has_shards_of_its_own_and_the_default_is_the_name_alone(tmp_path: Path):
    plain = shards_of(tmp_path, [TALK], "qwen2.5")
    named = shards_of(tmp_path, [TALK], Rendering("qwen2.5"))
    last = shards_of(tmp_path, [TALK], Rendering("qwen2.5", "last"))
    newline = shards_of(tmp_path, [TALK], Rendering("qwen2.5", train_newline=True))
    assert named.directories == plain.directories
    assert len({shards.directories[0] for shards in (plain, last, newline)}) == 3
    assert len({shards.fingerprint for shards in (plain, last, newline)}) == 3
    assert all(np.array_equal(plain.document(0).ids, other.document(0).ids) for other in (last, newline))


def test_a_choice_that_leaves_nothing_of_all_rows_says_so(tmp_path: Path):
    with pytest.raises(UserError, match="No document is left"):
        shards_of(tmp_path, [TALK], Rendering("qwen2.5", "calls"))


def test_a_choice_that_is_none_is_told_with_the_nearest(tmp_path: Path):
    with pytest.raises(UserError, match=r"loss_on='call' is not known. Allowed: assistant, last, calls, thoughts\..*"):
        shards_of(tmp_path, [TALK], Rendering("qwen2.5", "call"))
