"""Needles and a model that is known to recall: two attention heads set by hand copy what followed a token before.

It forgets with the distance, by construction: the map must be full within its reach and empty beyond.
"""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tuner.dataset.needle_grid import cell_means
from tuner.dataset.needles import Cell, Document
from tuner.engine.aside import aside
from tuner.engine.needle import NeedleHook, keep, scored_cells
from tuner.engine.scoring import alone, score_documents
from tuner.engine.world import ALONE
from tuner.evaluate.needle import score
from tuner.method.sft import SFT

VOCABULARY, HAY = 48, 20  # tokens 1 to HAY are haystack, those above are needles
HEAD, BASE = 128, 1e12  # the head's size and the rotary base: the later half of its angles hardly turns at all
FADES = 13  # the pair of dimensions whose angle makes the model forget
REACH = math.pi / 2 * BASE ** (2 * FADES / HEAD)  # tokens, about 430
SHARP = 60.0  # nats between what is attended to and what is not


def copying_llm() -> PreTrainedModel:
    """Head 1 writes the token before beside each token; head 2 looks for its own token there, and says what it finds.

    Its score fades as the cosine of distance / REACH, a quarter turn: beyond, the tokens nearby have more.
    """
    token, before, found = (slice(i * VOCABULARY, (i + 1) * VOCABULARY) for i in range(3))
    size = 3 * VOCABULARY + 1
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=HEAD, attention_bias=True, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="tuner_sdpa").eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.zero_()
        eye = torch.eye(VOCABULARY)
        llm.model.embed_tokens.weight[:, token] = eye
        llm.model.embed_tokens.weight[:, size - 1] = 1.0
        llm.lm_head.weight[:, found] = 30 * eye
        llm.model.norm.weight.fill_(1.0)
        first, second = (layer.self_attn for layer in llm.model.layers)
        for layer, squares in zip(llm.model.layers, (2, 3)):
            layer.input_layernorm.weight.fill_(math.sqrt(squares / size))  # so that entries are 1 again
            layer.post_attention_layernorm.weight.fill_(1.0)
        for attention, place in ((first, before), (second, found)):
            attention.v_proj.weight[:VOCABULARY, token] = eye
            attention.o_proj.weight[place, :VOCABULARY] = eye
        pairs = torch.arange(HEAD // 4)  # those that turn
        angles = BASE ** (-2 * pairs / HEAD)
        strength = SHARP * math.sqrt(HEAD) / (1 - angles.cos()).sum()
        first.q_proj.bias[pairs] = strength * angles.cos()  # turned back by one place
        first.q_proj.bias[pairs + HEAD // 2] = -strength * angles.sin()
        first.k_proj.bias[pairs] = 1.0
        still = torch.cat([torch.arange(HEAD // 4, HEAD // 2), torch.arange(3 * HEAD // 4, HEAD)])[:VOCABULARY]
        second.q_proj.weight[still, token] = SHARP * math.sqrt(HEAD) * eye
        second.k_proj.weight[still, before] = eye
        second.q_proj.bias[FADES] = SHARP * math.sqrt(HEAD)
        second.k_proj.bias[FADES] = 1.0
    return llm


def document(cell: Cell) -> Document:
    """Four tokens of which no other is like any; the first asks for the others. In "none" they are not hidden."""
    rng = random.Random(str(cell))
    needle = rng.sample(range(HAY + 1, VOCABULARY), 4)
    hay = [rng.randint(1, HAY) for _ in range(cell.length - 1 - 2 * len(needle))]
    place = round(len(hay) * cell.depth / 100)
    hidden = needle if cell.language == "hidden" else [rng.randint(1, HAY) for _ in needle]
    ids = [0, *hay[:place], *hidden, *hay[place:], *needle]
    return Document(ids, [(len(ids) - 3, len(ids))])


CELLS = [
    Cell(language, length, depth, trial)
    for length in (64, 256, 1024)
    for language in ("hidden", "none")
    for depth in (0.0, 25.0, 75.0, 100.0)
    for trial in range(2)
]


@pytest.fixture(scope="module")
def method() -> SFT:
    """The model that copies."""
    return SFT(copying_llm())


def test_the_map_is_full_within_the_models_reach_and_empty_beyond(method: SFT):
    rows = score(method, CELLS, document, pack_tokens=700)
    maps = cell_means(rows, "accuracy")
    for (length, depth), share in maps["hidden"].items():
        distance = length * (1 - depth / 100)
        assert abs(distance - REACH) > 100
        assert share == (1.0 if distance < REACH else 0.0), (length, depth)
    assert sorted(set(maps["hidden"].values())) == [0.0, 1.0]
    assert set(maps["none"].values()) == {0.0}, "though its neighbours in the pack hold needles"
    scored = {row["accuracy"] == 1.0: row["log_probability"] for row in rows}
    assert scored[True] > -0.01 > -5 > scored[False]
    few = [cell for cell in CELLS if cell.length == 64 and cell.trial == 0]
    written = score(method, few, document, mode="generate", pack_tokens=100)
    assert all(row["generated"] == row["accuracy"] for row in written)


def test_each_pack_is_a_phase_of_its_own_to_those_who_watch(method: SFT):
    strategy = alone(method)
    cells = [cell for cell in CELLS if cell.length == 64]
    with aside(method):
        before = strategy.progress.place
        rows = list(scored_cells(strategy, cells, document, pack_tokens=128))
        after = strategy.progress.place
    assert len(rows) == len(cells)
    assert (after.phase, after.step) == (before.phase, before.step)
    assert after.number - before.number == len(cells) / 2
    assert after.since > before.since
    assert list(score_documents(strategy, [], document, 128)) == []


def test_maps_of_steps_that_come_again_are_dropped(tmp_path: Path):
    rows = [{**CELLS[0]._asdict(), "accuracy": 0.5, "log_probability": -1.0}]
    directory = tmp_path / "needle"
    for step in (6, 9):
        keep(rows, directory, step)
    assert json.loads((directory / "step_00000006.json").read_text()) == {"step": 6, "cells": rows}
    (directory / "step_of_mine.txt").write_text("a user's")
    runner = SimpleNamespace(work_dir=str(tmp_path), strategy=SimpleNamespace(world=ALONE, step=6))
    NeedleHook().after_rollback(runner)
    left = {path.name for path in directory.iterdir()}
    assert left == {f"step_00000006.{kind}" for kind in ("json", "png")} | {"step_of_mine.txt"}
