"""Tokens as text: whole characters, no garbage, nothing that hides, in brackets or in colour."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preview_runs import HIDDEN, words, write_run
from small_tokenizer import write_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tuner.cli import run
from tuner.model.tokenizer import build_tokenizer
from tuner.preview.characters import Vocabulary, groups, visible
from tuner.preview.samples import DocumentView, Tail
from tuner.preview.terminal import draw_document, legend, wants_colour

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer such as Qwen's or Llama 3's, of 300 entries."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the answer is 中文 and more of the same"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = write_directory(tmp_path_factory.mktemp("tokenizer"))
    return {"byte fallback": build_tokenizer(str(directory)), "byte level": byte_level()}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["byte fallback", "byte level"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_groups_of_any_text_are_its_characters_with_signs_for_what_hides(tokenizers, kind: str, text: str):
    """Against the text itself, which no token is needed for."""
    text = text.replace("▁", "_")  # which sentencepiece does not tell from a space
    ids = ids_of(tokenizers[kind], text)
    found = list(groups(ids, Vocabulary(tokenizers[kind])))
    assert "".join(group.text for group in found) == visible(text)
    assert [place for group in found for place in range(group.start, group.end)] == list(range(len(ids)))
    assert not any(group.special for group in found)


@pytest.mark.parametrize("kind", ["byte fallback", "byte level"])
def test_the_tokens_of_one_character_are_one_group_and_a_break_shows_their_bytes(tokenizers, kind: str):
    vocabulary = Vocabulary(tokenizers[kind])
    ids = ids_of(tokenizers[kind], "😀")
    assert len(ids) == 4
    assert list(groups(ids, vocabulary)) == [(0, 4, "😀", False)]
    torn = [(0, 2, "⟨F0⟩⟨9F⟩", False), (2, 3, "⟨98⟩", False), (3, 4, "⟨80⟩", False)]
    assert list(groups(ids, vocabulary, {2})) == torn
    assert list(groups(ids[:3], vocabulary)) == [(0, 3, "⟨F0⟩⟨9F⟩⟨98⟩", False)]
    assert [group.text for group in groups([*ids[1:], *ids], vocabulary)][-1] == "😀"


@pytest.mark.parametrize("kind", ["byte fallback", "byte level"])
def test_a_mark_is_special_and_the_same_letters_are_not(tokenizers, kind: str):
    mark = tokenizers[kind].convert_tokens_to_ids("<|im_start|>")
    vocabulary = Vocabulary(tokenizers[kind])
    assert list(groups([mark], vocabulary)) == [(0, 1, "<|im_start|>", True)]
    assert list(groups([99_999], vocabulary)) == [(0, 1, "<no token 99999>", True)]


def test_what_would_not_be_seen_has_a_sign():
    assert visible(HIDDEN) == "a⇥b␍␀␛[31m⟨U+200B⟩⟨U+202E⟩abc⟨U+00A0⟩⟨U+3000⟩⟨U+FEFF⟩"
    assert visible("plain words, 中文, é, हिन्दी and 😀") == "plain words, 中文, é, हिन्दी and 😀"
    assert visible("line\nline\x7f\x85") == "line⏎\nline␡⟨U+0085⟩"
    assert visible("a\u200db\u2066c\ufe0fd\u3164e\U000e0041") == "a⟨U+200D⟩b⟨U+2066⟩c⟨U+FE0F⟩d⟨U+3164⟩e⟨U+E0041⟩"
    assert visible("\udc80.jsonl") == "⟨80⟩.jsonl"  # a file name that is no UTF-8


def test_nothing_of_a_row_reaches_the_terminal_unseen(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(words(write_run(tmp_path), "-n", "40")) == 0
    text = capsys.readouterr().out
    assert "abc" in text
    assert set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u00a0\u3000\ufeff]", text)) == set()


@pytest.fixture
def document(tokenizers) -> DocumentView:
    """`is it?` masked, then `it is 😀` and the end mark trained, then a line break."""
    tokenizer = tokenizers["byte fallback"]
    question, answer = ids_of(tokenizer, "is it?\n"), ids_of(tokenizer, "it is 😀")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*question, *answer, end, *ids_of(tokenizer, "\n")]
    weights = [0.0] * len(question) + [1.0] * (len(answer) + 1) + [0.0] * (len(ids) - len(question + answer) - 1)
    return DocumentView(0, "rows.jsonl:1", 100, ids, weights)


def test_brackets_stand_around_what_is_trained(tokenizers, document: DocumentView):
    vocabulary = Vocabulary(tokenizers["byte fallback"])
    assert draw_document(document, vocabulary, colour=False) == ["is it?⏎", "⟦it is 😀«<|im_end|>»⟧⏎"]


def test_a_cut_between_ranks_stands_where_it_falls(tokenizers, document: DocumentView):
    vocabulary = Vocabulary(tokenizers["byte fallback"])
    first = document.weights.index(1.0)
    places = (50, 100 + first, 100 + len(document.ids) - 4)  # another document, the answer's first token, in the emoji
    drawn = "\n".join(draw_document(document, vocabulary, places, colour=False))
    assert drawn == "is it?⏎\n⟦⟨✂2⟩it is ⟨F0⟩⟨9F⟩⟨✂3⟩⟨98⟩⟨80⟩«<|im_end|>»⟧⏎"


def test_a_weight_is_told_where_it_begins(tokenizers, document: DocumentView):
    vocabulary = Vocabulary(tokenizers["byte fallback"])
    half = document._replace(weights=[0.5 * weight for weight in document.weights])
    assert draw_document(half, vocabulary, colour=False) == ["is it?⏎", "⟦⟨×0.5⟩it is 😀«<|im_end|>»⟧⏎"]
    assert half.num_trained == document.num_trained
    first = document.weights.index(1.0)
    rest = document._replace(
        weights=[0.5 if place == first else weight for place, weight in enumerate(document.weights)]
    )
    assert "".join(draw_document(rest, vocabulary, colour=False)).count("⟨×1⟩") == 1, (
        "where it is 1 again, this is told"
    )


def test_the_tail_is_drawn_apart(tokenizers, document: DocumentView):
    vocabulary = Vocabulary(tokenizers["byte fallback"])
    tail = ids_of(tokenizers["byte fallback"], "or not")
    cut = document._replace(ids=document.ids[:-1], weights=document.weights[:-1], tail=Tail(tuple(tail)))
    assert draw_document(cut, vocabulary, colour=False) == [
        "is it?⏎",
        "⟦it is 😀«<|im_end|>»⟧⟪cut: or not⟫",
        f"({len(tail)} tokens were cut off, for they go beyond max_length)",
    ]


def test_in_colour_every_token_is_painted_and_the_text_stays_the_same(tokenizers, document: DocumentView):
    vocabulary = Vocabulary(tokenizers["byte fallback"])
    lines = draw_document(document, vocabulary, colour=True)
    assert [ANSI.sub("", line) for line in lines] == ["is it?⏎", "it is 😀<|im_end|>⏎"]
    painted = re.findall(r"\x1b\[[0-9;]+m([^\x1b]*)\x1b\[0m", "".join(lines))
    assert len(painted) == len(document.ids) - 3  # the emoji's four tokens are one
    assert all(line.endswith("\x1b[0m") for line in lines)
    styles = re.findall(r"\x1b\[([0-9;]+)m[^\x1b]", lines[1])
    assert all(one != other for one, other in zip(styles, styles[1:]))  # noqa: RUF007 (neighbours are told apart)
    assert ANSI.search(legend(colour=True, cuts=True))
    assert not ANSI.search(legend(colour=False, cuts=True))


@pytest.mark.parametrize(
    ("asked", "is_terminal", "environment", "expected"),
    [
        (None, True, {}, True),
        (None, False, {}, False),
        (None, True, {"NO_COLOR": "1"}, False),
        (None, True, {"NO_COLOR": ""}, True),
        (True, False, {"NO_COLOR": "1"}, True),
        (False, True, {}, False),
    ],
)
def test_colour_is_for_terminals_unless_said_otherwise(asked, is_terminal, environment, expected):
    assert wants_colour(asked, is_terminal=is_terminal, environment=environment) is expected


def test_a_pipe_gets_brackets_and_color_gets_colour(tmp_path: Path, capsys: pytest.CaptureFixture):
    run_settings = write_run(tmp_path)
    assert run(words(run_settings, "-n", "1")) == 0
    plain = capsys.readouterr().out
    assert run(words(run_settings, "-n", "1", "--color")) == 0
    coloured = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "⟦" in plain
    assert "\x1b[" in coloured
