"""Damaged files of every kind: a UserError or rows, never another exception, and one bad line costs only itself."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_samples import bytelevel, made_row

from tuner.dataset.documents import EncodedChunk, RowEncoder
from tuner.dataset.formats import FORMATS
from tuner.dataset.ledger import Ledger
from tuner.dataset.read import Row, read_chunks
from tuner.dataset.rendering import Rendering
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.errors import UserError

NUM_QUICK, NUM_SLOW = 25, 600  # damages to each kind of file
ODD = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\r", b"\x1a", b"\x0b", b"\xe2\x80\xa8"),
    *(
        b"\\ud800",
        b"\\u0000",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b"[]",
        b"{}",
        b"[[[[[[",
        b"]}",
        b'"',
        b",",
        b":",
    ),
    *(b"<|im_end|>", b'"role": 7', b'"role": "user", "role": "assistant"', b"9" * 5000, b"[" * 3000, b"\n\n\n"),
]


def rows_of(seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [made_row(rng, tools=rng.random() < 0.5, interpreter=True) for _ in range(4)]


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = pyarrow.BufferOutputStream()
    columns = {"messages": [json.dumps(row["messages"]) for row in rows], "number": list(range(len(rows)))}
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


def as_csv(rows: list[dict]) -> bytes:
    cells = [json.dumps(row["messages"]).replace('"', '""') for row in rows]
    return "".join(["messages\r\n", *(f'"{cell}"\r\n' for cell in cells)]).encode()


def as_array(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


FILES: dict[str, tuple[Callable[[list[dict]], bytes], Callable[[bytes], bytes]]] = {
    "a.jsonl": (as_lines, bytes),
    "a.json": (as_array, bytes),
    "a.txt": (as_lines, bytes),
    "a.csv": (as_csv, bytes),
    "a.parquet": (as_parquet, bytes),
    "a.jsonl.gz": (as_lines, gzip.compress),
    "a.json.bz2": (as_array, bz2.compress),
    "a.jsonl.xz": (as_lines, lzma.compress),
}


def damage(rng: random.Random, content: bytes) -> bytes:
    """One to three of: bytes flipped, cut out, repeated, moved, cut off, or something odd put between."""
    for _ in range(rng.randint(1, 3)):
        one, other = sorted(rng.randint(0, len(content)) for _ in range(2))
        other = min(other, one + rng.choice([1, 10, 200]))
        piece = content[one:other]
        content = rng.choice(
            [
                content[:one] + bytes(byte ^ rng.randint(1, 255) for byte in piece) + content[other:],
                content[:one] + content[other:],
                content[:other] + piece + content[other:],
                piece + content,
                content[:one],
                content[:one] + rng.choice(ODD) + content[one:],
                content[:one] + rng.choice(ODD) + content[other:],
            ]
        )
    return content


@pytest.fixture(scope="module")
def encode() -> RowEncoder:
    samples = SampleEncoder.from_tokenizer(bytelevel("internlm2"), Rendering("internlm2"))
    return RowEncoder(FORMATS["openai"], samples, 500, "split", "skip")


def encoded(path: Path, encode: RowEncoder) -> list[EncodedChunk] | str:
    """What becomes of a file: documents and bad rows, or the message that refuses it."""
    try:
        return [encode(chunk) for chunk in read_chunks(path)]
    except UserError as error:
        return str(error)


def check_damages(name: str, number: int, folder: Path, encode: RowEncoder) -> None:
    path = folder / name
    plain, compress = FILES[name]
    refused = 0
    for seed in range(number):
        rng = random.Random(f"{name} {seed}")
        content = plain(rows_of(seed % 7))
        path.write_bytes(damage(rng, compress(content)) if seed % 2 else compress(damage(rng, content)))
        try:
            found = encoded(path, encode)
        except Exception as error:
            raise AssertionError(f"{name}, damage {seed}: {path.read_bytes()[:2000]!r}") from error
        if isinstance(found, str):
            assert found.startswith(str(path)), (seed, found)
            refused += 1
            continue
        ledger = sum((chunk.ledger for chunk in found), Ledger()).check()
        assert ledger.rows == ledger.read.documents + ledger.skipped
        assert all(bad.reason and "Traceback" not in bad.reason for chunk in found for bad in chunk.bad_rows), seed
    assert refused < number or name == "a.parquet", "some of the damages must leave a file to read"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_rows_or_one_message_that_names_it(name: str, tmp_path: Path, encode: RowEncoder):
    check_damages(name, NUM_QUICK, tmp_path, encode)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_damage_among_many_breaks_a_reader(name: str, tmp_path: Path, encode: RowEncoder):
    check_damages(name, NUM_SLOW, tmp_path, encode)


def lines_with_damage(rng: random.Random) -> tuple[list[bytes], int]:
    lines = as_lines(rows_of(rng.randint(0, 6))).splitlines(keepends=True)
    place = rng.randrange(len(lines))
    body = damage(rng, lines[place][:-1]).replace(b"\n", b" ")
    return [*lines[:place], body + b"\n", *lines[place + 1 :]], place


def check_costs(number: int, folder: Path, encode: RowEncoder) -> None:
    path = folder / "a.jsonl"
    skipped = 0
    for seed in range(number):
        lines, place = lines_with_damage(random.Random(seed))
        path.write_bytes(b"".join(lines))
        found = encoded(path, encode)
        if isinstance(found, str):
            assert place == 0, (seed, found)  # a file may be refused for how it begins, and for that alone
            continue
        (chunk,) = found
        expected = {number for number in range(1, len(lines) + 1) if number != place + 1}
        kept = set(chunk.block.lines.tolist())
        assert expected <= kept <= expected | {place + 1}, seed
        assert {bad.row.line for bad in chunk.bad_rows} <= {place + 1}
        assert all(bad.row == Row(place + 1, bad.row.content, bad.row.fault) for bad in chunk.bad_rows)
        skipped += len(chunk.bad_rows)
    assert skipped > number / 4, "the damages must hurt"


def test_a_damaged_line_costs_no_other(tmp_path: Path, encode: RowEncoder):
    check_costs(NUM_QUICK, tmp_path, encode)


@pytest.mark.slow
def test_none_of_many_damaged_lines_costs_another(tmp_path: Path, encode: RowEncoder):
    check_costs(NUM_SLOW, tmp_path, encode)
