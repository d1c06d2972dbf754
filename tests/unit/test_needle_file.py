"""A user's own needles: hidden whole and asked for as their file says, and refused by the line that is wrong."""

import json
from types import SimpleNamespace

import pytest

from tuner.dataset.needle_file import NeedleFile, read_needles
from tuner.dataset.needle_grid import NeedleGrid
from tuner.errors import UserError

ROWS = [
    {"needle": f"<{name} keeps {number}.>", "question": f"[{name}?", "answer": f" {number}]"}
    for name, number in (("Ada", 17), ("Bo", 4), ("Cy", 256))
]
LETTERS = SimpleNamespace(bos_token_id=1, unk_token_id=0, encode=lambda text, add_special_tokens: list(map(ord, text)))


def write(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("num_needles", [1, 2])
def test_needles_of_a_file_stand_at_the_depth_and_are_asked_for_at_the_end(tmp_path, num_needles):
    path = write(tmp_path / "own.jsonl", map(json.dumps, ROWS))
    hay = write(tmp_path / "hay.txt", ["a line of hay", "and another"])
    grid = NeedleGrid("1k", "0,50", "en", num_needles, 4, (hay,), seed=3)
    needles = NeedleFile(path, grid)
    make, again = needles.maker(LETTERS), NeedleFile(path, grid).maker(LETTERS)
    seen = set()
    for cell in needles.cells():
        document = make(cell)
        text = "".join(map(chr, document.ids))
        assert (len(text), text[0], again(cell)) == (1024, "\x01", document)
        answers = [text[begin:end] for begin, end in document.answers]
        hidden = [row for answer in answers for row in ROWS if row["answer"] == answer]
        assert len(hidden) == num_needles == len({row["needle"] for row in hidden})
        assert text.endswith("".join(row["question"] + row["answer"] for row in hidden))
        assert cell.depth * 0.9 - 2 < text.index(hidden[0]["needle"]) / 1024 * 100 <= cell.depth + 1
        assert all(text.count(row["needle"]) == 1 for row in hidden)
        seen.update(answers)
    assert len(seen) > 1  # each trial draws


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["", " "], "holds no needle"),
        ([json.dumps(ROWS[0]), '{"needle": "n"}'], "own.jsonl:2: expected a JSON object"),
        ([json.dumps({**ROWS[0], "answer": ""})], "own.jsonl:1"),
        (["not JSON"], "got not JSON"),
    ],
)
def test_a_line_that_is_no_needle_is_named(tmp_path, lines, told):
    with pytest.raises(UserError, match=told):
        read_needles(write(tmp_path / "own.jsonl", lines))


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    path = write(tmp_path / "own.jsonl", map(json.dumps, ROWS))
    for grid, told in (
        (NeedleGrid("1k", num_needles=4), "holds 3 needles; 4 in a document were asked for"),
        (NeedleGrid("30", num_needles=3), "longer than the haystack"),
    ):
        with pytest.raises(UserError, match=told):
            NeedleFile(path, grid).maker(LETTERS)
    blind = SimpleNamespace(**{**vars(LETTERS), "encode": lambda text, add_special_tokens: [0]})
    with pytest.raises(UserError, match="no tokens for parts of"):
        NeedleFile(path, NeedleGrid("1k")).maker(blind)
    with pytest.raises(UserError, match="cannot be read"):
        read_needles(tmp_path / "missing.jsonl")
