"""Shards by a tokenizer's own chat template: on any number of workers, refused rows aside, converted as trained."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from chat_samples import made_row
from jinja_families import FAMILIES, own
from transformers import PreTrainedTokenizerFast

from tuner.convert.settings import write_tokenizer
from tuner.dataset import prepare
from tuner.dataset.prepare import build_shards
from tuner.dataset.shards import Shards
from tuner.errors import UserError
from tuner.model.tokenizer import build_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixty rows, ten of them with tools."""

    rng = random.Random(0)
    rows = [made_row(rng, tools=place % 6 == 0) for place in range(60)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shards(data: Path, tokenizer: PreTrainedTokenizerFast, cache: str, **settings: str) -> Shards:
    settings = {"data_format": "openai", "chat_template": "auto", **settings}
    return build_shards(str(data), tokenizer=tokenizer, max_length=4096, cache_dir=data.parent / cache, **settings)


def test_two_workers_write_what_one_does(data: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = own("thinking")
    alone = shards(data, tokenizer, "one")
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(prepare, "num_cores", lambda: 2)
    together = shards(data, tokenizer, "two")
    assert len(alone) == len(together) == 60
    for index in range(60):
        for one, two in zip(alone.document(index), together.document(index), strict=True):
            assert np.array_equal(one, two)


def test_rows_that_a_template_has_no_place_for_are_set_aside_with_their_reason(data: Path):
    tokenizer = own("lines")
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: bad row: the chat template leaves out the tool 'get_weather'"
    ):
        shards(data, tokenizer, "cache")
    kept = shards(data, tokenizer, "cache", on_bad_row="skip")
    assert (len(kept), kept.ledger.skipped) == (50, 10)


def test_a_changed_template_makes_other_shards_and_says_so(data: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = own("generation")
    shards(data, tokenizer, "cache", on_bad_row="skip")
    tokenizer.chat_template = FAMILIES["generation"].jinja.replace("{% for", "{{ '!' }}{% for", 1)
    capsys.readouterr()
    changed = shards(data, tokenizer, "cache", on_bad_row="skip")
    assert "tokenised again; since the time before has changed: text of the chat template\n" in capsys.readouterr().out
    assert tokenizer.decode(changed.document(0)[0]).startswith("!")


def test_a_converted_tokenizer_keeps_its_template(data: Path, tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    own("thinking").save_pretrained(source)
    (source / "template.json").write_text(json.dumps({"chat_template": "jinja"}))
    out.mkdir()
    write_tokenizer(source, out)
    tokenizer = build_tokenizer(str(out))
    trained = shards(data, tokenizer, "cache", chat_template="jinja").document(1)
    row = json.loads(data.read_text().splitlines()[1])
    assert "tools" not in row
    messages = [{key: value for key, value in message.items() if key != "loss"} for message in row["messages"]]
    assert trained[0].tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
