"""Windows of a stream: rows in the order of the files, some packs of them at a time, each tokenised into a shard."""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tuner.dataset.cache import build_once
from tuner.dataset.documents import EncodedChunk
from tuner.dataset.fingerprint import digest
from tuner.dataset.ledger import Ledger
from tuner.dataset.packing import pack
from tuner.dataset.prepare import SMALL_BYTES, Preparation, bad_row_error
from tuner.dataset.read import BEGIN, Chunk, Place, Row, file_kind, read_chunks
from tuner.dataset.reading.stamps import Stamp, check_unchanged, stamp
from tuner.dataset.shards import ShardWriter, is_whole
from tuner.dataset.sources import is_settled
from tuner.dataset.workers import Workers, travels
from tuner.errors import UserError

WINDOW_VERSION = 1  # raise it when the same rows are put into other windows than before
MOST_WORKERS = 4  # tokenise faster than a machine trains; each takes about 140 MB
LOOK_SECONDS = 0.05  # between two looks at a window that another process is writing
PATIENCE_SECONDS = 1.0  # until a process makes a window where another made the last one: so one of them makes them all


class StoppedError(Exception):
    """Whoever wanted the windows wants no more of them."""


class Mark(NamedTuple):
    """A place between two chunks: the files before number `file` are read, and of that one what is before `place`."""

    file: int = 0
    place: Place = BEGIN


class Stretch(NamedTuple):
    """What a window has of a file; `stamp` is None where the file was too young for it to tell anything."""

    file: int
    num_documents: int
    num_tokens: int
    stamp: list[int] | None


class Window(NamedTuple):
    """What its directory says of a window, a shard of all its documents."""

    directory: Path
    start: Mark
    end: Mark
    is_last: bool  # of an epoch
    num_documents: int
    num_packs: int  # where several documents share one
    rows: str  # hash of all rows it was made of
    content: str  # hash of its documents
    stretches: list[Stretch]  # in the order of its documents


class Stream(NamedTuple):
    """Files to read in order, and what makes documents of their rows."""

    files: list[Path]
    preparation: Preparation


def read_window(directory: Path) -> Window:
    """Opens nothing but its meta.json."""
    meta = json.loads((directory / "meta.json").read_bytes())
    facts = meta["ingredients"]["window"]
    content = hashlib.sha256(json.dumps(meta["content"], sort_keys=True).encode()).hexdigest()
    return Window(
        directory=directory,
        start=_mark(facts["start"]),
        end=_mark(facts["end"]),
        is_last=facts["is_last"],
        num_documents=meta["num_documents"],
        num_packs=facts["num_packs"],
        rows=facts["rows"],
        content=content,
        stretches=[Stretch(*stretch) for stretch in facts["stretches"]],
    )


def read_ledger(window: Window) -> Ledger:
    """Where the tokens of a window's rows went."""
    return Ledger.from_dict(json.loads((window.directory / "meta.json").read_bytes())["ledger"])


def window_path(directory: Path, number: int) -> Path:
    """Where a stream keeps window `number`, counted from 0."""
    return directory / f"{number:08}"


class _Encoded(NamedTuple):
    """A chunk's documents, the mark behind it, and the hash of its rows."""

    chunk: EncodedChunk
    end: Mark
    rows: bytes


