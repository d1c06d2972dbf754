"""Needles: documents are as asked for, and their scores are those of transformers' own unpacked pass."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from small_tokenizer import write_directory
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from tuner.cli import cli
from tuner.configs.needle_rules import wrong_needles
from tuner.dataset.needle_grid import NeedleGrid, encoder, parse_depths, parse_lengths
from tuner.dataset.needles import NUM_KEYS, WORDINGS, Cell, Document, Haystack, key_name
from tuner.engine.scoring import packs
from tuner.errors import UserError
from tuner.evaluate.loaded import warn_of_length
from tuner.evaluate.needle import score
from tuner.method.sft import SFT
from tuner.model.build import build_llm
from tuner.model.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a Llama with two layers and a tokenizer."""
    directory = write_directory(tmp_path_factory.mktemp("needle"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = len(build_tokenizer(str(directory)))
    config = LlamaConfig(vocab_size=size, max_position_embeddings=256, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize("language", WORDINGS)
@pytest.mark.parametrize("num_needles", [1, 3])
def test_documents_have_the_length_and_the_needles_where_they_are_asked_for(language, num_needles):
    stack = Haystack(language, characters, prefix=[65])
    for depth in (0.0, 35.0, 100.0):
        document = stack.document(Cell(language, 1500, depth), num_needles)
        text = "".join(map(chr, document.ids))
        assert (len(text), text[0], len(document.answers)) == (1500, "A", num_needles)
        for number, (begin, end) in enumerate(document.answers):
            assert text.count(text[begin:end]) == 2  # in the needle and as the answer
            place = text.index(text[begin:end]) / 1500 * 100
            wanted = depth + (100 - depth) * number / num_needles
            assert wanted * 0.6 - 6 < place < wanted + 8
        again = Haystack(language, characters, prefix=[65])
        assert document == again.document(Cell(language, 1500, depth), num_needles)
        assert end == 1500


def test_no_two_keys_are_the_same():
    assert all(len({key_name(wording, key) for key in range(NUM_KEYS)}) == NUM_KEYS for wording in WORDINGS.values())


def test_a_needle_longer_than_the_haystack_and_wrong_numbers_are_refused():
    with pytest.raises(UserError, match=r"longer than the haystack.*the length asked for is 40"):
        Haystack("en", characters).document(Cell("en", 40, 0.0))
    for wrong in ("", "x", "0", "1k,,2", "1e9k"):
        with pytest.raises(UserError):
            parse_lengths(wrong)
    for wrong in ("", "0:100", "0:100:0", "0:110:10", "-1", "nan"):
        with pytest.raises(UserError):
            parse_depths(wrong)
    assert parse_lengths("4k,512,1k,1K") == [512, 1024, 4096]
    assert parse_depths("0:100:25") == [0, 25, 50, 75, 100]
    assert list(packs([3, 4, 9, 1, 1], 7)) == [[0, 1], [2], [3, 4]]


def scored(llm: torch.nn.Module, documents: list[Document], mode: str = "logprob") -> list[dict]:
    """Through the seam that takes documents of one's own."""
    cells = [Cell("en", len(document.ids), float(number)) for number, document in enumerate(documents)]
    return score(SFT(llm), cells, lambda cell: documents[int(cell.depth)], mode=mode, pack_tokens=1000)


def test_scores_of_a_pack_are_those_of_transformers_one_by_one(model):
    tokenizer = build_tokenizer(str(model))
    stack = Haystack("zh", lambda text: tokenizer.encode(text, add_special_tokens=False))
    documents = [stack.document(Cell("zh", length, depth), 2) for length, depth in ((150, 0.0), (240, 50.0))]
    rows = scored(build_llm(str(model)).double(), documents)
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    for document, found in zip(documents, rows):
        with torch.no_grad():
            logits = reference(torch.tensor([document.ids])).logits[0]
        places = [i for begin, end in document.answers for i in range(begin, end)]
        scores = [(logits[i - 1].log_softmax(0)[document.ids[i]]).item() for i in places]
        assert found["log_probability"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_what_greedy_decoding_writes_counts_as_found_by_both_forms(model):
    llm = build_llm(str(model)).eval()
    ids = torch.arange(5, 25)[None]
    written = llm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    own = written[0].tolist()
    other = [*own[:-1], (own[-1] + 1) % 100]
    documents = [Document(ids, [(20, 22), (22, 24)]) for ids in (own, other)]
    for column in ("accuracy", "generated"):
        assert [row[column] for row in scored(llm, documents, mode="generate")] == [1.0, 0.5]


def test_the_command_writes_all_cells_and_the_picture_once(model, tmp_path, caplog):
    out = tmp_path / "out"
    command = ["evaluate", "needle", str(model), "--lengths", "160,300", "--depths", "0,50", "--out", str(out)]
    result = CliRunner().invoke(cli, [*command, "--mode", "generate"], catch_exceptions=False)
    [text] = [record.message for record in caplog.records if record.name == "tuner"]
    assert re.match(r"--lengths: 300 tokens are more than the 256 positions.*rope_theta = ", text)
    rows = json.loads((out / "needle.json").read_text())
    assert len(rows) == 2 * 2 * 2
    assert {row["language"] for row in rows} == {"en", "zh"}
    assert all(row["generated"] == row["accuracy"] for row in rows)
    assert (out / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert "8 of 8 cells" in result.output
    assert "160" in result.output
    with pytest.raises(UserError, match="exists already"):
        CliRunner().invoke(cli, command, catch_exceptions=False)


MISTAKES = {
    "needle_lengths 4k;8k: expected token counts": {"lengths": "4k;8k"},
    "needle_depths 0:150:10: expected FIRST:LAST:STEP": {"depths": "0:150:10"},
    "needle_languages en,fr: 'fr' is not known": {"languages": "en,fr"},
    "are 400,004 documents to score; at most 100,000": {"depths": "0:100:0.0001"},
    "needle_haystack .*nope.txt cannot be read": {"haystack": ["nope.txt"]},
    "needle_haystack .*bytes.txt cannot be read as UTF-8": {"haystack": ["bytes.txt"]},
    "needle_haystack .*blank.txt holds no text": {"haystack": ["blank.txt"]},
}


def test_a_config_hears_of_every_mistake_about_needles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "blank.txt").write_text(" \n\n")
    for message, wrong in MISTAKES.items():
        (problem,) = wrong_needles({}, [(NeedleGrid, wrong), (None, {})])
        with pytest.raises(UserError, match=message):
            raise UserError(problem)
    assert len(wrong_needles({}, [(NeedleGrid, {"lengths": "x", "depths": "y", "languages": "z"})])) == 3
    assert wrong_needles({}, [(NeedleGrid, {})]) == []


def test_lengths_are_held_against_what_rotary_settings_reach_and_learned_positions_have(caplog):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    yarn = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    reaches = {1024: LlamaConfig(**sizes, rope_parameters=linear), 2048: LlamaConfig(**sizes, rope_parameters=yarn)}
    for reached, config in reaches.items():
        warn_of_length(SimpleNamespace(config=config), reached, "--lengths")
        assert not caplog.records
        warn_of_length(SimpleNamespace(config=config), reached + 1, "--lengths")
        text = rf"{reached + 1:,} tokens are more than the {reached:,} positions.*yarn"
        assert [bool(re.search(text, record.message)) for record in caplog.records] == [True]
        caplog.clear()
    with pytest.raises(UserError, match=r"--lengths: 300 tokens, but .* has learned positions for 256"):
        warn_of_length(SimpleNamespace(config=GPT2Config(n_positions=256)), 300, "--lengths")


def test_a_tokenizer_that_cannot_tell_two_needles_apart_is_refused():
    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) if character < "一" else 0 for character in text]

    tokenizer = SimpleNamespace(encode=encode, unk_token_id=0, unk_token="<unk>")
    assert encoder(tokenizer, "en")("ab") == [97, 98]
    with pytest.raises(UserError, match="no tokens for parts of the needles in 'zh': they become '<unk>'"):
        encoder(tokenizer, "zh")


def test_lengths_beyond_every_stage_are_a_warning_with_the_remedy_of_the_furthest(model, caplog):
    stages = [{"max_length": 64}, {"max_length": 128, "rope_theta": 5e4}, {"max_length": 512, "rope_theta": 6e4}]
    for length, given, told in (
        ("512", stages, ""),
        ("513", stages, "(it is 60000)"),
        ("257", stages[:2], "(it is 50000)"),
    ):
        node = {"type": NeedleGrid, "lengths": length}
        config = {
            "model": {"type": build_llm, "path": str(model)},
            "train_dataloader": {"dataset": {"max_length": 128}, "stages": given},
            "custom_hooks": [{"interval": 5, "needles": node}],
        }
        caplog.clear()
        assert wrong_needles(config, [(NeedleGrid, {"lengths": length})]) == []
        assert bool(caplog.messages) == bool(told)
        assert told in "".join(caplog.messages)
