"""Checkpoint directories: whole or not there, and damage is found before anything is loaded."""

import errno
import json
from types import SimpleNamespace

import pytest

from tuner.engine import checkpoint
from tuner.engine.checkpoint import (
    begin_draft,
    checkpoint_path,
    copy_checkpoint,
    find_checkpoint,
    list_checkpoints,
    prune,
    publish,
    remove_leftovers,
    verify_checkpoint,
)
from tuner.engine.draft import write_file
from tuner.errors import UserError


def save(work_dir, step, weights=bytes(range(256)) * 8, loss=None, room=0):
    final = checkpoint_path(work_dir, step)
    files = {"weights": weights, "hf/config.json": b'{"a": 1}'}
    draft = begin_draft(final, room)
    entries = {name: write_file(draft / name, [content[:5], content[5:]]) for name, content in files.items()}
    publish(draft, final, entries, {"step": step, "run": "r", "loss": loss})
    return final


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
    first, second = save(tmp_path, 1), save(tmp_path, 2, bytes(reversed(range(256))) * 8)
    (first / "weights").rename(tmp_path / "kept")
    (second / "weights").rename(first / "weights")
    with pytest.raises(UserError, match="weights is damaged"):
        verify_checkpoint(first)


def test_without_room_nothing_is_begun(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(OSError, match=r"3\.00 GB are needed on the disk, 2\.00 GB are free") as raised:
        save(tmp_path, 2, room=3_000_000_000)
    assert raised.value.errno == errno.ENOSPC
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000001", "latest"}
    save(tmp_path, 3, room=2_000_000_000)


@pytest.mark.parametrize("moment", ["write_manifest", "rename_draft", "write_text_atomically"])
def test_a_run_killed_while_saving_has_one_whole_newest_checkpoint(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, moment, kill)
    with pytest.raises(Killed):
        save(tmp_path, 2)
    monkeypatch.undo()
    newest = find_checkpoint(tmp_path)
    assert newest.name == ("step_00000002" if moment == "write_text_atomically" else "step_00000001")
    verify_checkpoint(newest)
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    if moment != "write_text_atomically":
        save(tmp_path, 2)  # nothing half-made is in the way
        verify_checkpoint(find_checkpoint(tmp_path))


def test_the_newest_are_kept(tmp_path):
    for step in (1, 20, 3, 100):
        save(tmp_path, step)
    prune(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 4
    prune(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]


def names(work_dir):
    return [path.name.removeprefix("step_").lstrip("0") for path in list_checkpoints(work_dir)]


def test_every_kth_the_best_and_what_is_being_copied_stay_beside_the_newest(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: None, 60: 2.5}
    for step, loss in losses.items():
        save(tmp_path, step, loss=loss)
    prune(tmp_path, 2, every=30, best=True, spare=[checkpoint_path(tmp_path, 10)])
    assert names(tmp_path) == ["10", "30", "40", "50", "60"], "of two that are equally good the newer one"
    prune(tmp_path, 1, best=True)
    assert names(tmp_path) == ["40", "60"]
    prune(tmp_path, 1)
    assert names(tmp_path) == ["60"]


def test_a_copy_is_proven_before_it_has_its_name_and_replaces_nothing(tmp_path, monkeypatch):
    source, home = save(tmp_path / "run", 5), tmp_path / "archive" / "run" / "checkpoints"
    copy = copy_checkpoint(source, home)
    verify_checkpoint(copy)
    assert find_checkpoint(tmp_path / "archive" / "run") == copy
    assert copy_checkpoint(source, home) == copy, "it is there already"
    other = save(tmp_path / "other", 5, b"others")
    with pytest.raises(FileExistsError, match="is another checkpoint"):
        copy_checkpoint(other, home)
    verify_checkpoint(copy)
    monkeypatch.setattr(checkpoint.shutil, "copyfile", lambda source, target: target.write_bytes(b"x" * 2048))
    with pytest.raises(UserError, match="is damaged"):
        copy_checkpoint(save(tmp_path / "run", 6), home)
    assert [path.name for path in home.iterdir()] == ["step_00000005"]


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": "0"}
    manifest["sha256"] = checkpoint.hash_manifest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="names files outside the checkpoint"):
        verify_checkpoint(path)


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
