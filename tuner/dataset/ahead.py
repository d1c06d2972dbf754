"""Windows of a stream made in a thread before they are asked for, with what is known of those that are there."""

import os
import threading
from bisect import bisect_right
from typing import NamedTuple

from tuner.dataset.windows import Mark, StoppedError, Stream, Window, WindowMaker

NUM_AHEAD = 2  # windows beyond the one in use
STOP_SECONDS = 10.0  # a chunk is tokenised, or a window removed, in less


class Position(NamedTuple):
    """A pack or a document by the window it is in, counted from 0 in its epoch, and its number in there."""

    epoch: int
    window: int
    number: int


class Epoch:
    """The windows of an epoch as far as they are there, and how many packs and documents come before each.

    Every epoch has the same windows, so once the last is there all epochs are known. One thread may add windows while
    another looks: what `is_complete` and `windows` say is the last to change.
    """

    def __init__(self, *, packed: bool) -> None:
        """With `packed` False each document is a pack."""
        self._packed = packed
        self.windows: list[Window] = []
        self.packs, self.documents = [0], [0]  # before each window, and before the one to come
        self.is_complete = False

    @property
    def end(self) -> Mark:
        """Where the next window begins."""
        return self.windows[-1].end if self.windows else Mark()

    def add(self, window: Window) -> None:
        """Add the window behind the last."""
        self.documents.append(self.documents[-1] + window.num_documents)
        self.packs.append(self.packs[-1] + (window.num_packs if self._packed else window.num_documents))
        self.windows.append(window)
        self.is_complete = window.is_last

    def find(self, number: int, starts: list[int]) -> Position | None:
        """Where pack or document `number` of an endless run is; `starts` are those of `packs` or `documents`.

        None where that window is not there yet, or an epoch has nothing at all.
        """
        is_complete, num_windows = self.is_complete, len(self.windows)
        total = starts[num_windows]
        if not total or (number >= total and not is_complete):
            return None
        epoch, rest = divmod(number, total)
        window = bisect_right(starts, rest, hi=num_windows + 1) - 1
        return Position(epoch, window, rest - starts[window])


class Ahead:
    """Finds or makes windows in a thread, up to NUM_AHEAD beyond the last that was asked for."""

    def __init__(self, stream: Stream, num_tokens: int, epoch: Epoch) -> None:
        self._stop = threading.Event()
        self._maker = WindowMaker(stream, num_tokens, self._stop)
        self.directory = self._maker.directory
        self._epoch = epoch
        self._changed = threading.Condition()
        self._wanted = 0  # windows
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="windows", daemon=True)
        self._process = os.getpid()

    def need(self, window: int) -> None:
        """Wait until this window is there, or the epoch has come to its end. Raises what stopped its making."""
        with self._changed:
            self._wanted = max(self._wanted, window + 1 + NUM_AHEAD)
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_there(window) or self._problem is not None)
            if not self._is_there(window):
                assert self._problem is not None
                raise self._problem

    def stop(self) -> None:
        """End the thread; in a process that was forked from the one that began it, nothing."""
        if os.getpid() != self._process or self._thread.ident is None:
            return
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(STOP_SECONDS)

    def _is_there(self, window: int) -> bool:
        return window < len(self._epoch.windows) or self._epoch.is_complete

    def _run(self) -> None:
        try:
            with self._maker:
                while self._is_wanted():
                    self._add(self._maker.window(len(self._epoch.windows), self._epoch.end))
        except StoppedError:
            return
        except BaseException as problem:  # raised again where the window is needed
            with self._changed:
                self._problem = problem
                self._changed.notify_all()

    def _add(self, window: Window) -> None:
        with self._changed:
            self._epoch.add(window)
            self._changed.notify_all()

    def _is_wanted(self) -> bool:
        """Wait until one more window is wanted; False where there is none, or never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or len(self._epoch.windows) < self._wanted)
            return not self._stop.is_set() and not self._epoch.is_complete
