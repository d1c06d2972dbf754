"""A lock that a killed build has left ends a run with its name; one of a build that lives is waited for."""

import os
import threading
import time
from pathlib import Path

import pytest

from tuner.engine.build_locks import wait_for_builds
from tuner.errors import UserError

TO_DISK = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "lock").touch()
    return tmp_path / "async_io" / "lock"


def test_a_stale_lock_is_named_and_only_where_it_matters(lock: Path):
    os.utime(lock, (time.time() - 3600,) * 2)
    wait_for_builds({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": None}})
    with pytest.raises(UserError, match=r"async_io/lock is 60 minutes old: .*rm .*async_io/lock"):
        wait_for_builds(TO_DISK)


def test_a_build_that_ends_is_waited_for_and_one_that_does_not_only_for_a_time(lock: Path, capsys):
    builder = threading.Timer(0.3, lock.unlink)
    builder.start()
    started = time.monotonic()
    wait_for_builds(TO_DISK, patience=20)
    builder.join()
    assert time.monotonic() - started >= 0.3
    assert capsys.readouterr().out.count("waiting for another process") == 1
    lock.touch()
    with pytest.raises(UserError, match="would wait for it for ever"):
        wait_for_builds(TO_DISK, patience=0.2)
