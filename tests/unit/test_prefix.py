"""Tokenizers that put a space before texts, as Llama 2's: our ids are those of transformers for the rendered text."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from chat_samples import MARKS, made_row
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import train_model
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tuner.dataset.chat_template import CHAT_TEMPLATES, Segment, render
from tuner.dataset.formats import FORMATS
from tuner.dataset.tokenize import Encoder
from tuner.dataset.words import CutEncoder
from tuner.errors import UserError

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
FORMS: dict[str, dict[str, Any]] = {
    "legacy": {"normalizer": LEGACY, "pre_tokenizer": None},
    "always": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}},
    "first": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}},
    "always, words": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "always", "split": True}},
    "first, words": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "first", "split": True}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """As transformers reads a tokenizer.model whose sentencepiece adds a dummy prefix."""
    directory: Path = tmp_path_factory.mktemp("llama")
    (directory / "tokenizer.model").write_bytes(train_model(add_dummy_prefix=True, user_defined_symbols=[]))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    marks = {*MARKS["internlm2"], *MARKS["chatml"]} - {"<s>", "</s>"}
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(m, special=True, normalized=False) for m in sorted(marks)]
    )
    return tokenizer


def changed(tokenizer: PreTrainedTokenizerFast, **entries: Any) -> PreTrainedTokenizerFast:
    source = json.loads(tokenizer.backend_tokenizer.to_str()) | entries
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(source)))


def test_transformers_reads_such_a_model_as_one_of_the_forms(llama: PreTrainedTokenizerFast):
    assert json.loads(llama.backend_tokenizer.to_str())["pre_tokenizer"] == FORMS["always"]["pre_tokenizer"]
    assert llama.tokenize("</s>bane</s> bane") == ["</s>", *llama.tokenize("bane"), "</s>", *llama.tokenize("bane")]


def theirs(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("template", ["internlm2", "chatml"])
def test_conversations_have_the_ids_of_their_rendered_text(llama: PreTrainedTokenizerFast, form: str, template: str):
    tokenizer = changed(llama, **FORMS[form])
    ours = pickle.loads(pickle.dumps(Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES[template])))
    rng = random.Random(form)
    rows = [made_row(rng, tools=True, interpreter=template == "internlm2") for _ in range(40)]
    rendered = [render(FORMATS["openai"](row), CHAT_TEMPLATES[template]) for row in rows]
    assert sum(segment.trained for segments in rendered for segment in segments) > 80
    for segments, document in zip(rendered, ours.encode(rendered), strict=True):
        assert document.ids.tolist() == theirs(tokenizer, "".join(segment.text for segment in segments))


PARTS = st.sampled_from(["ba", "ne", " ", "  ", "▁", "\n", "，", "é", "🙂", "</s>", "<|im_end|>", "<|im_start|>"])


@pytest.mark.parametrize("form", FORMS)
def test_any_text_between_marks_has_its_ids(llama: PreTrainedTokenizerFast, form: str):
    tokenizer = changed(llama, **FORMS[form])
    ours = Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES["chatml"])

    @given(st.lists(PARTS, max_size=12))
    @settings(max_examples=60, deadline=None)
    def check(parts: list[str]) -> None:
        segments = [Segment(text, False, text.startswith("<")) for text in parts]
        assert ours.encode([segments])[0].ids.tolist() == theirs(tokenizer, "".join(parts))

    check()


@pytest.mark.parametrize("form", FORMS)
def test_the_space_comes_once_before_text_that_is_trained_in_part(llama: PreTrainedTokenizerFast, form: str):
    tokenizer = changed(llama, **FORMS[form])
    ours = Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES["chatml"])
    mark, question, answer, end = "<|im_start|>", "ba ne\n", "shi", "<|im_end|>"
    segments = [Segment(mark, False, True), Segment(question, False, False), Segment(answer, True, False)]
    document = ours.encode([[*segments, Segment(end, True, True)]])[0]
    assert document.ids.tolist() == theirs(tokenizer, mark + question + answer + end)
    assert document.ids[~document.trained].tolist() == theirs(tokenizer, mark + question)


def test_texts_are_cut_as_those_of_tokenizers_without_the_space(llama: PreTrainedTokenizerFast):
    for form in ("legacy", "always", "first"):
        ours = Encoder.from_tokenizer(changed(llama, **FORMS[form]), CHAT_TEMPLATES["chatml"])
        assert isinstance(ours._encode_plain, CutEncoder)


@pytest.mark.parametrize(
    "entries",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, *LEGACY["normalizers"]]}},
        {"normalizer": LEGACY, "pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"normalizer": REPLACE},
        {"pre_tokenizer": {**METASPACE, "prepend_scheme": "first", "replacement": "_"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [FORMS["first"]["pre_tokenizer"]]}},
    ],
    ids=str,
)
def test_another_form_is_refused(llama: PreTrainedTokenizerFast, entries: dict[str, Any]):
    with pytest.raises(UserError, match="puts a space before every text"):
        Encoder.from_tokenizer(changed(llama, **entries), CHAT_TEMPLATES["chatml"])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_marks_that_take_what_is_beside_them_are_refused(llama: PreTrainedTokenizerFast, flag: str):
    tokens = json.loads(llama.backend_tokenizer.to_str())["added_tokens"]
    odd = [{**token, flag: token["content"] == "<|im_end|>"} for token in tokens]
    with pytest.raises(UserError, match="puts a space before every text"):
        Encoder.from_tokenizer(changed(llama, added_tokens=odd), CHAT_TEMPLATES["chatml"])
