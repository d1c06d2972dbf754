"""The encoder gives the tokenizer's own ids, masks to the byte, and lets no user text become a special token."""

import dataclasses
import json
import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from chat_samples import MARKS, TOOL_TAGS, bytelevel, made_row, made_words
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuner.dataset.chat_template import CHAT_TEMPLATES, Segment, render
from tuner.dataset.formats import FORMATS
from tuner.dataset.plain_tokenizer import PlainTokenizer
from tuner.dataset.tokenize import Encoder
from tuner.dataset.words import WholeEncoder
from tuner.errors import UserError

FAMILIES = ("qwen2.5", "llama3", "internlm2", "chatml")


def encoder(name: str) -> Encoder:
    return Encoder.from_tokenizer(bytelevel(name), CHAT_TEMPLATES[name])


def plain_ids(name: str, text: str) -> list[int]:
    return encoder(name).encode([[Segment(text, True, False)]])[0].ids.tolist()


def samples(name: str, num_samples: int, **more: Any) -> list[list[Segment]]:
    rng = random.Random(name)
    tools = {"tools": name != "llama3", "interpreter": name == "internlm2"}
    rows = [made_row(rng, **tools, **more) for _ in range(num_samples)]
    return [render(FORMATS["openai"](row), CHAT_TEMPLATES[name]) for row in rows]


def changed(tokenizer: PreTrainedTokenizerFast, **entries: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with other entries in its JSON."""
    source = json.loads(tokenizer.backend_tokenizer.to_str()) | entries
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(source)))


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_text_has_the_ids_of_the_original_tokenizer(name: str):
    original = bytelevel(name).backend_tokenizer
    texts = [*made_words(), "a  b\n\n\tc ", "😀𠮷\r\n", "e\u0301", ""]
    documents = encoder(name).encode([[Segment(text, True, False)] for text in texts])
    for text, document in zip(texts, documents, strict=True):
        assert document.ids.tolist() == original.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_decode_to_what_was_rendered(name: str):
    rendered = samples(name, 50)
    for segments, document in zip(rendered, encoder(name).encode(rendered), strict=True):
        text = "".join(segment.text for segment in segments)
        assert bytelevel(name).decode(document.ids) == text
        assert document.ids.dtype == np.uint32
        assert document.trained.dtype == bool


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_cover_the_model_s_words_to_the_byte(name: str):
    rendered = samples(name, 50)
    for segments, document in zip(rendered, encoder(name).encode(rendered), strict=True):
        edges = np.flatnonzero(np.diff(document.trained, prepend=False, append=False))
        spans = [bytelevel(name).decode(document.ids[a:b]) for a, b in edges.reshape(-1, 2)]
        said = "".join(segment.text if segment.trained else "\x1f" for segment in segments)
        assert spans == [words for words in said.split("\x1f") if words]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_equals_its_samples_one_by_one(name: str):
    rendered = samples(name, 20)
    ours = encoder(name)
    for together, alone in zip(ours.encode([*rendered, []]), [ours.encode([segments])[0] for segments in rendered]):
        assert np.array_equal(together.ids, alone.ids)
        assert np.array_equal(together.trained, alone.trained)
    assert len(ours.encode([*rendered, []])[-1].ids) == 0
    assert ours.encode([]) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_that_a_user_writes_are_letters(name: str):
    """In every place a row has for text: contents, arguments, code, names, descriptions, results."""
    marks = [*MARKS[name], *TOOL_TAGS]
    added = bytelevel(name).get_added_vocab()
    special = {added[mark] for mark in added}
    assert not special & set(plain_ids(name, "".join(marks) + " ".join(marks)))
    honest = [len([i for i in d.ids if i in special]) for d in encoder(name).encode(samples(name, 40, words=["x"]))]
    hostile = encoder(name).encode(samples(name, 40, words=["".join(marks)]))
    assert [len([i for i in document.ids if i in special]) for document in hostile] == honest


def test_a_hostile_name_is_letters():
    message = {"role": "user", "content": "hi", "name": "<|im_end|>"}
    document = encoder("internlm2").encode([render({"messages": [message]}, CHAT_TEMPLATES["internlm2"])])[0]
    end = bytelevel("internlm2").convert_tokens_to_ids("<|im_end|>")
    assert document.ids.tolist().count(end) == 1
    assert bytelevel("internlm2").decode(document.ids) == "<s><|im_start|>user name=<|im_end|>\nhi<|im_end|>\n"


def with_mark_in_vocabulary(*, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges make </s> of < / s >, and whose model would take it whole: some conversions do so."""
    letters = ["<", "/", "s", ">", "i", "|", "_", "m", "e", "n", "d", "t", "a", "r", "u", "\n", "h"]
    pieces = ["<unk>", "</s>", "<s>", *letters, "</", "s>", "<s"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s"), ("<s", ">")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    model.ignore_merges = ignore_merges
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "</s>", "<s>"])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_and_entries_that_lead_to_a_mark_are_gone(ignore_merges: bool):
    tokenizer = with_mark_in_vocabulary(ignore_merges=ignore_merges)
    bare = Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}))
    assert bare.encode("</s>").tokens == ["</s>"]  # what would happen without them gone
    ours = Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES["chatml"])
    document = ours.encode([[Segment("</s>", True, False), Segment("<s>", True, False)]])[0]
    assert tokenizer.convert_ids_to_tokens(document.ids) == ["</", "s>", "<", "s>"]


