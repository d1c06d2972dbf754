"""Previews of real conversations with the real tokenizer: every character is there, and what was cut adds up."""

import json
import re
from pathlib import Path

import pytest
from preview_runs import Page, words

from tuner.cli import run
from tuner.model.tokenizer import build_tokenizer
from tuner.preview.characters import Vocabulary, groups, visible

NUM_ROWS = 40


@pytest.fixture(scope="module")
def conversations(shared_data: Path) -> list[dict]:
    text = (shared_data / "glaive_toolcall" / "glaive_toolcall_zh_demo.json").read_text(encoding="utf-8")
    return json.loads(text)[:NUM_ROWS]


def test_the_groups_of_real_texts_are_their_characters(shared_data: Path, conversations: list[dict]):
    tokenizer = build_tokenizer(str(shared_data / "internlm2-7b-hub"))
    vocabulary = Vocabulary(tokenizer)
    texts = [turn["value"] for row in conversations for turn in row["conversations"]]
    assert sum(map(len, texts)) > 20_000
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(group.text for group in groups(ids, vocabulary)) == visible(text)


def test_a_preview_of_real_conversations_agrees_with_the_token_ledger(
    shared_data: Path, conversations: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The hub's directory has a tokenizer and no weights."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in conversations), encoding="utf-8")
    settings: dict[str, object] = {
        "model_path": shared_data / "internlm2-7b-hub", "data_path": data, "data_format": "sharegpt",
        "max_length": 400, "cache_dir": tmp_path / "cache", "weights": "pretrained",
    }  # fmt: skip
    assert run(words(settings, "-n", str(NUM_ROWS), "--html", str(tmp_path / "page.html"))) == 0
    ledger = capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    tokens = [token for pack in page.packs for document in pack for token in document]
    count = {mark: sum(len(token.ids) for token in tokens if token.mark == mark) for mark in ("trained", "masked")}
    told = {
        name: re.search(rf"- {name} +(?:[\d,]+ +)?([\d,]+) ", ledger)[1] for name in ("trained", "masked", "truncated")
    }
    assert {mark: f"{number:,}" for mark, number in count.items()} == {mark: told[mark] for mark in count}
    cut = sum(len(token.ids) for token in tokens if token.mark == "cut off")
    assert f"{cut:,}" == told["truncated"] != "0"
