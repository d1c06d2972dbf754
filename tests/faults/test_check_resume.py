"""`tuner check resume`: real kills of a config's run change nothing, and what would change something is caught."""

import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from preview_runs import PRESET, write_run

from tuner.cli import run
from tuner.config import render
from tuner.constants import IGNORE_INDEX
from tuner.dataset.collate import collate
from tuner.dataset.tokenize import Document
from tuner.prove.resume import is_same
from tuner.prove.short_batches import LENGTH, NUM_DOCUMENTS, shorten

CONFIG = {
    **{"model_type": "internlm2", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1010, "max_position_embeddings": 256},
}
FORGETFUL = '''
from tuner.engine.frame import Hook


class Restless(Hook):
    """Warms the rate up anew whenever a process begins: a state that no checkpoint has."""

    num_steps = 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.num_steps += 1
        for group in runner.strategy.optimizer.param_groups:
            group["peak_lr"] = 1e-3 * min(1.0, self.num_steps / 10)
'''


@pytest.fixture
def data(tmp_path: Path) -> dict[str, object]:
    settings = write_run(tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return settings


def arguments(settings: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["", "deepspeed=zero2"])
def test_a_run_that_is_killed_is_proven_to_go_on(strategy: str, data, capsys):
    given = [*arguments(data), *filter(None, [strategy])]
    assert run(["check", "resume", PRESET, *given, "--kills", "3"]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert out.count("inside a write") >= 2
    assert "gone on from step" in out
    assert "The same, bit for bit: 10 steps" in out


@pytest.mark.faults
def test_a_state_that_no_checkpoint_has_is_caught(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "restless.py").write_text(FORGETFUL)
    source = render(PRESET, {name: str(value) for name, value in data.items()})
    source = source.replace("# settings: the model", "from restless import Restless\n\n# settings: the model")
    path = tmp_path / "own.py"
    path.write_text(source.replace("custom_hooks = [", "custom_hooks = [\n    dict(type=Restless),"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run(["check", "resume", str(path), "--kills", "1"]) == 2
    out = capsys.readouterr().out
    assert "NOT THE SAME" in out
    assert "lr is " in out


def test_a_pack_is_cut_to_the_first_trained_tokens_of_some_documents():
    generator = np.random.default_rng(0)
    documents = []
    for length in (90, 5, 60, 24, 33, 40):
        trained = np.zeros(length, bool)
        trained[length // 2 :] = True
        documents.append(Document(generator.integers(1, 50, length), trained, np.full(length, 0.5, np.float32)))
    batch = collate(documents, 7.0)
    found = shorten(batch, 8)
    edges = found["cu_seqlens"].tolist()
    assert edges[:5] == [0, 24, 29, 53, 77]
    assert len(found["input_ids"][0]) % 8 == 0
    assert found["num_loss_tokens"] == 7.0
    assert len(edges) - 2 == NUM_DOCUMENTS, "and one of padding"
    for number, (start, end) in enumerate(islice(pairwise(edges), NUM_DOCUMENTS)):
        ids, trained = documents[number].ids, documents[number].trained
        begin = max(0, min(len(ids) // 2 - 1 - LENGTH // 4, len(ids) - LENGTH))
        expected = torch.from_numpy(ids[begin : begin + LENGTH])
        assert torch.equal(found["input_ids"][0, start:end], expected)
        labels = found["labels"][0, start : end - 1]
        is_label = torch.from_numpy(trained[begin + 1 : begin + LENGTH])
        assert torch.equal(labels, torch.where(is_label, expected[1:], IGNORE_INDEX))
        assert torch.equal(found["loss_weights"][0, start : end - 1], torch.where(is_label, 0.5, 0.0))


def test_bits_are_compared_and_not_values():
    zeros = torch.zeros(3)
    assert is_same(torch.full((2,), float("nan")), torch.full((2,), float("nan")))
    assert not is_same(zeros, -zeros)
    assert not is_same(zeros, zeros.double())
    assert not is_same(zeros, None)
    assert not is_same(zeros, zeros[:2])