class WindowMaker:
    """Finds the windows of a stream or makes them, one after the other; for one thread.

    A window is as many chunks of rows as give `num_tokens`, or what is left of the files: it depends on the rows alone,
    not on who made it. One that is found is used if the files are as they were, or if its rows can be read again as
    they were. Several processes may make the windows of a stream at once; a context manager, for its worker processes.
    """

    def __init__(self, stream: Stream, num_tokens: int, stopped: threading.Event) -> None:
        self._files, self._preparation = stream
        self._num_tokens, self._stopped = num_tokens, stopped
        ingredients = {
            **self._preparation.settings,
            **self._preparation.fixed,
            "files": [[str(file.resolve()), file_kind(file)] for file in self._files],
            "window": [WINDOW_VERSION, num_tokens],
        }
        self._key = digest(ingredients)
        self.directory = self._preparation.cache_dir / f"stream-{self._key}"
        self._seen: dict[int, tuple[Stamp, bool]] = {}  # by file: its state when first read, whether that tells it
        self._reading: tuple[Mark, Iterator[tuple[Mark, Chunk]]] | None = None
        self._is_maker = True
        self._tokenising = ExitStack()
        self._encoded: Iterator[_Encoded | UserError] = iter(())
        self._next: _Encoded | UserError | None = None
        self._at: Mark | None = None  # where `_next` begins

    def __enter__(self) -> "WindowMaker":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokenising.close()

    def window(self, number: int, start: Mark) -> Window:
        """Window `number`, whose rows begin at `start`.

        Raises UserError for a bad row, files that cannot be read or change, and a full disk; StoppedError when told to.
        """
        directory = window_path(self.directory, number)
        patience = time.monotonic() + (0 if self._is_maker else PATIENCE_SECONDS)
        while not self._is_valid(directory, start):
            write, is_valid = partial(self._write, start=start), partial(self._is_valid, start=start)
            if time.monotonic() >= patience and build_once(directory, write, is_valid, wait=False):
                self._is_maker = True
                break
            if self._is_maker and not self._is_valid(directory, start):
                print(f"Another run makes the windows of this stream; they are shared ({self.directory})", flush=True)
            self._is_maker = False
            if self._stopped.wait(LOOK_SECONDS):
                raise StoppedError
        return read_window(directory)

    def _is_valid(self, directory: Path, start: Mark) -> bool:
        """Whether a window is there, whole, and of the rows that are in the files now."""
        if not is_whole(directory):
            return False
        window = read_window(directory)
        if window.start != start:
            return False
        stamps = [(stretch.stamp, self._files[stretch.file]) for stretch in window.stretches]
        if all(seen is not None and seen == list(stamp(file)) for seen, file in stamps):
            return True
        return self._has_these_rows(window)

    def _has_these_rows(self, window: Window) -> bool:
        """Whether reading the files again gives the window's rows, and an end of the files where it had one."""
        rows, reading = hashlib.sha256(), self._read(window.start)
        try:
            for end, chunk in reading:
                rows.update(_hash(chunk.rows))
                if end >= window.end:
                    break
            following = next(reading, None)
        except UserError:
            return False  # whoever makes the window will say it
        if following is not None:
            self._reading = (window.end, chain([following], reading))
        return rows.hexdigest() == window.rows and window.is_last == (following is None)

    def _read(self, mark: Mark) -> Iterator[tuple[Mark, Chunk]]:
        """The chunks behind a mark, each with the mark behind it; goes on reading where it stopped, if it can."""
        at, reading = self._reading or (None, iter(()))
        self._reading = None
        return reading if at == mark else self._chunks(mark)

    def _chunks(self, mark: Mark) -> Iterator[tuple[Mark, Chunk]]:
        for number in range(mark.file, len(self._files)):
            file, place = self._files[number], mark.place if number == mark.file else BEGIN
            seen = stamp(file)
            self._seen.setdefault(number, (seen, is_settled(seen, time.time())))
            for chunk in read_chunks(file, place):
                place = place.behind(chunk)
                yield Mark(number, place), chunk

    def _encode(self, mark: Mark, workers: Workers[Chunk, EncodedChunk]) -> Iterator[_Encoded | UserError]:
        """The chunks behind a mark; what stops the reading comes last, however far ahead of the workers it was read."""
        under_way: deque[tuple[Mark, bytes]] = deque()
        problems: list[UserError] = []

        def chunks() -> Iterator[Chunk]:
            try:
                for end, chunk in self._read(mark):
                    under_way.append((end, _hash(chunk.rows)))
                    yield chunk
            except UserError as problem:
                problems.append(problem)

        for encoded in workers.map(chunks()):
            yield _Encoded(encoded, *under_way.popleft())
        yield from problems

    def _go_to(self, mark: Mark) -> None:
        """Begin to tokenise there, unless that is where tokenising has come to."""
        if self._at == mark:
            return
        self._tokenising.close()
        rows = self._preparation.rows
        size = sum(stamp(file).size for file in self._files)
        num_workers = min(MOST_WORKERS, self._preparation.num_workers, -(-size // max(1, SMALL_BYTES)))
        if num_workers > 1 and not travels(rows, "Tokenising"):
            num_workers = 1
        workers: Workers[Chunk, EncodedChunk] = Workers(rows, num_workers=num_workers)
        self._encoded = self._encode(mark, self._tokenising.enter_context(workers))
        self._next = next(self._encoded, None)
        self._at = mark

    def _take(self) -> _Encoded:
        """The next chunk. Raises UserError where the files cannot be read on, or for a bad row that stops the work."""
        assert self._next is not None
        if self._stopped.is_set():
            raise StoppedError
        if isinstance(self._next, UserError):
            raise self._next
        taken = self._next
        if taken.chunk.bad_rows and self._preparation.rows.on_bad_row == "raise":
            self._check_unchanged([taken.end.file])  # or the row was bad because it was half written
            raise bad_row_error(self._files[taken.end.file], taken.chunk)
        self._next, self._at = next(self._encoded, None), taken.end
        return taken

    def _write(self, directory: Path, *, start: Mark) -> None:
        self._go_to(start)
        writer, rows = ShardWriter(directory), hashlib.sha256()
        ledger, end = Ledger(), start
        lengths, files = [np.empty(0, np.int64)], [np.empty(0, np.int64)]  # of the documents
        try:
            while self._next is not None and ledger.kept.tokens < self._num_tokens:
                chunk, end, hashed = self._take()
                rows.update(hashed)
                file = self._files[end.file]
                writer.append(chunk.block, [bad._replace(reason=f"{file}: {bad.reason}") for bad in chunk.bad_rows])
                ledger += chunk.ledger
                lengths.append(chunk.block.lengths)
                files.append(np.full(len(chunk.block.lengths), end.file))
            stretches = self._stretches(range(start.file, end.file + 1), np.concatenate(lengths), np.concatenate(files))
            self._check_unchanged([stretch.file for stretch in stretches])
            num_packs = len(pack(np.concatenate(lengths), self._preparation.rows.max_length, (0,)))
            facts = {"start": start, "end": end, "is_last": self._next is None, "num_packs": num_packs}
            facts |= {"rows": rows.hexdigest(), "stretches": stretches}
            writer.close(ledger, {"stream": self._key, "window": facts})
        finally:
            writer.abandon()
        if ledger.skipped:
            final = window_path(self.directory, int(directory.name.partition(".")[0]))
            print(f"{ledger.skipped:,} bad rows skipped; they are in {final / 'bad_rows.jsonl'}, and why beside it")

    def _stretches(self, numbers: Sequence[int], lengths: Any, files: Any) -> list[Stretch]:
        """What a window that was read from these files holds of each."""
        stretches = []
        for number in numbers:
            own = lengths[files == number]
            seen, tells = self._seen[number]
            stretches.append(Stretch(number, len(own), int(own.sum()), list(seen) if tells else None))
        return stretches

    def _check_unchanged(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            check_unchanged(self._files[number], self._seen[number][0])


def _mark(value: list[Any]) -> Mark:
    return Mark(value[0], Place(*value[1]))


def _hash(rows: Sequence[Row]) -> bytes:
    """Hash of rows as they were read, lines and faults included."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(f"{row.line} {len(row.content)} {len(row.fault)} {row.fault}\n".encode())
        hashed.update(row.content)
    return hashed.digest()