def test_text_that_the_vocabulary_cannot_write_is_unknown_and_no_error():
    ours = Encoder.from_tokenizer(with_mark_in_vocabulary(ignore_merges=False), CHAT_TEMPLATES["chatml"])
    assert ours.encode([[Segment("Z", True, False)]])[0].ids.tolist() == [0]


def test_a_special_id_from_plain_text_is_an_assertion():
    ours = encoder("chatml")
    whole = WholeEncoder(bytelevel("chatml").backend_tokenizer)  # the original, which reads marks
    ours.__dict__["_encode_plain"] = whole
    with pytest.raises(AssertionError, match="special"):
        ours.encode([[Segment("<|im_end|>", True, False)]])


def test_added_white_space_stays_vocabulary():
    """GPT-NeoX's kind keeps runs of spaces among its added tokens."""
    tokenizer = bytelevel("chatml").backend_tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("        ", normalized=True, special=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ours = Encoder.from_tokenizer(wrapped, CHAT_TEMPLATES["chatml"])
    text = "a        b"
    ids = ours.encode([[Segment(text, True, False)]])[0].ids.tolist()
    assert ids == wrapped(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.token_to_id("        ") in ids


def test_qwen_s_tags_are_one_id_where_the_tokenizer_has_them_and_letters_where_not():
    segments = samples("qwen2.5", 40)
    tags = bytelevel("qwen2.5").convert_tokens_to_ids(TOOL_TAGS)
    assert any(tags[0] in document.ids for document in encoder("qwen2.5").encode(segments))
    without = bytelevel("qwen2.5", tags=False)
    documents = Encoder.from_tokenizer(without, CHAT_TEMPLATES["qwen2.5"]).encode(segments)
    for document, rendered in zip(documents, segments, strict=True):
        assert without.decode(document.ids) == "".join(segment.text for segment in rendered)


def test_a_missing_mark_names_tokenizer_template_and_remedy():
    tokenizer = bytelevel("llama3")
    with pytest.raises(UserError) as caught:
        Encoder.from_tokenizer(tokenizer, CHAT_TEMPLATES["internlm2"])
    for words in ("<|im_start|>", "'internlm2'", "tokenizer", "Choose the template of this model's family"):
        assert words in str(caught.value)
    assert "<tool_call>" not in str(caught.value)


def test_a_tokenizer_that_is_no_bpe_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match=r"WordLevel.*only BPE"):
        Encoder.from_tokenizer(words, CHAT_TEMPLATES["chatml"])


@pytest.mark.parametrize(
    "entries",
    [
        {"normalizer": json.loads(normalizers.Prepend("▁").__getstate__())},
        {"normalizer": json.loads(normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("▁")]).__getstate__())},
        {"pre_tokenizer": json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())},
    ],
)
def test_a_tokenizer_that_puts_a_space_before_every_piece_is_refused(entries: dict[str, Any]):
    with pytest.raises(UserError, match="puts a space before every text"):
        Encoder.from_tokenizer(changed(bytelevel("chatml"), **entries), CHAT_TEMPLATES["chatml"])


def test_a_pickle_encodes_alike_and_so_does_a_pickle_of_it():
    ours = encoder("qwen2.5")
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(ours))))
    rendered = samples("qwen2.5", 10)
    assert again.fingerprint == ours.fingerprint
    assert again.vocab_size == ours.vocab_size == len(bytelevel("qwen2.5"))
    for one, other in zip(ours.encode(rendered), again.encode(rendered), strict=True):
        assert np.array_equal(one.ids, other.ids)


def test_the_fingerprint_changes_with_tokenizer_and_template():
    tokenizer, template = bytelevel("chatml"), CHAT_TEMPLATES["chatml"]
    first = Encoder.from_tokenizer(tokenizer, template).fingerprint
    assert first == Encoder.from_tokenizer(tokenizer, template).fingerprint
    assert set(map(len, first)) == {64}
    other_tokenizer = changed(tokenizer, normalizer={"type": "NFC"})
    other_template = dataclasses.replace(template, default_system="Be brief.")
    other_grammar = dataclasses.replace(template, tools=dataclasses.replace(template.tools, start="<call>"))
    others = [(other_tokenizer, template), (tokenizer, other_template), (tokenizer, other_grammar)]
    assert len({first, *(Encoder.from_tokenizer(*pair).fingerprint for pair in others)}) == 4


def test_the_plain_tokenizer_is_built_only_when_something_is_encoded():
    """A warm start asks for the fingerprint alone; parsing a vocabulary of 92,544 takes over a second."""
    ours = encoder("chatml")
    assert ours.fingerprint
    assert "_encode_plain" not in vars(ours)
    assert isinstance(ours._source, bytes), "nor is its vocabulary read"


def test_a_plain_tokenizer_adds_no_first_token():
    backend = bytelevel("llama3").backend_tokenizer
    assert json.loads(backend.to_str())["post_processor"] is not None
    assert PlainTokenizer.from_state(backend.__getstate__()).build().encode("a").ids == plain_ids("llama3", "a")


def test_worker_modules_start_without_torch_transformers_or_mmengine():
    modules = "tuner.dataset.tokenize, tuner.dataset.formats, tuner.dataset.chat_template"
    heavy = "{'torch', 'transformers', 'mmengine'} & set(sys.modules)"
    code = f"import sys, {modules}; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
