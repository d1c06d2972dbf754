"""Real conversations and the real tokenizer: every token accounted for, and the second start at once."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tuner.dataset.build import PackedDataset, build_shards
from tuner.dataset.formats import FORMATS
from tuner.model.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return build_tokenizer(str(shared_data / "internlm2-7b-hub"))


def question_and_answer(row: dict) -> dict:
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}


def test_the_ledger_agrees_with_sentencepiece_and_the_second_start_takes_no_second(shared_data, tmp_path, tokenizer):
    """The conversations' tokens counted by another tokenizer, and the template's own by hand."""
    source = shared_data / "gsm8k" / "test.jsonl"
    settings = {
        "data_format": question_and_answer, "chat_template": "internlm2", "tokenizer": tokenizer, "max_length": 512,
        "cache_dir": tmp_path,
    }  # fmt: skip
    shards = build_shards(str(source), **settings)
    model = sentencepiece.SentencePieceProcessor(str(shared_data / "internlm2-7b-hub" / "tokenizer.model"))
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    answers = [len(model.encode(row["answer"])) + 1 for row in rows]  # with <|im_end|>
    # <s>, then <|im_start|> user \n ... <|im_end|> \n, then <|im_start|> assistant(2) \n ... <|im_end|> \n
    totals = [1 + 3 + len(model.encode(row["question"])) + 2 + 4 + answer + 1 for row, answer in zip(rows, answers)]
    assert shards.lengths.tolist() == totals
    assert shards.num_loss_tokens.tolist() == answers
    assert (shards.ledger.read.tokens, shards.ledger.trained) == (sum(totals), sum(answers))
    used = time.process_time()
    again = build_shards(str(source), **settings)
    assert time.process_time() - used < 1
    assert again.fingerprint == shards.fingerprint
    assert PackedDataset(shards, max_length=4096, seed=0).num_packs <= -(-sum(totals) // 4096) + 1


def test_files_of_the_field_lose_no_row_and_no_token(shared_data, tmp_path, tokenizer):
    paths = [str(shared_data / "gpteacher" / name) for name in ("toolformer-0.6.json", "roleplay-instruct.json")]
    shards = build_shards(
        paths, data_format="alpaca", chat_template="internlm2", tokenizer=tokenizer, max_length=300, too_long="split",
        on_bad_row="skip", cache_dir=tmp_path,
    )  # fmt: skip
    ledger = shards.ledger.check()
    rows = [row for path in paths for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    assert ledger.rows == len(rows)
    assert ledger.split > 0
    good = [row for row in rows if accepted(row)]
    assert ledger.read.documents == len(good)
    first = np.concatenate([shards.document(index).ids for index in range(2)])
    assert good[0]["instruction"] in tokenizer.decode(first)


def accepted(row: dict) -> bool:
    try:
        return bool(FORMATS["alpaca"](row))
    except ValueError:
        return False
