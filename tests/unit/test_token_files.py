"""Rows that are tokenised already, and the lab's pairs of token files, read and written."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.dataset import token_files
from tuner.dataset.formats import FORMATS
from tuner.dataset.given_ids import given_document
from tuner.dataset.messages import RowError
from tuner.dataset.tokenize import Document
from tuner.errors import UserError

tokens = FORMATS["tokens"]
TRAINED = {"ids": [5, 6, 7], "trained": [False, True, True]}


def document(signed: list[int]) -> Document:
    ids = np.array(signed, np.int64)
    return Document(np.abs(ids).astype(np.uint32), ids >= 0)


def same(one: Document, other: Document) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.trained, other.trained)


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": [-5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 7], "completion_mask": [False, True, True]},
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1], "labels": None},
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]},
    ],
)
def test_every_way_to_write_a_mask_gives_the_same_document(row):
    assert tokens(row) == TRAINED


def test_without_a_mask_every_token_is_trained():
    assert tokens({"input_ids": [5, 0]}) == tokens({"tokens": [5, 0]}) == {"ids": [5, 0], "trained": [True, True]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "Expected 'input_ids' in the row, which has"),
        ({"tokens": []}, "'tokens' to hold at least one token"),
        ({"tokens": "1 2"}, "'tokens' of the row to be a list, got str"),
        ({"tokens": [1, 2.0]}, "'tokens' to hold integers, at place 1, got float 2.0"),
        ({"tokens": [1, True]}, "integers, at place 1, got bool"),
        ({"tokens": [1, [2]]}, "integers, at place 1, got list"),
        ({"tokens": [1, None]}, "integers, at place 1, got NoneType"),
        ({"tokens": [1], "input_ids": [1]}, "either 'tokens' or 'input_ids'"),
        ({"input_ids": [1, -2]}, r"no negative id .*got int -2"),
        ({"input_ids": [1, 2], "labels": [1]}, "an entry for each of the 2 input_ids, it has 1"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "got 6 at place 0, where the id is 5. They look shifted"),
        ({"input_ids": [5, 6, 7], "labels": [5, 9, 7]}, "got 9 at place 1, where the id is 6.$"),
        ({"input_ids": [5, 6], "loss_mask": [0, -1]}, "'loss_mask' to hold 0 and 1, or weights .* place 1, got int -1"),
        ({"input_ids": [5, 6], "loss_mask": [1, 1001]}, "weights from 0.001 to 1000, at place 1, got int 1001"),
        ({"input_ids": [5, 6], "loss_mask": [1e-4, 1]}, "weights from 0.001 to 1000, at place 0, got float 0.0001"),
        ({"input_ids": [5, 6], "loss_mask": [1, math.nan]}, "weights from .* at place 1, got float nan"),
        ({"input_ids": [5, 6], "loss_mask": [1, None]}, "weights from .* at place 1, got NoneType"),
        (
            {"input_ids": [5, 6], "completion_mask": [0, 0.5]},
            "'completion_mask' to hold 0 and 1, at place 1, got",
        ),
        ({"input_ids": [5, 6], "loss_mask": "01"}, "'loss_mask' of the row to be a list"),
        ({"input_ids": [5], "loss_mask": [1], "labels": [5]}, "one of .* in the row, got list"),
        ({"input_ids": [5, 2], "attention_mask": [1, 0]}, "padding is left out of the row"),
        ({"input_ids": [5, 2, 5], "position_ids": [0, 1, 0]}, "give each document a row of its own"),
    ],
)
def test_a_row_that_is_not_clear_is_refused(row, message):
    with pytest.raises(RowError, match=message):
        tokens(row)


def test_entries_of_a_loss_mask_may_be_weights():
    sample = tokens({"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0.5, 1, 2]})
    assert sample == {"ids": [5, 6, 7, 8], "trained": [False, True, True, True], "weights": [1, 0.5, 1, 2]}
    found = given_document(sample, 9)
    assert same(found, document([-5, 6, 7, 8]))
    assert found.weights is not None
    assert found.weights.dtype == np.float32
    assert found.weights.tolist() == [1, 0.5, 1, 2]
    assert given_document({**TRAINED, "weights": [0.5, 1, 1]}, 8).weights is None, "nothing is trained at the first"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"ids": [1.5, 2]}, "'ids' of the sample to be a list of integers"),
        ({"ids": ["a"]}, "'ids' of the sample to be a list of integers"),
        ({"ids": [[1], [2, 3]]}, "'ids' of the sample to be a list of integers"),
        ({"ids": 7}, "'ids' of the sample to be a list of integers"),
        ({"ids": [1, 2], "trained": [0.5, 1]}, "'trained' of the sample to be a list of true and false"),
        ({"ids": [1, 2], "weights": [1]}, "as many 'weights' as ids, got list .2, 1."),
        ({"ids": [1, 2], "weights": [1, math.nan]}, "weights from 0.001 to 1000, got list .nan."),
        ({"ids": [1, 2], "weights": [0, 1]}, "weights from 0.001 to 1000, got list .0"),
    ],
)
def test_a_function_s_own_ids_are_checked(sample, message):
    with pytest.raises(RowError, match=message):
        given_document(sample, 9)


def test_ids_that_the_tokenizer_lacks_are_refused():
    assert same(given_document(TRAINED, 8), document([-5, 6, 7]))
    with pytest.raises(RowError, match=r"ids below 7, as the tokenizer has them, got 7 at place 2. Was the row made"):
        given_document(TRAINED, 7)
    with pytest.raises(RowError, match="ids from 0 up"):
        given_document({"ids": [1, -3]}, 7)
    with pytest.raises(RowError, match="as many 'trained' as ids"):
        given_document({"ids": [1, 3], "trained": [True]}, 7)


@given(st.lists(st.lists(st.integers(-99_999, 99_999).filter(bool), min_size=1, max_size=30), max_size=20))
def test_what_is_written_is_read_back(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("pair") / "a.bin"
    given_documents = [document(signed) for signed in documents]
    assert token_files.write(path, given_documents) == len(documents)
    found = list(token_files.read(path))
    assert len(found) == len(documents)
    assert all(map(same, found, given_documents))


def test_a_pair_has_the_lines_and_the_array_that_other_tools_read(tmp_path):
    token_files.write(tmp_path / "a.bin", [document([-1, 2, 3]), document([40])])
    assert (tmp_path / "a.bin").read_bytes() == b'{"tokens": [-1, 2, 3]}\n{"tokens": [40]}\n'
    meta = np.load(tmp_path / "a.bin.meta")
    assert meta.tolist() == [[0, 3], [23, 1]]
    with open(tmp_path / "a.bin", "rb") as file:  # as a reader jumps to a document
        file.seek(meta[1][0])
        assert json.loads(file.readline()) == {"tokens": [40]}


def test_nothing_half_made_is_left_where_writing_stops(tmp_path):
    def documents():
        yield document([1])
        raise KeyboardInterrupt

    token_files.write(tmp_path / "a.bin", [document([7])])
    with pytest.raises(KeyboardInterrupt):
        token_files.write(tmp_path / "a.bin", documents())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.bin.meta"]
    assert same(*token_files.read(tmp_path / "a.bin"), document([7]))


def test_what_a_pair_cannot_say_is_refused(tmp_path):
    masked_zero = Document(np.array([0, 1], np.uint32), np.array([False, True]))
    with pytest.raises(UserError, match=r"document 0: token 0 without loss, which a .bin file cannot say"):
        token_files.write(tmp_path / "a.bin", [masked_zero])
    with pytest.raises(UserError, match=r"a file of tokens ends in .bin"):
        token_files.write(tmp_path / "a.jsonl", [])
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_is_named(tmp_path):
    token_files.write(tmp_path / "a.bin", [document([1]), document([2])])
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes().replace(b"[2]", b"2.5"))
    with pytest.raises(UserError, match=r"a.bin:2: Expected 'tokens' of the row to be a list, got float"):
        list(token_files.read(tmp_path / "a.bin"))
