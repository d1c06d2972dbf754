"""Tokenised documents on disk: memory-mapped, compact, written once and only seen when whole."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tuner.dataset.documents import BadRow, Block
from tuner.dataset.ledger import Ledger
from tuner.dataset.loss_weights import NO_SPANS, SPAN, Spans, dense, surplus
from tuner.dataset.mixture import Share
from tuner.dataset.tokenize import Document

FORMAT_VERSION = 2
UINT16_LIMIT = 1 << 16
COPY_TOKENS = 1 << 20
EDGE_STEP = 64
# file name -> bytes per entry, for the files with one entry per document
PER_DOCUMENT = {"lengths.bin": np.uint32, "num_loss_tokens.bin": np.uint32, "lines.bin": np.uint64}


class ShardWriter:
    """Writes the documents of one data file to a directory, block after block, in bounded memory.

    tokens.bin: ids, uint16 while all of them fit, else uint32; trained.bin: one bit per token, in order, most
    significant first; lengths.bin, num_loss_tokens.bin (uint32), lines.bin (uint64): one entry per document;
    weights.bin: spans of labels that do not weigh 1 (`loss_weights.SPAN`), absent where all do;
    bad_rows.jsonl: the skipped rows as they came, to be mended and fed again; bad_rows.reasons.jsonl: line by line why;
    meta.json: type and number of the above, and the ledger. Raises the OSError of a full disk.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}
        self._dtype: type[np.unsignedinteger[Any]] = np.uint16
        self._bits = np.empty(0, np.bool_)  # the last tokens' marks, fewer than a byte of them
        self._num_documents = self._num_tokens = self._num_spans = 0
        self._hashes = {name: hashlib.sha256() for name in ("ids", "trained", "lengths")}
        for name in ("tokens.bin", "trained.bin", *PER_DOCUMENT):
            self._files[name] = open(directory / name, "wb")  # noqa: SIM115 (closed in `close` and `abandon`)

    def append(self, block: Block, bad_rows: Sequence[BadRow]) -> None:
        """Add documents and rows that were skipped."""
        if len(block.ids) and self._dtype is np.uint16 and block.ids.max() >= UINT16_LIMIT:
            self._widen()
        self._write("tokens.bin", block.ids.astype(self._dtype))
        for name, values in (("ids", block.ids), ("trained", block.trained), ("lengths", block.lengths)):
            self._hashes[name].update(values.tobytes())
        bits = np.concatenate([self._bits, block.trained])
        whole = len(bits) // 8 * 8
        self._write("trained.bin", np.packbits(bits[:whole]))
        self._bits = bits[whole:]
        for name, values in zip(PER_DOCUMENT, (block.lengths, block.num_loss_tokens, block.lines)):
            self._write(name, values.astype(PER_DOCUMENT[name]))
        if len(block.spans):
            self._append_spans(block.spans)
        self._num_documents += len(block.lengths)
        self._num_tokens += len(block.ids)
        for bad in bad_rows:
            reason = json.dumps({"line": bad.row.line, "reason": bad.reason}, ensure_ascii=False)
            self._append_line("bad_rows.jsonl", bad.row.content.rstrip(b"\r\n").replace(b"\n", b" "))
            self._append_line("bad_rows.reasons.jsonl", reason.encode("utf-8", "backslashreplace"))

    def close(self, ledger: Ledger, ingredients: dict[str, Any]) -> None:
        """Finish the files, force them to the disk, and say in meta.json what they hold."""
        self._write("trained.bin", np.packbits(self._bits))
        meta = {
            "format_version": FORMAT_VERSION,
            "tokens_dtype": np.dtype(self._dtype).name,
            "num_documents": self._num_documents,
            "num_tokens": self._num_tokens,
            "num_spans": self._num_spans,
            "content": {name: running.hexdigest() for name, running in self._hashes.items()},
            "ledger": ledger.check().to_dict(),
            "ingredients": ingredients,
        }
        self._append_line("meta.json", json.dumps(meta, indent=1).encode())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: NDArray[Any]) -> None:
        self._files[name].write(values.tobytes())

    def _append_line(self, name: str, line: bytes) -> None:
        self._open_late(name).write(line + b"\n")

    def _append_spans(self, spans: Spans) -> None:
        moved = spans.copy()
        moved["start"] += self._num_tokens
        moved["end"] += self._num_tokens
        self._open_late("weights.bin").write(moved.tobytes())
        self._hashes.setdefault("weights", hashlib.sha256()).update(moved.tobytes())
        self._num_spans += len(moved)

    def _open_late(self, name: str) -> BinaryIO:
        """A file that many shards need not have."""
        if name not in self._files:
            self._files[name] = open(self._directory / name, "wb")  # noqa: SIM115
        return self._files[name]

    def _widen(self) -> None:
        """Rewrite the ids so far in 32 bits: the first id beyond 16 has come."""
        self._files["tokens.bin"].close()
        path = self._directory / "tokens.bin"
        narrow = path.rename(path.with_suffix(".16"))
        self._dtype = np.uint32
        self._files["tokens.bin"] = open(path, "wb")  # noqa: SIM115
        with open(narrow, "rb") as file:
            while block := file.read(2 * COPY_TOKENS):
                self._write("tokens.bin", np.frombuffer(block, np.uint16).astype(np.uint32))
        narrow.unlink()


