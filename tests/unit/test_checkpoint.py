"""Checkpoint directories: whole or not there, and damage is found before anything is loaded."""

import json

import pytest

from tuner.engine import checkpoint
from tuner.engine.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    prune,
    publishing,
    remove_leftovers,
    verify_checkpoint,
)
from tuner.errors import UserError


def save(work_dir, step):
    with publishing(work_dir, step) as draft:
        (draft / "weights").write_bytes(bytes(range(256)) * 8)
        (draft / "hf").mkdir()
        (draft / "hf" / "config.json").write_text('{"a": 1}')
    return checkpoint_path(work_dir, step)


def test_a_published_checkpoint_is_whole_and_the_latest(tmp_path):
    save(tmp_path, 3)
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoints" / "step_00000012"
    verify_checkpoint(path)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000012\n"
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {"weights", "hf/config.json"}
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(path) == path


@pytest.mark.parametrize("name", ["weights", "hf/config.json", "manifest.json"])
def test_every_flipped_byte_is_found_and_its_file_named(tmp_path, name):
    path = save(tmp_path, 1)
    whole = (path / name).read_bytes()
    meaningless = 0
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (path / name).write_bytes(flipped)
        if name == "manifest.json" and whole[position : position + 1].isspace():
            meaningless += 1  # a space of the manifest's layout may become another character that JSON refuses, or not
            continue
        with pytest.raises(UserError, match=r"is damaged"):
            verify_checkpoint(path)
    assert meaningless < len(whole) / 7 / 2


@pytest.mark.parametrize("name", ["weights", "hf/config.json", "manifest.json"])
def test_truncated_and_missing_files_are_named(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).write_bytes((path / name).read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        verify_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        verify_checkpoint(path)


def test_swapped_files_of_one_size_are_found(tmp_path):
    first, second = save(tmp_path, 1), checkpoint_path(tmp_path, 2)
    with publishing(tmp_path, 2) as draft:
        (draft / "weights").write_bytes(bytes(reversed(range(256))) * 8)
    (first / "weights").rename(tmp_path / "kept")
    (second / "weights").rename(first / "weights")
    with pytest.raises(UserError, match="weights is damaged"):
        verify_checkpoint(first)


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1)

    def fail():
        with publishing(tmp_path, 2) as draft:
            (draft / "weights").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000001", "latest"}
    verify_checkpoint(find_checkpoint(tmp_path))


@pytest.mark.parametrize("moment", ["seal", "write_text_atomically"])
def test_a_run_killed_while_saving_has_one_whole_newest_checkpoint(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, moment, kill)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *arguments, **keywords: None)  # a kill cleans nothing up
    with pytest.raises((Killed, FileExistsError)):
        save(tmp_path, 2)
    monkeypatch.undo()
    newest = find_checkpoint(tmp_path)
    assert newest.name == ("step_00000001" if moment == "seal" else "step_00000002")
    verify_checkpoint(newest)
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    if moment == "seal":
        save(tmp_path, 2)  # nothing half-made is in the way
        verify_checkpoint(find_checkpoint(tmp_path))


def test_the_newest_are_kept(tmp_path):
    for step in (1, 20, 3, 100):
        save(tmp_path, step)
    prune(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 4
    prune(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]


def test_what_is_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        find_checkpoint(tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
