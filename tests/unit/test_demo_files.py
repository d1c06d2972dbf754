"""The demo's files: made once, whole or not at all, with a tokenizer built like InternLM2's."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece

from tuner.demo import files
from tuner.demo.english import ENGLISH
from tuner.demo.tokenizer import FIRST_SPECIAL_ID, NUM_UNUSED, SPECIAL_TOKENS, VOCAB_SIZE, train_model
from tuner.errors import UserError


@pytest.fixture(scope="module")
def demo_model() -> Path:
    """The demo's model directory, which other tests use too; its name in the cache is that of what made it."""
    return Path(files.resolve("demo:model"))


@pytest.fixture(scope="module")
def pieces(demo_model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(demo_model / "tokenizer.model"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Writing takes no time; the directories that were written."""
    written: list[Path] = []

    def write_all(directory: Path) -> None:
        written.append(directory)
        (directory / "train.jsonl").write_text("{}\n")

    monkeypatch.setattr(files, "_write_all", write_all)
    return written


def test_a_path_that_is_not_the_demos_comes_back_unchanged() -> None:
    assert files.resolve("data/train.jsonl") == "data/train.jsonl"


def test_an_unknown_demo_file_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"demo:trian.*demo:train\.jsonl"):
        files.resolve("demo:trian")


def test_a_cache_that_cannot_be_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be kept in .*file/demo-.* \(File exists\). Set TUNER_CACHE to"):
        files.resolve("demo:train.jsonl")


def test_files_are_made_once(tuner_cache: Path, quick: list[Path]) -> None:
    first = files.resolve("demo:train.jsonl")
    assert Path(first).is_file()
    assert Path(first).is_relative_to(tuner_cache)
    assert files.resolve("demo:train.jsonl") == first
    assert len(quick) == 1


def test_an_interrupted_making_leaves_nothing(
    tuner_cache: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(directory: Path) -> None:
        (directory / "train.jsonl").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            files.resolve("demo:train.jsonl")
    assert list(tuner_cache.iterdir()) == []
    assert Path(files.resolve("demo:train.jsonl")).read_text() == "{}\n"


def test_two_processes_that_make_it_at_once_both_get_it(
    tuner_cache: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = files._write_all

    def other_is_first(directory: Path) -> None:
        write_all(directory)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_write_all", write_all)
            files.resolve("demo:train.jsonl")

    monkeypatch.setattr(files, "_write_all", other_is_first)
    assert Path(files.resolve("demo:train.jsonl")).is_file()
    assert len(list(tuner_cache.iterdir())) == 1


def test_another_generator_makes_other_files(
    tuner_cache: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = files.resolve("demo:train.jsonl")
    monkeypatch.setattr(files, "SEED", files.SEED + 1)
    assert files.resolve("demo:train.jsonl") != first


def test_the_vocabulary_is_laid_out_like_internlm2s(pieces: sentencepiece.SentencePieceProcessor) -> None:
    size = len(pieces)
    assert size == VOCAB_SIZE
    assert size % 64 == 0
    assert [pieces.id_to_piece(index) for index in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert [pieces.id_to_piece(index) for index in range(3, 259)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert all(pieces.is_byte(index) for index in range(3, 259))
    spare = [pieces.id_to_piece(index) for index in range(size - NUM_UNUSED, size)]
    assert spare == [f"[UNUSED_TOKEN_{number}]" for number in range(NUM_UNUSED)]


def test_the_special_tokens_are_the_last_ids_in_internlm2s_order(demo_model: Path) -> None:
    config = json.loads((demo_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {int(index): token["content"] for index, token in config["added_tokens_decoder"].items()}
    assert named == {0: "<unk>", 1: "<s>", 2: "</s>"} | dict(enumerate(SPECIAL_TOKENS, start=FIRST_SPECIAL_ID))
    assert named[VOCAB_SIZE - 1] == "<|im_start|>"
    assert named[VOCAB_SIZE - 2] == "<|im_end|>"
    model = json.loads((demo_model / "config.json").read_text(encoding="utf-8"))
    assert model["vocab_size"] == VOCAB_SIZE
    assert model["model_type"] == "internlm2"


def test_the_order_of_the_special_tokens_is_that_of_the_real_model(shared_data: Path) -> None:
    config = json.loads((shared_data / "internlm2-7b-hub" / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {int(index): token["content"] for index, token in config["added_tokens_decoder"].items()}
    assert tuple(named[index] for index in sorted(named)[3:]) == SPECIAL_TOKENS


@pytest.mark.parametrize("text", ["  two  spaces ", "你好，世界", "é😀𠮷\n\ttab", "", "\n\n", "x = 1234567890"])
def test_any_text_comes_back(pieces: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert pieces.decode(pieces.encode(text)) == text


def test_a_number_below_a_hundred_is_one_piece_and_none_is_longer(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert all(pieces.encode(f"{number:02d}", out_type=str) == [f"{number:02d}"] for number in range(100))
    assert max(map(len, pieces.encode("1234567890 3.14159", out_type=str))) <= 2


def test_a_name_is_the_same_pieces_in_a_request_and_in_a_call(pieces: sentencepiece.SentencePieceProcessor) -> None:
    differing = []
    for name in (*ENGLISH.cities, *ENGLISH.months):
        alone = " ".join(pieces.encode(name, out_type=str))
        for around in ("What about {} today?", '{{"city": "{}", "day"'):
            if alone not in " ".join(pieces.encode(around.format(name), out_type=str)):
                differing.append((name, around))
    assert not differing


def test_the_same_text_gives_the_same_tokenizer() -> None:
    rng = random.Random(0)
    lines = ["".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(12)) for _ in range(4000)]
    assert train_model(lines) == train_model(lines)
