"""What all tests share: seeds, one thread, and the optional real data."""

import os
import signal
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# A shell that starts the tests in the background lets every process ignore SIGINT for good, nohup lets it ignore
# SIGHUP, and so do the children; the tests that interrupt a child would wait for ever.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile("fast", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("fast")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real data; tests that need it skip where it is absent."""
    path = Path(os.environ.get("TUNER_SHARED", ROOT.parent / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set TUNER_SHARED to try it")
    return path


@pytest.fixture
def tuner_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for a test that must not see the user's."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session", autouse=True)
def quick_template_processes():
    """Forks of one process that has imported what they need, and sixteen where users have two.

    Tests go through one template after the other, and each start of a new interpreter takes seconds.
    """
    from tuner.dataset import jinja_process, jinja_template

    def fork():
        from template_processes import Fork

        return Fork()

    new_interpreter = jinja_process._start
    patch = pytest.MonkeyPatch()
    patch.setattr(jinja_process, "_start", fork)
    patch.setattr(jinja_template, "_start", lru_cache(maxsize=16)(jinja_template._start.__wrapped__))
    yield new_interpreter
    patch.undo()


@pytest.fixture
def template_processes_of_users(quick_template_processes, monkeypatch: pytest.MonkeyPatch):
    """New interpreters, as outside the tests."""
    from tuner.dataset import jinja_process

    monkeypatch.setattr(jinja_process, "_start", quick_template_processes)


@pytest.fixture(autouse=True)
def signals_kept():
    """What this process does with signals: runs that were told to end ignore them for the rest of their lives."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
