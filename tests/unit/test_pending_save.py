"""Two ranks write one checkpoint beside training: what fails on one fails for both, and nobody waits for ever."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from stub_training import make_runner

from tuner.engine import draft, pending_save, snapshot
from tuner.engine.checkpoint import checkpoint_path, list_checkpoints
from tuner.engine.hooks import CheckpointHook, MetricsHook
from tuner.engine.replicated import Replicated
from tuner.engine.tensor_files import DTYPES, NonFiniteTensorError, tensor_pieces
from tuner.engine.work_dir import choose_checkpoints, first_whole
from tuner.engine.world import World
from tuner.errors import UserError
from tuner.parallel.mesh import build_mesh

STEPS = ["step_00000002", "step_00000004", "step_00000006"]


def world() -> World:
    return World(dist.get_rank(), 2, dist.get_rank(), 2)


def train(work_dir: Path, *, async_save: bool, checkpoints: list[Path] | None = None, dropout: float = 0.3) -> None:
    strategy = Replicated(precision="fp32", device="cpu")
    strategy.place(world(), build_mesh(strategy.degrees))
    hooks = [MetricsHook(), CheckpointHook(interval=2, keep=None, async_save=async_save)]
    runner = make_runner(work_dir, hooks=hooks, strategy=strategy, attention_dropout=dropout)
    runner.checkpoints = checkpoints or []
    runner.train()


def names(work_dir: Path) -> list[str]:
    dist.barrier()
    found = sorted(path.name for path in (work_dir / "checkpoints").iterdir())
    dist.barrier()
    return found


def failing(step: int, error: Exception):
    """Writing fails on the second rank, when half of it is done."""
    write = pending_save.write_snapshot

    def write_or_fail(snapshot, directory, own):
        if snapshot.step == step and own.rank == 1:
            (directory / "half").write_bytes(b"half")
            raise error
        return write(snapshot, directory, own)

    return write_or_fail


def with_failure(work_dir: Path, error: Exception, *, is_noted: bool) -> str:
    """What a rank says at the end; "" where it came to it."""
    kept = pending_save.write_snapshot, pending_save.note_failed
    pending_save.write_snapshot = failing(4, error)
    if not is_noted:
        pending_save.note_failed = lambda *arguments: None  # the disk is too full for a word
    try:
        train(work_dir, async_save=True)
    except UserError as mistake:
        return str(mistake)
    finally:
        pending_save.write_snapshot, pending_save.note_failed = kept
    return ""


def swap_shards(checkpoint: Path) -> None:
    shards = sorted(checkpoint.glob("optimizer-*.safetensors"))
    shards[0].rename(checkpoint / "kept")
    shards[1].rename(shards[0])
    (checkpoint / "kept").rename(shards[1])


def run_all(directory: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    train(directory / "sync", async_save=False)
    train(directory / "beside", async_save=True)
    found["failed"] = with_failure(directory / "failed", OSError(28, "No space left on device"), is_noted=True)
    found["silent"] = with_failure(directory / "silent", OSError(28, "No space left on device"), is_noted=False)
    found["nan"] = with_failure(directory / "nan", NonFiniteTensorError("model tensor x"), is_noted=True)
    found["names"] = {name: names(directory / name) for name in ("failed", "silent", "nan")}
    dist.barrier()
    swapped = directory / "swapped"
    if dist.get_rank() == 0:
        shutil.copytree(directory / "beside", swapped)
        shutil.rmtree(checkpoint_path(swapped, 6))
        swap_shards(checkpoint_path(swapped, 4))
    dist.barrier()
    candidates = choose_checkpoints(swapped, "auto")
    found["chosen"] = first_whole(candidates, swapped, world()).name
    train(swapped, async_save=True, checkpoints=[checkpoint_path(swapped, 2)])
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, list[dict]]:
    directory = tmp_path_factory.mktemp("pending")
    return directory, run_on_ranks(2, run_all, directory)


def files_of(checkpoint: Path) -> dict[str, bytes]:
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("step", [2, 4, 6])
def test_what_two_ranks_write_beside_training_is_what_they_write_while_it_waits(ran, step):
    directory, _ = ran
    waiting, beside = (files_of(checkpoint_path(directory / name, step)) for name in ("sync", "beside"))
    assert {"model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors", "rng-00001.json"} < set(beside)
    assert [name for name in waiting if waiting[name] != beside[name]] == []
    assert waiting.keys() == beside.keys()
    assert (directory / "sync" / "metrics.jsonl").read_text().count("\n") == 6


def test_the_manifest_says_which_run_and_what_each_rank_wrote(ran):
    manifest = json.loads((checkpoint_path(ran[0] / "beside", 4) / "manifest.json").read_text())
    assert (manifest["step"], manifest["num_ranks"], len(manifest["run"])) == (4, 2, 32)
    assert manifest["versions"].keys() >= {"python", "tuner", "torch", "transformers"}
    assert manifest["files"].keys() == files_of(checkpoint_path(ran[0] / "beside", 4)).keys()


@pytest.mark.parametrize("name", ["failed", "silent"])
def test_a_rank_whose_disk_is_full_costs_that_checkpoint_only_also_where_it_cannot_say_so(ran, name):
    assert [found[name] for found in ran[1]] == ["", ""], "training went on to its end"
    assert [found["names"][name] for found in ran[1]] == [["latest", STEPS[0], STEPS[2]]] * 2


def test_a_value_that_is_not_finite_on_one_rank_ends_both(ran):
    for found in ran[1]:
        assert "rank 1: model tensor x is not finite: no checkpoint of step 4 was published" in found["nan"]
        assert found["names"]["nan"] == ["latest", STEPS[0]]


def test_two_swapped_shards_are_found_by_ranks_together_and_the_run_goes_on_bit_for_bit(ran):
    directory, found = ran
    assert [one["chosen"] for one in found] == [STEPS[0]] * 2
    swapped = directory / "swapped"
    assert [path.name for path in list_checkpoints(swapped)] == STEPS
    assert (swapped / "checkpoints" / "damaged_step_00000004").is_dir()
    assert files_of(checkpoint_path(swapped, 6)) == files_of(checkpoint_path(directory / "beside", 6))


def test_one_process_goes_on_with_its_own_random_state_and_says_that_draws_differ(ran, tmp_path, capfd, monkeypatch):
    checkpoint, restored = checkpoint_path(ran[0] / "beside", 4), []
    monkeypatch.setattr(snapshot, "restore_random_state", lambda state, devices: restored.append(state))
    make_runner(tmp_path, checkpoint=checkpoint, attention_dropout=0.3).train()
    assert restored == [json.loads((checkpoint / "rng-00000.json").read_text())]
    assert "was saved by 2 ranks and goes on with 1: the same data in the same steps" in capfd.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_tensors_of_every_dtype_are_in_the_file_as_safetensors_reads_it(tmp_path):
    made = {f"tensor {dtype}": torch.arange(7).to(dtype) for dtype in DTYPES}
    made |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "turned": torch.randn(3, 5).T}
    made["long"] = torch.arange(5_000_000, dtype=torch.int32)
    entry = draft.write_file(tmp_path / "a.safetensors", tensor_pieces("model", made))
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == made.keys()
    for name, tensor in made.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(read[name]), as_bytes(tensor)), name
    assert entry["size"] == (tmp_path / "a.safetensors").stat().st_size
    for dtype, value in product((torch.float32, torch.bfloat16, torch.float8_e5m2), ("nan", "inf", "-inf")):
        bad = torch.zeros(3_000_000, dtype=dtype)
        bad[-2] = float(value)
        with pytest.raises(NonFiniteTensorError, match="model tensor bad"):
            draft.write_file(tmp_path / f"{dtype} {value}", tensor_pieces("model", {"good": torch.ones(3), "bad": bad}))
