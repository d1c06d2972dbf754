"""Sets that cannot be tokenised first: their windows are tokenised while training goes on, and packed one by one."""

import hashlib
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tuner.dataset.ahead import Ahead, Epoch, Position
from tuner.dataset.collate import Batch, collate_packs, num_padding
from tuner.dataset.format_choice import Format
from tuner.dataset.ledger import Ledger
from tuner.dataset.ordering import IntArray
from tuner.dataset.packing import Packs, pack, pack_each
from tuner.dataset.prepare import choose_preparations
from tuner.dataset.rendering import Rendering
from tuner.dataset.sampler import StepPacks, StepPlan
from tuner.dataset.shards import Shards
from tuner.dataset.sources import DataPath, as_entries, parse_entry
from tuner.dataset.tokenize import Document
from tuner.dataset.windows import Stream, read_ledger, read_window, window_path
from tuner.errors import UserError

NUM_OPEN = 4  # windows kept open: a step may be of two, and the one before it is asked for again
Key = TypeVar("Key")
Value = TypeVar("Value")


def build_stream(
    path: DataPath,
    *,
    cache_dir: str | Path | None = None,
    data_format: str | Format,
    chat_template: str | Rendering,
    tokenizer: Any,
    max_length: int,
    too_long: str = "truncate",
    on_bad_row: str = "raise",
) -> Stream:
    """The files and settings of `build_shards`, for a StreamedDataset: nothing is tokenised yet.

    Raises UserError for bad settings, files that are not there or in several formats, and sources with weights.
    """
    refuse_weights(path)
    _, preparations = choose_preparations(
        path, data_format, chat_template, tokenizer, max_length, too_long, on_bad_row, cache_dir
    )
    if len(preparations) > 1:
        told = ", ".join(f"{files[0]} is {preparation.settings['data_format']}" for files, preparation in preparations)
        raise UserError(
            f"With streaming = True all files are read in one format: {told}. "
            "Give files of one format, or set streaming = False."
        )
    [(files, preparation)] = preparations
    return Stream(files, preparation)


def refuse_weights(path: DataPath) -> None:
    """Raise UserError for a data_path that gives its sources weights."""
    weighted = [entry.name for entry in map(parse_entry, as_entries(path)) if entry.weight is not None]
    if weighted:
        raise UserError(
            f"data_path gives {', '.join(dict.fromkeys(weighted))} a weight, and with streaming = True files are read "
            "one after the other, as they come. Leave the weights out and mix the rows beforehand, or set streaming = "
            "False."
        )


