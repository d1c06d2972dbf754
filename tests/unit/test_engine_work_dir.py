"""A work dir belongs to one run at a time, and nothing that a user had there is written over."""

import os
import subprocess
import sys

import pytest

from tuner.engine.checkpoint import checkpoint_path, publishing
from tuner.engine.work_dir import choose_checkpoint, locked, write_config
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
    with publishing(work_dir, step) as draft:
        (draft / "weights").write_bytes(b"1")
    return checkpoint_path(work_dir, step)


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


def test_a_run_with_checkpoints_is_only_continued(tmp_path):
    assert choose_checkpoint(tmp_path, None) is None
    save(tmp_path, 3)
    newest = save(tmp_path, 10)
    with pytest.raises(UserError, match=r"holds a run already, up to step 10.*--resume.*--work-dir"):
        choose_checkpoint(tmp_path, None)
    assert choose_checkpoint(tmp_path, "auto") == newest
    assert choose_checkpoint(tmp_path, str(newest)) == newest
    assert choose_checkpoint(tmp_path, str(tmp_path)) == newest


def test_resuming_never_starts_from_scratch_silently(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        choose_checkpoint(tmp_path, "auto")
    with pytest.raises(UserError, match="is not a directory"):
        choose_checkpoint(tmp_path, str(tmp_path / "typo"))


def test_going_back_does_not_write_over_newer_checkpoints(tmp_path):
    older = save(tmp_path, 3)
    save(tmp_path, 10)
    with pytest.raises(UserError, match=r"newer checkpoints than .*step_00000003 \(step_00000010\)"):
        choose_checkpoint(tmp_path, str(older))
    assert choose_checkpoint(tmp_path / "branch", str(older)) == older


def test_a_config_of_the_users_own_is_left_as_it_is(tmp_path):
    (tmp_path / "config.py").write_text("mine = 1\n")
    with pytest.raises(UserError, match="exists and is another config"):
        write_config(tmp_path, "seed = 0\n", is_resumed=False)
    assert (tmp_path / "config.py").read_text() == "mine = 1\n"
    write_config(tmp_path, "seed = 0\n", is_resumed=True)
    assert (tmp_path / "config.py").read_text() == "seed = 0\n"
