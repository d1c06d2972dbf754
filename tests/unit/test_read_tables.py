"""Tables, Arrow files and compressed files give the rows they hold, each with its line or number."""

import bz2
import csv
import datetime
import decimal
import gzip
import json
import lzma
from pathlib import Path

import pytest

from tuner.dataset.read import read_chunks
from tuner.dataset.reading import arrow
from tuner.dataset.reading.strict_json import parse_row

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MESSAGES = [{"role": "user", "content": 'Hi, "you"\n你好'}, {"role": "assistant", "content": "Hello"}]


def read_all(path: Path) -> list[tuple[int, dict]]:
    found = [row for chunk in read_chunks(path) for row in chunk.rows]
    assert [row.fault for row in found] == [""] * len(found)
    return [(row.line, parse_row(row.content)) for row in found]


def write_csv(path: Path, rows: list[list[str]], **options) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def test_a_row_of_a_csv_file_has_the_line_it_begins_on_also_behind_quoted_line_ends(tmp_path):
    cells = ["plain", "two\nlines, a comma", 'a "quote"', "three\r\nlines\r\n", "", "end"]
    path = write_csv(tmp_path / "a.csv", [["text", "n"], *([cell, str(n)] for n, cell in enumerate(cells))])
    assert read_all(path) == [
        (line, {"text": cell, "n": str(n)}) for n, (line, cell) in enumerate(zip([2, 3, 5, 6, 9, 10], cells))
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path, end):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + end.join([b"", b"a,b", b"", b"1,2", b"", b"", b"3,4"]))
    assert read_all(path) == [(4, {"a": "1", "b": "2"}), (7, {"a": "3", "b": "4"})]


def test_a_tsv_file_is_separated_by_tabs(tmp_path):
    path = write_csv(tmp_path / "a.tsv", [["question", "answer"], ["a, b?", "yes\tno"]], delimiter="\t")
    assert read_all(path) == [(2, {"question": "a, b?", "answer": "yes\tno"})]


def test_cells_of_known_columns_hold_json_and_others_text(tmp_path):
    text = json.dumps(MESSAGES, ensure_ascii=False)
    path = write_csv(tmp_path / "a.csv", [["messages", "note", "chosen"], [text, text, "[1] is right"]])
    assert read_all(path) == [(2, {"messages": MESSAGES, "note": text, "chosen": "[1] is right"})]


def test_broken_json_in_such_a_column_makes_the_row_a_bad_one(tmp_path):
    path = write_csv(tmp_path / "a.csv", [["messages"], ['[{"role": "user", "role": "x"}]'], ["[1,"]])
    first, second = (row.fault for chunk in read_chunks(path) for row in chunk.rows)
    assert first.startswith("column 'messages': the key 'role' twice")
    assert second.startswith("column 'messages': not JSON")


ROWS = [
    {"messages": MESSAGES, "n": number, "score": None if number % 2 else 0.5, "tools": json.dumps([{"name": "f"}])}
    for number in range(3000)
]


def expected(row: dict) -> dict:
    return {key: value for key, value in {**row, "tools": [{"name": "f"}]}.items() if value is not None}


@pytest.mark.parametrize("group", [100, 100_000])
@pytest.mark.parametrize("batch_bytes", [500, 4 << 20])
def test_a_parquet_file_gives_its_rows_by_number(tmp_path, monkeypatch, group, batch_bytes):
    monkeypatch.setattr(arrow, "BATCH_BYTES", batch_bytes)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=group)
    assert read_all(tmp_path / "a.parquet") == [(n, expected(row)) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("new", ["new_file", "new_stream"])
def test_an_arrow_file_and_an_arrow_stream_give_the_same(tmp_path, new):
    table = pa.Table.from_pylist(ROWS[:50])
    with getattr(pa.ipc, new)(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert read_all(tmp_path / "a.arrow") == [(n, expected(row)) for n, row in enumerate(ROWS[:50], 1)]


def test_positions_rise_to_the_size_of_the_file(tmp_path):
    pq.write_table(pa.table({"text": [f"{n}" * 1000 for n in range(5000)]}), tmp_path / "a.parquet")
    positions = [chunk.position for chunk in read_chunks(tmp_path / "a.parquet")]
    assert positions == sorted(positions)
    assert len(set(positions)) > 3
    assert positions[-1] == (tmp_path / "a.parquet").stat().st_size


def test_what_tables_write_for_nothing_is_left_out_at_any_depth(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1, "b": None}}, {"name": "g", "arguments": {"a": None, "b": "x"}}]
    table = pa.table({"calls": [calls], "score": [float("nan")], "none": pa.array([None], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    clean = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    assert read_all(tmp_path / "a.parquet") == [(1, {"calls": clean})]


def test_dates_decimals_and_text_kept_as_bytes_become_text(tmp_path):
    table = pa.table({
        "day": [datetime.date(2024, 2, 29)], "price": [decimal.Decimal("1.50")], "text": [b"\xe4\xbd\xa0"],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == [(1, {"day": "2024-02-29", "price": "1.50", "text": "你"})]


def test_bytes_that_are_no_text_and_broken_strings_cost_their_row_alone(tmp_path):
    raw = pa.array([b"a", b"\xff\xd8", b"c"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    for name, column, reason in (("bytes", raw, "holds bytes that are no UTF-8"), ("string", strings, "not UTF-8")):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        found = [row for chunk in read_chunks(path) for row in chunk.rows]
        assert [row.line for row in found] == [1, 2, 3]
        assert [bool(row.fault) for row in found] == [False, True, False]
        assert reason in found[1].fault


def zstd(content: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_compressed_files_give_the_rows_of_plain_ones(tmp_path, ending, compressed, upper):
    lines = [b"text,n"] if ending == ".csv" else []
    lines += [b'"{""text"": ""x""}",%d' % n if ending == ".csv" else b'{"text": "%d"}' % n for n in range(9000)]
    content = b"\n".join(lines)
    plain = tmp_path / f"plain{ending}"
    plain.write_bytes(content)
    packed = tmp_path / f"packed{(ending + compressed).upper() if upper else ending + compressed}"
    half = len(content) // 2
    packed.write_bytes(COMPRESS[compressed](content[:half]) + COMPRESS[compressed](content[half:]))  # two members
    assert read_all(packed) == read_all(plain)
    *_, last = read_chunks(packed)
    assert last.position == packed.stat().st_size


def test_padding_between_xz_streams_is_no_damage(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"a": 1}\n') + bytes(8) + lzma.compress(b'{"a": 2}\n') + bytes(4))
    assert read_all(path) == [(1, {"a": 1}), (2, {"a": 2})]
