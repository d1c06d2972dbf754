"""A run of a stream that goes back and steps over a bad step ends where one that skips it ends, bit for bit."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tuner.config import render
from tuner.engine.checkpoint import checkpoint_path
from tuner.train import train

POISON = """
from mmengine.hooks import Hook


class Poison(Hook):
    def before_train(self, runner):
        def spoil(module, inputs, output):
            return output * float("nan") if runner.strategy.step == 4 else None

        runner.model.llm.get_input_embeddings().register_forward_hook(spoil)
"""
TAIL = "\nfrom poison_of_a_step import Poison\n\ncustom_hooks.append(dict(type=Poison))\n"
SETTINGS = {"streaming": True, "max_steps": 7, "save_interval": 3, "sample_interval": 0, "max_length": 256}


@pytest.mark.slow
def test_a_stream_goes_back_and_on_as_if_the_step_had_been_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "poison_of_a_step.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    weights = {}
    for way in ("skip", "rollback"):
        source = render("internlm2_tiny-sft_full", SETTINGS | {"on_nonfinite": way}) + TAIL
        train(source, work_dir=tmp_path / way)
        weights[way] = load_file(checkpoint_path(tmp_path / way, 7) / "model-00000-of-00001.safetensors")
    assert "step 5 was nonfinite: back to step 3; stepping over 5 this time" in capsys.readouterr().out
    assert {name: value.tobytes() for name, value in weights["skip"].items()} == {
        name: value.tobytes() for name, value in weights["rollback"].items()
    }
