"""A work dir belongs to one run at a time, and nothing that a user had there is written over."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.engine.checkpoint import begin_draft, checkpoint_path, list_checkpoints, list_steps, publish
from tuner.engine.draft import write_file
from tuner.engine.work_dir import choose_checkpoints, first_whole, locked, write_config
from tuner.engine.world import ALONE
from tuner.errors import UserError

HOLD = """
import sys
from pathlib import Path
from tuner.engine.work_dir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def save(work_dir, step):
    final = checkpoint_path(work_dir, step)
    draft = begin_draft(final, 0)
    publish(draft, final, {"weights": write_file(draft / "weights", [b"1"])}, {"step": step, "run": "r", "loss": None})
    return final


def test_a_second_run_is_refused_with_the_first_ones_process_until_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another run \(process {first.pid} on "), locked(tmp_path):
            pass
        first.kill()  # no goodbye: the system releases the lock
        first.wait()
    with locked(tmp_path), pytest.raises(UserError, match=rf"process {os.getpid()} on"), locked(tmp_path):
        pass


def test_a_work_dir_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be used as work dir.*--work-dir"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_place_that_takes_no_checkpoints_is_told_before_training(tmp_path, monkeypatch, resume):
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=r"cannot take checkpoints: .*Read-only file system.*--work-dir"):
        choose_checkpoints(tmp_path, resume)


def test_a_run_with_checkpoints_is_only_continued(tmp_path):
    assert choose_checkpoints(tmp_path, None) == []
    older = save(tmp_path, 3)
    newest = save(tmp_path, 10)
    with pytest.raises(UserError, match=r"holds a run already, up to step 10.*--resume.*--work-dir"):
        choose_checkpoints(tmp_path, None)
    assert choose_checkpoints(tmp_path, "auto") == [newest, older]
    assert choose_checkpoints(tmp_path, str(newest)) == [newest]
    assert choose_checkpoints(tmp_path, str(tmp_path)) == [newest, older]


def test_resuming_never_starts_from_scratch_silently(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        choose_checkpoints(tmp_path, "auto")
    with pytest.raises(UserError, match="is not a directory"):
        choose_checkpoints(tmp_path, str(tmp_path / "typo"))


def test_going_back_does_not_write_over_newer_checkpoints(tmp_path):
    older = save(tmp_path, 3)
    save(tmp_path, 10)
    with pytest.raises(UserError, match=r"newer checkpoints than .*step_00000003 \(step_00000010\)"):
        choose_checkpoints(tmp_path, str(older))
    assert choose_checkpoints(tmp_path / "branch", str(older)) == [older]


def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def swap(path):
    """As two ranks' shards of one size would be, after a copy by hand."""
    path.write_bytes(b"2")


DAMAGE = {
    "truncated": (lambda path: (path / "weights").write_bytes(b""), "weights is damaged: it has 0 bytes"),
    "flipped": (lambda path: flip(path / "weights"), "weights is damaged: its bytes have another sha256"),
    "swapped": (lambda path: swap(path / "weights"), "weights is damaged: its bytes have another sha256"),
    "missing": (lambda path: (path / "weights").unlink(), "weights is damaged: it is missing"),
    "half-copied": (lambda path: (path / "manifest.json").unlink(), "manifest.json is damaged: it cannot be read"),
    "torn manifest": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "a shard too many": (lambda path: (path / "a.safetensors").touch(), "a.safetensors is damaged: the manifest does"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, damage):
    save(tmp_path, 3)
    older, newest = save(tmp_path, 7), save(tmp_path, 10)
    break_it, message = DAMAGE[damage]
    break_it(newest)
    candidates = choose_checkpoints(tmp_path, "auto")
    assert first_whole(candidates, tmp_path, ALONE) == older
    said = capsys.readouterr().err
    assert message in said
    assert "Looking at step_00000007 instead" in said
    assert "step_00000010 is kept as damaged_step_00000010" in said
    assert [step.name for step in list_steps(tmp_path)] == ["step_00000003", "step_00000007"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000007\n"
    save(tmp_path, 10)  # its step can be saved again
    flip(tmp_path / "checkpoints" / "step_00000010" / "weights")
    assert first_whole(choose_checkpoints(tmp_path, "auto"), tmp_path, ALONE) == older
    assert (tmp_path / "checkpoints" / "damaged_step_00000010_2").is_dir()


def test_a_checkpoint_of_another_step_under_this_name_is_damage(tmp_path):
    older, newest = save(tmp_path, 3), save(tmp_path, 10)
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    assert first_whole(choose_checkpoints(tmp_path, "auto"), tmp_path, ALONE) == older


def test_one_checkpoint_that_is_asked_for_has_no_substitute(tmp_path):
    save(tmp_path, 3)
    newest = save(tmp_path, 10)
    flip(newest / "weights")
    with pytest.raises(UserError, match="weights is damaged"):
        first_whole(choose_checkpoints(tmp_path / "branch", str(newest)), tmp_path / "branch", ALONE)
    assert newest.is_dir()


def test_nothing_whole_is_an_error_that_lists_what_is_wrong_and_starts_nothing(tmp_path):
    for step in (3, 10):
        flip(save(tmp_path, step) / "weights")
    with pytest.raises(UserError, match=r"(?s)nothing to go on from:.*step_00000010/weights.*step_00000003/weights"):
        first_whole(choose_checkpoints(tmp_path, "auto"), tmp_path, ALONE)
    assert len(list_checkpoints(tmp_path)) == 2, "nothing is put aside for nothing"
    with pytest.raises(UserError, match="holds a run already"):
        choose_checkpoints(tmp_path, None)


def test_another_work_dir_is_left_as_it_is_where_its_newest_is_damaged(tmp_path):
    older, newest = save(tmp_path / "a", 3), save(tmp_path / "a", 10)
    flip(newest / "weights")
    candidates = choose_checkpoints(tmp_path / "b", str(tmp_path / "a"))
    assert first_whole(candidates, tmp_path / "b", ALONE) == older
    assert newest.is_dir()


def test_neither_a_moved_work_dir_nor_a_clock_that_went_backwards_matters(tmp_path):
    newest = [save(tmp_path / "a", step) for step in (3, 10)][-1]
    os.utime(newest, (0, 0))
    os.utime(newest / "manifest.json", (0, 0))
    (tmp_path / "a" / "checkpoints" / "latest").unlink()
    (tmp_path / "a").rename(tmp_path / "b")
    found = first_whole(choose_checkpoints(tmp_path / "b", "auto"), tmp_path / "b", ALONE)
    assert found == tmp_path / "b" / "checkpoints" / "step_00000010"


def test_a_config_of_the_users_own_is_left_as_it_is(tmp_path):
    (tmp_path / "config.py").write_text("mine = 1\n")
    with pytest.raises(UserError, match="exists and is another config"):
        write_config(tmp_path, "seed = 0\n", is_resumed=False)
    assert (tmp_path / "config.py").read_text() == "mine = 1\n"
    write_config(tmp_path, "seed = 0\n", is_resumed=True)
    assert (tmp_path / "config.py").read_text() == "seed = 0\n"


def test_what_a_run_that_failed_early_has_left_is_replaced_unless_somebody_edited_it(tmp_path):
    for source in ("sequence_parallel_size = 3\n", "sequence_parallel_size = 2\n"):
        write_config(tmp_path, source, is_resumed=False)
        assert (tmp_path / "config.py").read_text() == source
    (tmp_path / "config.py").write_text("mine = 1\n")
    with pytest.raises(UserError, match="exists and is another config"):
        write_config(tmp_path, "seed = 0\n", is_resumed=False)
