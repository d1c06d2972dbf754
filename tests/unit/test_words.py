"""Text that is cut into words has the ids that the library gives it whole."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from chat_samples import bytelevel
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import CHINESE, made_text, write_directory
from tokenizers import AddedToken, Tokenizer

from tuner.dataset import words
from tuner.dataset.plain_tokenizer import PlainTokenizer
from tuner.dataset.words import CutEncoder, WholeEncoder, can_cut, text_encoder
from tuner.model.tokenizer import build_tokenizer

ODD = [
    " ",
    "  ",
    "▁",
    "\t",
    "\n",
    "\n ",
    "\r\n",
    "\0",
    "，",
    "——",
    "é",
    "e\u0301",
    "🙂",
    "𝔘",
    "\ufeff",
    "\x1b",
    "1",
    "23",
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> PlainTokenizer:
    backend = build_tokenizer(str(write_directory(tmp_path_factory.mktemp("model")))).backend_tokenizer
    return PlainTokenizer.from_state(backend.__getstate__())


@pytest.fixture(scope="module")
def pair(tables: PlainTokenizer) -> tuple[CutEncoder, Tokenizer]:
    assert can_cut(tables)
    tokenizer = tables.build()
    return CutEncoder(tokenizer, tables), tokenizer


def ids(data: bytes) -> list[int]:
    return np.frombuffer(data, np.uint32).tolist()


def whole(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


PARTS = st.one_of(
    st.sampled_from(ODD), st.sampled_from(["ba", "ne", "shi", "ing"]), st.text(max_size=3), st.sampled_from(CHINESE)
)
TEXTS = st.lists(st.lists(PARTS, max_size=20).map("".join), max_size=5)


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_any_text_has_the_ids_of_the_whole(pair: tuple[CutEncoder, Tokenizer], texts: list[str]):
    cut, tokenizer = pair
    assert [ids(data) for data in cut(texts)] == whole(tokenizer, texts)


def test_the_cuts_are_where_no_merge_reaches_across_and_almost_everywhere_there(pair: tuple[CutEncoder, Tokenizer]):
    cut, tokenizer = pair
    text = "".join(made_text(1, 400)).replace("\0", "")
    found, edges = cut._cut([text])
    assert "".join(found) == text
    assert edges == [0, len(found)]
    assert [ids_ for word in found for ids_ in whole(tokenizer, [word])[0]] == whole(tokenizer, [text])[0]
    assert len(found) > len(text) / 12


def test_a_cut_through_a_merge_would_be_seen(tables: PlainTokenizer):
    """The property above can fail: without one pair of neighbours the ids differ."""
    tokenizer = tables.build()
    broken = CutEncoder(tokenizer, dataclasses.replace(tables, merges=tables.merges[1:]))
    left, right = tables.merges[0]
    text = tables.pieces[left] + tables.pieces[right]
    assert ids(broken([text])[0]) != whole(tokenizer, [text])[0]


def test_remembered_and_forgotten_words_and_blocks_of_any_size_give_the_same(
    tables: PlainTokenizer, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = tables.build()
    texts = [text * random.Random(text).randint(1, 3) for text in made_text(2, 300)]
    expected = whole(tokenizer, texts)
    monkeypatch.setattr(words, "BLOCK", 50)
    monkeypatch.setattr(words, "MAX_WORDS", 20)
    monkeypatch.setattr(words, "LONGEST_WORD", 5)
    cut = CutEncoder(tokenizer, tables)
    for _ in range(2):
        assert [ids(data) for data in cut(texts)] == expected
        assert len(cut._known) <= 20 + 50
        assert max(map(len, cut._known), default=0) <= 5


def test_nothing_from_nothing(pair: tuple[CutEncoder, Tokenizer]):
    cut, _ = pair
    assert cut([]) == []
    assert cut(["", ""]) == [b"", b""]


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("model", "ignore_merges", True),  # a whole word would be looked up first
        ("model", "byte_fallback", False),  # unknown characters beside each other become one id
        ("model", "dropout", 0.1),
        ("model", "continuing_subword_prefix", "##"),
        ("frame", "pre_tokenizer", {"type": "Digits", "individual_digits": False}),
        ("frame", "normalizer", {"type": "NFKC"}),
        ("frame", "normalizer", {"type": "Replace", "pattern": {"String": "  "}, "content": "▁"}),
    ],
)
def test_a_tokenizer_that_looks_farther_is_not_cut(tables: PlainTokenizer, where: str, name: str, value: object):
    changed = dataclasses.replace(tables, **{where: {**getattr(tables, where), name: value}})
    assert can_cut(tables)
    assert not can_cut(changed)


def test_a_tokenizer_with_words_of_its_own_reads_texts_whole(tables: PlainTokenizer):
    other = PlainTokenizer.from_state(bytelevel("qwen2.5").backend_tokenizer.__getstate__())
    assert not can_cut(other)
    assert isinstance(text_encoder(other), WholeEncoder)
    assert isinstance(text_encoder(tables), CutEncoder)
    texts = made_text(3, 20)
    assert [ids(data) for data in text_encoder(other)(texts)] == whole(other.build(), texts)


def test_white_space_among_the_added_tokens_is_not_cut(tables: PlainTokenizer):
    added = AddedToken("        ", normalized=True, special=False)
    backend = tables.build()
    backend.add_tokens([added])
    assert not can_cut(PlainTokenizer.from_state(backend.__getstate__()))


@pytest.mark.parametrize("length", [pytest.param(300_000, marks=pytest.mark.slow), 50_000])
def test_internlm2s_own_tokenizer_on_real_text(shared_data: Path, length: int):
    """On 1.5 million tokens of books and conversations in two languages, or a sixth of them."""
    backend = build_tokenizer(str(shared_data / "internlm2-7b-hub")).backend_tokenizer
    tables = PlainTokenizer.from_state(backend.__getstate__())
    cut, tokenizer = text_encoder(tables), tables.build()
    assert isinstance(cut, CutEncoder)
    files = sorted(path for path in shared_data.rglob("*") if path.suffix in (".json", ".jsonl", ".txt"))
    num_tokens = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")[:length]
        texts = [text[start : start + 3000] for start in range(0, len(text), 3000)]
        found = [ids(data) for data in cut(texts)]
        assert found == whole(tokenizer, texts), path
        num_tokens += sum(map(len, found))
    assert num_tokens > 4 * length