def is_whole(directory: Path) -> bool:
    """Whether a shard's files are as long as its meta.json says."""
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
        if meta["format_version"] != FORMAT_VERSION:
            return False
        names = ("tokens.bin", "trained.bin", *PER_DOCUMENT, *(["weights.bin"] if meta["num_spans"] else []))
        sizes = {name: (directory / name).stat().st_size for name in names}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    expected = {name: np.dtype(dtype).itemsize * meta["num_documents"] for name, dtype in PER_DOCUMENT.items()}
    if meta["num_spans"]:
        expected["weights.bin"] = SPAN.itemsize * meta["num_spans"]
    expected["tokens.bin"] = np.dtype(meta["tokens_dtype"]).itemsize * meta["num_tokens"]
    expected["trained.bin"] = -(-meta["num_tokens"] // 8)
    return sizes == expected


class _Shard:
    """The documents of one data file."""

    def __init__(self, directory: Path) -> None:
        meta = json.loads((directory / "meta.json").read_bytes())
        self.ledger = Ledger.from_dict(meta["ledger"])
        self.content = meta["content"]
        self.lengths, self.num_loss_tokens, self.lines = (
            _mapped(directory / name, dtype) for name, dtype in PER_DOCUMENT.items()
        )
        self._tokens = _mapped(directory / "tokens.bin", np.dtype(meta["tokens_dtype"]))
        self._trained = _mapped(directory / "trained.bin", np.uint8)
        self.spans = _mapped(directory / "weights.bin", SPAN) if meta["num_spans"] else NO_SPANS

    @cached_property
    def loss_weight(self) -> NDArray[np.float64]:
        """(documents,) what the labels of each document weigh together."""
        edges = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        owners = np.searchsorted(edges, self.spans["start"], side="right") - 1
        extra = np.bincount(owners, weights=surplus(self.spans), minlength=len(self.lengths))
        return self.num_loss_tokens + extra

    @cached_property
    def _span_starts(self) -> NDArray[np.int64]:
        return np.ascontiguousarray(self.spans["start"])

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        """Where every EDGE_STEP-th document begins: one for each would be the largest thing in a worker's memory."""
        if not len(self.lengths):
            return np.zeros(1, np.int64)
        tokens = np.add.reduceat(self.lengths, np.arange(0, len(self.lengths), EDGE_STEP), dtype=np.int64)
        return np.concatenate([[0], np.cumsum(tokens)])

    def document(self, index: int) -> Document:
        step, rest = divmod(index, EDGE_STEP)
        lengths = self.lengths[step * EDGE_STEP : index + 1].astype(np.int64)
        start = int(self._edges[step] + lengths[:rest].sum())
        end = start + int(lengths[rest])
        first = start // 8
        bits = np.unpackbits(self._trained[first : -(-end // 8)])[start - 8 * first : end - 8 * first]
        document = Document(self._tokens[start:end].astype(np.uint32), bits.view(np.bool_))
        spans = self.spans[slice(*np.searchsorted(self._span_starts, [start, end]))] if len(self.spans) else NO_SPANS
        return document._replace(weights=dense(spans, start, end)) if len(spans) else document


class Shards:
    """The documents of several data files, one shard each, numbered in the order of the files. Opened, not loaded."""

    def __init__(self, directories: Sequence[Path], sources: Sequence[Path], shares: Sequence[Share] = ()) -> None:
        """`shares` are the weighted sources that the files belong to, in order; () where none has a weight."""
        self.directories, self.sources, self.shares = list(directories), list(sources), list(shares)
        self._shards = [_Shard(directory) for directory in self.directories]
        self._starts = np.cumsum([0, *(len(shard.lengths) for shard in self._shards)])
        self.ledger = sum((shard.ledger for shard in self._shards), Ledger()).check()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files for itself."""
        return Shards, (self.directories, self.sources, self.shares)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def starts(self) -> NDArray[np.int64]:
        """(files + 1,) the first document of each file; the last entry is the number of documents."""
        return self._starts

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """(documents,) tokens of each document; sum them in int64."""
        return _joined([shard.lengths for shard in self._shards])

    @cached_property
    def num_loss_tokens(self) -> NDArray[np.int32]:
        """(documents,) labels of each document: trained tokens that have a predecessor in it. At least 1."""
        return _joined([shard.num_loss_tokens for shard in self._shards])

    @cached_property
    def loss_weight(self) -> NDArray[np.float64] | None:
        """(documents,) what the labels of each document weigh in the loss together; None where every label weighs 1."""
        if not any(len(shard.spans) for shard in self._shards):
            return None
        return np.concatenate([shard.loss_weight for shard in self._shards])

    @property
    def fingerprint(self) -> str:
        """sha256: the same wherever the same documents stand in the same order, however they came to be."""
        contents: list[Any] = [shard.content for shard in self._shards]
        contents += [[share.weight, share.num_files] for share in self.shares]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def document(self, index: int) -> Document:
        """Document number `index`."""
        shard, place = self._locate(index)
        return self._shards[shard].document(place)

    def source(self, index: int) -> str:
        """The `file:line` of the row that document number `index` came from."""
        shard, place = self._locate(index)
        return f"{self.sources[shard]}:{self._shards[shard].lines[place]}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])


def _joined(counts: Sequence[NDArray[np.uint32]]) -> NDArray[np.int32]:
    """One after the other; a single one stays on the disk. No document has 2**31 tokens: `documents.UNCUT`."""
    if len(counts) == 1:
        return counts[0].view(np.int32)
    return np.concatenate([np.empty(0, np.uint32), *counts]).view(np.int32)


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    """A file as an array; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
