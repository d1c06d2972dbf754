"""InternLM2Tokenizer gives the ids of the sentencepiece package."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from small_tokenizer import CHINESE, made_text, write_directory

from tuner.model.internlm2.sentencepiece_model import parse
from tuner.model.internlm2.tokenization import InternLM2Tokenizer

# Spec of the published tokenizer: text -> ids without <s>.
VECTORS = {
    "Hello": [9843],
    " Hello": [22190],
    "  Hello  world": [387, 9843, 387, 14748],
    "你好，世界": [77230, 60353, 68339],
    "don't stop": [15132, 1082, 3101],
    "1234567890 3.14159": [4575, 10877, 2590, 2065, 262, 308, 281, 1101, 10981],
    "\r\n": [450],
    "\n": [364],
    "\n\n": [402],
    "é😀𠮷": [63000, 243, 162, 155, 131, 243, 163, 177, 186],
    "x\u200by": [274, 62945, 282],
    "system": [9081],
    "user": [1008],
    "assistant": [525, 11353],
    "environment": [23625],
    " name=": [963, 310],
    "<|im_end|>\n": [92542, 364],
    "<|im_start|>system name=<|plugin|>\n": [92543, 9081, 963, 310, 92538, 364],
    "<|im_start|>environment name=<|interpreter|>\n": [92543, 23625, 963, 310, 92539, 364],
    "<|action_start|><|interpreter|>\n```python\nprint(2**10)\n```<|action_end|>\n": [
        *[92541, 92539, 364, 14016, 350, 12819, 364, 1496, 298, 314, 465, 734, 471, 14016, 350, 92540, 364]
    ],
    '{"temperature": 22}': [5071, 34585, 921, 262, 1435, 335],
}
CONTROLS = "".join(
    chr(code) for code in [*range(1, 32), 0x7F, 0x85, 0xA0, 0xAD, 0x200B, 0x200D, 0x202E, 0xFEFF, 0xFFFD]
)
EMOJI = "😀👨‍👩‍👧‍👦🇨🇳👍🏽❤️🐛🚀𠮷"


def plain(tokenizer: InternLM2Tokenizer) -> tokenizers.Tokenizer:
    """The same model with no added tokens: what the project encodes users' text with."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**document, "added_tokens": [], "post_processor": None}))


def random_texts(count: int, alphabet: list[str], seed: int) -> list[str]:
    """Half of them from a few letters of `alphabet` each, so that repeats and ties are frequent."""
    rng = random.Random(seed)
    few = [rng.choices(rng.sample(alphabet, rng.randint(1, 4)), k=rng.randint(1, 60)) for _ in range(count // 2)]
    many = [rng.choices(alphabet, k=rng.randint(1, 30)) for _ in range(count // 2)]
    return ["".join(parts) for parts in few + many]


def random_unicode(count: int, seed: int) -> list[str]:
    """Characters of one to four UTF-8 bytes, assigned or not; no surrogates and no NUL."""
    rng = random.Random(seed)
    ranges = [(1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def compare(tokenizer: InternLM2Tokenizer, model_file: Path, texts: list[str]) -> int:
    """Assert equal ids and exact round trips for every text; gives the number of tokens compared."""
    ours = plain(tokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    encodings = [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=False)]
    for text, ids, expected in zip(texts, encodings, reference.encode(texts), strict=True):
        assert ids == expected, f"{text[:200]!r}"
    for text, decoded in zip(texts, ours.decode_batch(encodings, skip_special_tokens=False), strict=True):
        assert decoded == text.replace("▁", " ")
    return sum(map(len, encodings))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def hub(shared_data: Path) -> Path:
    return shared_data / "internlm2-7b-hub"


def test_a_small_model_equals_sentencepiece_on_made_text(small: Path):
    pieces = [piece.text.replace("▁", " ") for piece in parse((small / "tokenizer.model").read_bytes()).pieces[3:]]
    pieces = [piece for piece in pieces if not piece.startswith(("[UNUSED", "<0x"))]
    texts = made_text(1, 4000) + random_texts(6000, [*pieces, *EMOJI, *CONTROLS, *CHINESE, "\0", "▁"], 2)
    texts += [*random_unicode(2000, 3), "".join(made_text(4, 500)), CONTROLS, EMOJI, ""]
    num_tokens = compare(InternLM2Tokenizer.from_pretrained(small), small / "tokenizer.model", texts)
    assert num_tokens > 300_000


def test_the_published_vectors_hold(hub: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(hub)
    assert {text: tokenizer(text).input_ids for text in VECTORS} == {text: [1, *ids] for text, ids in VECTORS.items()}
    assert all(tokenizer.decode(ids) == text for text, ids in VECTORS.items())


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_million_real_tokens_equal_sentencepiece(hub: Path, shared_data: Path, every: int):
    def chunks(path: str, size: int, count: int) -> list[str]:
        text = (shared_data / path).read_text(encoding="utf-8")
        return [text[start : start + size] for start in range(0, len(text), size)][:count]

    texts = chunks("zh_classics/honglou.txt", 1500, 100) + chunks("zh_classics/sanguo.txt", 400, 300)
    texts += chunks("en_books/moby_dick.asciidoc", 2000, 250) + chunks("en_books/war_and_peace.asciidoc", 300, 500)
    texts += chunks("gsm8k/train.jsonl", 1000, 400) + chunks("glaive_toolcall/glaive_toolcall_zh_demo.json", 3000, 60)
    texts += chunks("glaive_toolcall/glaive_toolcall_en_demo.json", 3000, 60)
    texts += [row["response"] for row in json.loads((shared_data / "gpteacher/codegen-instruct.json").read_text())][
        :700
    ]
    pieces = [piece.text for piece in parse((hub / "tokenizer.model").read_bytes()).pieces if piece.kind != "byte"]
    alphabet = [piece.replace("▁", " ") for piece in pieces[3:-147] if piece != "\0"]
    texts += random_texts(6000, [*alphabet, *EMOJI, *CONTROLS], 5) + random_unicode(2500, 6)
    texts += random_texts(4000, [piece for piece in alphabet if len(piece) < 4 and not piece.isalnum()], 7)
    num_tokens = compare(InternLM2Tokenizer.from_pretrained(hub), hub / "tokenizer.model", texts[::every])
    assert num_tokens > 1_000_000 / every


@pytest.mark.slow
def test_every_character_and_long_run_equals_sentencepiece(hub: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(hub)
    every = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    runs = [letter * count for letter in every[:0x3000] for count in (2, 3, 5, 17, 64, 129)]
    compare(tokenizer, hub / "tokenizer.model", [letter + "x" + letter * 2 for letter in every])
    compare(tokenizer, hub / "tokenizer.model", runs)


def test_nul_is_its_own_piece_where_newer_sentencepiece_gives_a_byte(hub: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(hub)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(hub / "tokenizer.model"))
    assert tokenizer("a\0b", add_special_tokens=False).input_ids == [264, 354, 260]
    assert reference.encode("a\0b") in ([264, 354, 260], [264, 3, 260])
    assert tokenizer.decode([264, 354, 260]) == "a\0b"


def test_a_literal_spare_piece_is_plain_text_here(hub: Path):
    tokenizer = InternLM2Tokenizer.from_pretrained(hub)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(hub / "tokenizer.model"))
    assert reference.encode("[UNUSED_TOKEN_146]") == [92543]  # what a user could inject with sentencepiece
    ids = tokenizer("[UNUSED_TOKEN_146]", add_special_tokens=False).input_ids
    assert max(ids) < 92352
    assert tokenizer.decode(ids) == "[UNUSED_TOKEN_146]"