class StreamedShards:
    """The documents of a stream, numbered on and on through its epochs; a few windows are open at a time."""

    def __init__(self, stream: Stream, num_tokens: int, *, packed: bool) -> None:
        """With windows of `num_tokens` tokens; `packed` says whether documents share packs, or have one each."""
        self.files = stream.files
        self.epoch = Epoch(packed=packed)
        self._ahead: Ahead | None = Ahead(stream, num_tokens, self.epoch)
        self.directory = self._ahead.directory
        self._open: OrderedDict[int, Shards] = OrderedDict()
        weakref.finalize(self, self._ahead.stop)

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens windows that are there, and makes none."""
        return {**self.__dict__, "_ahead": None, "_open": OrderedDict()}

    def locate(self, pack: int) -> Position:
        """Where a pack of the endless row of packs is; waits for its window. Raises whatever stopped its making."""
        assert self._ahead is not None, "steps are planned where the windows are made"
        while (position := self.epoch.find(pack, self.epoch.packs)) is None:
            if self.epoch.is_complete:
                names = ", ".join(map(str, self.files))
                raise UserError(
                    f"No document is left of {names}: all rows are bad or too long, or loss_on leaves nothing to train."
                )
            self._ahead.need(len(self.epoch.windows))
        if not self.epoch.is_complete:
            self._ahead.need(position.window)  # it is there; now the ones behind it are made
        return position

    def window(self, number: int) -> Shards:
        """The documents of a window of an epoch."""
        return kept(self._open, number, lambda: Shards([window_path(self.directory, number)], [self.directory]))

    def first(self, position: Position) -> int:
        """The number of the first document of a window."""
        return position.epoch * self.epoch.documents[-1] + self.epoch.documents[position.window]

    def document(self, index: int) -> Document:
        """Document number `index`, of a window that is there."""
        position = self._find(index)
        return self.window(position.window).document(position.number)

    def source(self, index: int) -> str:
        """The `file:line` of the row that document number `index` came from."""
        position = self._find(index)
        stretches = self.epoch.windows[position.window].stretches
        ends = list(accumulate(stretch.num_documents for stretch in stretches))
        file = self.files[stretches[bisect_right(ends, position.number)].file]
        line = self.window(position.window).source(position.number).rpartition(":")[2]
        return f"{file}:{line}"

    def fingerprint(self, index: int) -> str:
        """Hash over the documents of all windows up to that of document number `index`."""
        position = self._find(index)
        windows = self.epoch.windows if position.epoch else self.epoch.windows[: position.window + 1]
        return hashlib.sha256("".join(window.content for window in windows).encode()).hexdigest()

    def _find(self, index: int) -> Position:
        while (position := self.epoch.find(index, self.epoch.documents)) is None:
            # in another process than the one that planned the step, which waited for the window
            self.epoch.add(read_window(window_path(self.directory, len(self.epoch.windows))))
        return position


class StreamedDataset:
    """Documents of a stream, packed window by window without end; item: a step's plan -> its micro-batches.

    Rows come in the order of the files, and again from the first when all are read; only inside a window, of about
    `packs_per_window` packs, documents are put together and packs shuffled. What a step takes follows from the rows,
    the settings and the seed alone. Windows are tokenised ahead of training and kept in the cache, as shards that any
    later run opens. Raises UserError if there is no document, and whatever stops the reading once training gets there.
    """

    def __init__(
        self,
        shards: Stream,
        *,
        max_length: int,
        seed: int,
        pack: bool = True,
        pad_to_multiple_of: int = 1,
        packs_per_window: int = 64,
    ) -> None:
        if shards.preparation.rows.max_length != max_length:
            raise UserError(
                f"max_length={max_length} of the packs is not the {shards.preparation.rows.max_length} of the stream. "
                "Give both the same."
            )
        self.shards = StreamedShards(shards, packs_per_window * max_length, packed=pack)
        self.max_length, self.seed, self.pack = max_length, seed, pack
        self.pad_to_multiple_of = pad_to_multiple_of
        self._packs: OrderedDict[tuple[int, int], Packs] = OrderedDict()
        self._num_reached = 1  # windows of the first epoch that steps have been planned from
        self._num_reached += self.shards.locate(0).window  # those before it have no document
        first = self.ledger
        print(replace(first, packs=0).table())
        print(f"That is the first window: {first.packs:,} packs of {max_length:,}, {first.efficiency:.2%} full.")
        print(f"Windows are made while training goes on, and kept in {self.shards.directory}", flush=True)

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets plans, which name the documents; it needs no packs."""
        return {**self.__dict__, "_packs": OrderedDict()}

    def packs(self, epoch: int, window: int) -> Packs:
        """The packs of a window: a function of (its lengths, max_length, seed, epoch, window)."""
        return kept(self._packs, (epoch, window), lambda: self._packed(epoch, window))

    def step_packs(self, step: int, packs_per_step: int) -> StepPacks:
        """What all ranks together take in a step; waits until the windows of all of it are there."""
        positions = [self.shards.locate(step * packs_per_step + place) for place in range(packs_per_step)]
        packs = []
        num_loss_tokens: float = 0
        for position in positions:
            documents = self.packs(position.epoch, position.window)[position.number]
            shards = self.shards.window(position.window)
            counts = shards.num_loss_tokens if shards.loss_weight is None else shards.loss_weight
            num_loss_tokens += counts[documents].sum().item()
            packs.append(self.shards.first(position) + documents)
        last = positions[-1]
        reached = len(self.shards.epoch.windows) if last.epoch else last.window + 1
        self._num_reached = max(self._num_reached, reached)
        return StepPacks(positions[0].epoch, packs, num_loss_tokens)

    def __getitem__(self, plan: StepPlan) -> list[Batch]:
        """One batch per micro-batch of the plan."""
        return collate_packs(plan.packs, self.shards.document, plan.num_loss_tokens, self.pad_to_multiple_of)

    def document_ids(self, plan: StepPlan) -> list[str]:
        """The `file:line` of every document of a step, to find what went wrong in it."""
        return [self.shards.source(index) for documents in plan.packs for index in documents]

    def fingerprint(self, packs: Sequence[Sequence[int] | IntArray]) -> str:
        """Hash over all documents up to the last window that the packs of a step, of all ranks, are of."""
        return self.shards.fingerprint(max(int(index) for documents in packs for index in documents))

    @property
    def ledger(self) -> Ledger:
        """Where the tokens of the windows went that steps have been planned from so far, each counted once."""
        numbers = range(self._num_reached)
        ledger = sum((read_ledger(self.shards.epoch.windows[number]) for number in numbers), Ledger()).check()
        padding = sum(map(self._padding, numbers)) if self.pad_to_multiple_of > 1 else 0
        num_packs = self.shards.epoch.packs[self._num_reached]
        return replace(ledger, packs=num_packs, max_length=self.max_length, padding=padding)

    @property
    def contributions(self) -> list[dict[str, Any]]:
        """What each file has in these windows: dicts as `contributions.contributions` gives them."""
        documents, tokens = [0] * len(self.shards.files), [0] * len(self.shards.files)
        for window in self.shards.epoch.windows[: self._num_reached]:
            for stretch in window.stretches:
                documents[stretch.file] += stretch.num_documents
                tokens[stretch.file] += stretch.num_tokens
        total = max(1, sum(tokens))
        return [
            {
                "source": str(file), "weight": None, "documents": number, "tokens": size,
                "drawn_documents": number, "drawn_tokens": size, "share": size / total, "passes": float(number > 0),
            }
            for file, number, size in zip(self.shards.files, documents, tokens)
        ]  # fmt: skip

    @property
    def sizes(self) -> tuple[IntArray, IntArray]:
        """(documents,) tokens and labels of each document of these windows."""
        windows = [self.shards.window(number) for number in range(self._num_reached)]
        lengths = np.concatenate([window.lengths for window in windows])
        return lengths, np.concatenate([window.num_loss_tokens for window in windows])

    def _packed(self, epoch: int, window: int) -> Packs:
        lengths, seed = self.shards.window(window).lengths, (self.seed, epoch, window)
        return pack(lengths, self.max_length, seed) if self.pack else pack_each(lengths, seed)

    def _padding(self, window: int) -> int:
        sizes = self.packs(0, window).sizes(self.shards.window(window).lengths)
        return sum(num_padding(size, self.pad_to_multiple_of) for size in sizes.tolist())


def kept(values: "OrderedDict[Key, Value]", key: Key, make: Callable[[], Value]) -> Value:
    """`values[key]`, made if it is not there; only the NUM_OPEN that were used last stay."""
    if key not in values:
        values[key] = make()
    values.move_to_end(key)
    while len(values) > NUM_OPEN:
        values.popitem(last=False)
    return values[key]
