"""What must hold of any input: rendering and its masks, cutting, packing, sampling, collating, reading."""

import json
import tempfile
from itertools import combinations, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from chat_samples import MARKS, TOOL_TAGS, bytelevel
from hypothesis import given
from hypothesis import strategies as st

from tuner.constants import IGNORE_INDEX
from tuner.dataset import read
from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.collate import collate
from tuner.dataset.documents import TOO_LONG, fit
from tuner.dataset.ledger import Ledger
from tuner.dataset.packing import ALIKE, RUN, balanced_order, pack, pack_each
from tuner.dataset.sampler import StepSampler
from tuner.dataset.tokenize import Document, Encoder

SEEDS = st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 1000))
TEMPLATES = ["internlm2", "chatml", "qwen2.5", "llama3"]
HOSTILE = (
    [mark for marks in MARKS.values() for mark in marks] + TOOL_TAGS + ["user\n", "\r\n", "\u2028", "　", "😀", "\0"]
)
WORDS = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8"), max_size=8)), max_size=5)
CONTENTS = WORDS.map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict]:
    """Rounds of user and assistant, some of whose turns are not to be trained."""
    messages = [{"role": "system", "content": draw(CONTENTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(CONTENTS)} for role in ("user", "assistant")]
        messages[-1] |= {} if draw(st.booleans()) else {"loss": draw(st.booleans())}
    return messages


@st.composite
def packable(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Lengths, and room for the longest of them."""
    max_length = draw(st.integers(1, 60))
    return np.array(draw(st.lists(st.integers(1, max_length), min_size=1, max_size=80)), np.int64), max_length


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
def test_what_is_trained_is_what_the_model_said_and_each_end_of_it(name: str, messages: list[dict]):
    template = CHAT_TEMPLATES[name]
    segments = render({"messages": messages}, template)
    trained = "".join(segment.text for segment in segments if segment.trained)
    said = [m["content"] for m in messages if m["role"] == "assistant" and m.get("loss", True)]
    assert trained == "".join(words + template.turn_end for words in said)
    whole = "".join(segment.text for segment in segments)
    for message in messages:
        assert message["content"] in whole


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
def test_ids_give_the_text_back_and_hold_no_mark_that_a_user_wrote(name: str, messages: list[dict]):
    template, tokenizer = CHAT_TEMPLATES[name], bytelevel(name)
    segments = render({"messages": messages}, template)
    document = Encoder.from_tokenizer(tokenizer, template).encode([segments])[0]
    if name != "qwen2.5":  # whose normalizer composes characters
        assert tokenizer.decode(document.ids) == "".join(segment.text for segment in segments)
        spoken = "".join(segment.text for segment in segments if segment.trained)
        assert tokenizer.decode(document.ids[document.trained]) == spoken
    honest = render({"messages": [{**message, "content": "x"} for message in messages]}, template)
    marks = set(tokenizer.get_added_vocab().values())
    expected = Encoder.from_tokenizer(tokenizer, template).encode([honest])[0].ids
    assert [i for i in document.ids.tolist() if i in marks] == [i for i in expected.tolist() if i in marks]


@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    max_length=st.integers(2, 25),
    too_long=st.sampled_from(TOO_LONG),
    data=st.data(),
)
def test_every_token_that_is_cut_is_in_the_ledger(
    lengths: list[int], max_length: int, too_long: str, data: st.DataObject
):
    trained = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))), bool)
    cuts, ledger = fit(np.array(lengths, np.int64), trained, max_length, too_long)
    sizes = cuts.ends - cuts.starts
    (ledger + Ledger(rows=len(lengths))).check()
    assert ledger.read.tokens == sum(lengths)
    gone = ledger.dropped.tokens + ledger.untrained.tokens + ledger.truncated.tokens
    assert gone + int(sizes.sum()) == sum(lengths)
    for start, end, labels in zip(cuts.starts, cuts.ends, cuts.num_loss_tokens):
        assert 0 < labels == trained[start + 1 : end].sum()
        assert end - start <= max_length


@given(case=packable(), seed=SEEDS)
def test_packs_hold_every_document_once_and_no_two_could_be_one(case: tuple[np.ndarray, int], seed: tuple[int, int]):
    lengths, max_length = case
    packs = pack(lengths, max_length, seed)
    assert sorted(packs.documents.tolist()) == list(range(len(lengths)))
    sizes = np.sort(packs.sizes(lengths))
    assert sizes[-1] <= max_length
    assert len(packs) == 1 or sizes[0] + sizes[1] > max_length


@given(case=packable(), seed=SEEDS, data=st.data())
def test_the_contents_of_packs_follow_from_the_lengths_alone(
    case: tuple[np.ndarray, int], seed: tuple[int, int], data: st.DataObject
):
    lengths, max_length = case
    shuffled = np.array(data.draw(st.permutations(lengths.tolist())), np.int64)
    filled = []
    for given_lengths, given_seed in ((lengths, seed), (shuffled, (*seed, 7))):
        packs = pack(given_lengths, max_length, given_seed)
        filled.append(sorted(sorted(given_lengths[packs[p]].tolist()) for p in range(len(packs))))
    assert filled[0] == filled[1]


@given(costs=st.lists(st.integers(0, 2**40), max_size=200), seed=SEEDS)
def test_balance_is_an_order_whose_runs_in_a_window_hardly_overlap(costs: list[int], seed: tuple[int, int]):
    order = balanced_order(np.array(costs, np.int64), seed)
    assert sorted(order.tolist()) == list(range(len(costs)))
    runs = np.array(costs, np.int64)[order[: len(costs) // RUN * RUN]].reshape(-1, RUN)
    for one, other in combinations(runs, 2):
        assert one.max() <= (1 + ALIKE) * other.min() or other.max() <= (1 + ALIKE) * one.min()


class Corpus:
    """Documents by length alone, packed or not."""

    def __init__(self, lengths: np.ndarray, max_length: int, *, packed: bool) -> None:
        self._lengths, self._max_length, self._packed = lengths, max_length, packed
        self.num_loss_tokens = np.maximum(1, lengths // 2)
        self.num_packs = len(self.packs(0))

    def packs(self, epoch: int):
        if self._packed:
            return pack(self._lengths, self._max_length, (3, epoch))
        return pack_each(self._lengths, (3, epoch))


@given(
    case=packable(),
    packed=st.booleans(),
    num_ranks=st.sampled_from([1, 2, 3, 8]),
    accumulate=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_gives_each_document_to_one_rank_once_and_steps_are_those_of_one_rank(
    case: tuple[np.ndarray, int], packed: bool, num_ranks: int, accumulate: int, epoch: int
):
    corpus = Corpus(*case, packed=packed)
    options = {"num_epochs": epoch + 1}
    ranks = [
        StepSampler(corpus, num_accumulation_steps=accumulate, rank=rank, num_ranks=num_ranks, **options)
        for rank in range(num_ranks)
    ]
    alone = StepSampler(corpus, num_accumulation_steps=accumulate * num_ranks, **options)
    assert len(ranks[0]) == len(alone)
    seen = []
    first = epoch * alone.steps_per_epoch
    for step in reversed(range(first, first + alone.steps_per_epoch)):  # no step needs those before it
        plans = [sampler.plan(step) for sampler in ranks]
        together = [document for plan in plans for documents in plan.packs for document in documents]
        one = alone.plan(step)
        assert sorted(together) == sorted(document for documents in one.packs for document in documents)
        assert {plan.num_loss_tokens for plan in plans} == {one.num_loss_tokens}
        assert len({len(plan.packs) for plan in plans}) == 1
        seen += together
    assert sorted(seen) == list(range(len(case[0])))


@given(lengths=st.lists(st.integers(1, 12), max_size=8), multiple=st.integers(1, 16), data=st.data())
def test_a_batch_predicts_the_next_token_of_the_same_document_or_nothing(
    lengths: list[int], multiple: int, data: st.DataObject
):
    marks = st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))
    edges = np.cumsum([0, *lengths])
    ids, trained = np.arange(7, 7 + sum(lengths), dtype=np.uint32), np.array(data.draw(marks), bool)
    documents = [Document(ids[a:b], trained[a:b]) for a, b in pairwise(edges)]
    batch = collate(documents, 1, pad_to_multiple_of=multiple)
    inputs, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
    assert len(inputs) % multiple == 0
    assert 0 <= len(inputs) - sum(lengths) < multiple or not lengths
    assert batch["cu_seqlens"].tolist()[: len(lengths) + 1] == edges.tolist()
    predicting = np.flatnonzero(labels != IGNORE_INDEX)
    assert (labels[predicting] == inputs[predicting] + 1).all(), "ids count up, so the next id is one more"
    firsts = set(edges[:-1].tolist())
    assert (predicting + 1).tolist() == [place for place in np.flatnonzero(trained).tolist() if place not in firsts]
    assert (batch["position_ids"][0].numpy()[edges[:-1]] == 0).all()


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["text", "messages", "", "键"]), VALUES, max_size=3), min_size=1, max_size=12
)


@given(
    rows=ROWS,
    end=st.sampled_from(["\n", "\r\n"]),
    blank=st.sampled_from(["", "\n", " \n"]),
    bom=st.booleans(),
    ascii_only=st.booleans(),
    chunk_bytes=st.integers(1, 200),
)
def test_lines_come_back_as_they_were_written_with_their_numbers(
    rows: list[dict], end: str, blank: str, bom: bool, ascii_only: bool, chunk_bytes: int
):
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end + blank for row in rows)
    given_bytes = ("\ufeff" if bom else "").encode() + text.encode()
    found = rows_of("a.jsonl", given_bytes, chunk_bytes)
    assert [json.loads(row.content) for row in found] == rows
    step = 2 if blank else 1
    assert [row.line for row in found] == list(range(1, step * len(rows) + 1, step))


@given(rows=ROWS, indent=st.sampled_from([None, 1]), chunk_bytes=st.integers(1, 200), block=st.integers(1, 50))
def test_an_array_gives_its_items_however_it_is_cut_while_reading(
    rows: list[dict], indent: int | None, chunk_bytes: int, block: int
):
    with patch("tuner.dataset.reading.json_values.BLOCK_CHARACTERS", block):
        found = rows_of("a.json", json.dumps(rows, indent=indent, ensure_ascii=False).encode(), chunk_bytes)
    assert [json.loads(row.content) for row in found] == rows


def rows_of(name: str, content: bytes, chunk_bytes: int) -> list[read.Row]:
    with tempfile.TemporaryDirectory() as folder, patch.object(read, "CHUNK_BYTES", chunk_bytes):
        path = Path(folder) / name
        path.write_bytes(content)
        chunks = list(read.read_chunks(path))
    assert all(chunk.rows for chunk in chunks)
    return [row for chunk in chunks for row in chunk.rows]
