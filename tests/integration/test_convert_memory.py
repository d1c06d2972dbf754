"""InternEvo's parts of more than a gigabyte become a model, and a model parts, within the memory that is promised."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from small_tokenizer import write_directory

from tuner.convert.sharding import write_shards
from tuner.convert.tensors import Piece
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM

SIZES = {
    "vocab_size": 92544, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 4, "bias": False, "pad_token_id": 2,
}  # fmt: skip
MEASURED = """
import sys
from pathlib import Path
from tuner.cli import run
code = run(sys.argv[1:])
[peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print("peak", int(peak) * 1024)
sys.exit(code)
"""


def blocks(shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Values that differ from row to row and from tensor to tensor."""
    for row in range(0, shape[0], 1024):
        size = (min(1024, shape[0] - row), *shape[1:])
        yield torch.full(size, 1e-3 * (row // 1024 + 1) + seed, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_directory(tmp_path_factory.mktemp("large") / "model")
    config = InternLM2Config(**json.loads((folder / "config.json").read_text()) | SIZES, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in InternLM2ForCausalLM(config).state_dict().items()}
    pieces = [
        Piece(name, torch.bfloat16, shape, partial(blocks, shape, place))
        for place, (name, shape) in enumerate(shapes.items())
    ]
    assert sum(piece.num_bytes for piece in pieces) > 10**9
    write_shards(folder, pieces)
    return folder


def peak_of(*arguments: object) -> int:
    command = [sys.executable, "-c", MEASURED, "convert", "internevo", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.rpartition("peak ")[2])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(model: Path, tmp_path: Path) -> None:
    allowed = 1.5 * SIZES["vocab_size"] * SIZES["hidden_size"] * 2 + 500e6
    peaks = {
        "model to parts": peak_of(model, tmp_path / "parts", "--tp", 2),
        "parts to parts": peak_of(tmp_path / "parts", tmp_path / "more", "--tp", 4),
        "parts to model": peak_of(tmp_path / "more", tmp_path / "back", "--base", model, "--no-verify"),
    }
    print({name: round(peak / 1e6) for name, peak in peaks.items()}, round(allowed / 1e6))
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 10**9
    assert {name: peak for name, peak in peaks.items() if peak > allowed} == {}
