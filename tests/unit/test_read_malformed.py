"""Malformed files: each kind stops with one line that says which file, what came and what to do, or costs its row."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest

from tuner.dataset import read
from tuner.dataset.documents import BadRow
from tuner.dataset.read import read_chunks
from tuner.dataset.reading import arrow, json_values, rows
from tuner.dataset.reading.strict_json import MAX_DEPTH, parse_row
from tuner.dataset.sources import expand
from tuner.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GOOD = b'{"text": "x"}\n'
MANY = b"".join(b'{"text": "row %d"}\n' % number for number in range(20_000))


def zstd(content: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


def parquet(columns: dict, **names) -> bytes:
    buffer = pa.BufferOutputStream()
    table = pa.table(columns) if not names else pa.Table.from_arrays(list(columns.values()), **names)
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


def arrow_file(columns: dict) -> bytes:
    buffer = pa.BufferOutputStream()
    table = pa.table(columns)
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue().to_pybytes()


def damaged(content: bytes) -> bytes:
    """A byte in the middle turned over."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


TABLE = {"text": [f"row {number}" for number in range(2000)]}
FILES = {
    # of every kind
    "empty": ("a.jsonl", b"", r"a.jsonl is empty. Expected: at least one row"),
    "blank lines alone": ("a.jsonl", b"\n  \n\r\n", "a.jsonl holds no rows. Expected: at least one"),
    "a byte order mark alone": ("a.jsonl", b"\xef\xbb\xbf", "holds no rows"),
    "ending not known": ("a.xlsx", GOOD, "the ending '.xlsx' is not known. Known: .jsonl"),
    "an archive": ("a.zip", GOOD, "a.zip is an archive. Unpack it and name what is in it"),
    "a compressed archive": ("a.tar.gz", GOOD, 'or its directory with data_format = "repository"'),
    "no ending": ("a", GOOD, "the ending '' is not known"),
    "compressed, no ending before": ("a.gz", gzip.compress(GOOD, mtime=0), "the ending '' is not known"),
    "utf-16": ("a.jsonl", "{}\n".encode("utf-16"), "a.jsonl is UTF-16 or UTF-32. Save it as UTF-8"),
    "utf-16 without a mark": ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "is UTF-16 or UTF-32. Save it as UTF-8"),
    "utf-16 of the other end first": ("a.json", '[{"a": 1}]\n'.encode("utf-16-be"), "is UTF-16 or UTF-32"),
    "gzip by another name": ("a.jsonl", gzip.compress(GOOD, mtime=0), "is compressed with gzip. Add .gz to its name"),
    "bzip2 by another name": ("a.csv", bz2.compress(GOOD), "is compressed with bzip2. Add .bz2"),
    "xz by another name": ("a.json", lzma.compress(GOOD), "is compressed with xz. Add .xz"),
    "zstd by another name": ("a.jsonl", zstd(GOOD), "is compressed with zstd. Add .zst"),
    "compressed twice": (
        "a.jsonl.gz",
        gzip.compress(gzip.compress(GOOD, mtime=0), mtime=0),
        "is compressed with gzip",
    ),
    "parquet by another name": ("a.csv", parquet(TABLE), "is a Parquet file. Name it .parquet"),
    "arrow by another name": ("a.jsonl", arrow_file(TABLE), "is an Arrow file. Name it .arrow"),
    "a zip archive": ("a.json", b"PK\x03\x04" + bytes(100), "is a zip archive or an Excel sheet. Unpack it"),
    "an sqlite database": ("a.jsonl", b"SQLite format 3\x00" + bytes(100), "is an SQLite database. Export"),
    "a numpy array": ("a.jsonl", b"\x93NUMPY\x01\x00", "is a numpy array. Write its rows"),
    "a git lfs pointer": (
        "a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"
    ),
    "a web page": ("a.jsonl", b"\n<!DOCTYPE html>\n<html>404</html>", "is a web page, so the download failed"),
    "a web page without doctype": ("a.json", b"\xef\xbb\xbf<HTML><body>", "is a web page"),
    # compression
    "gzip cut off": (
        "a.jsonl.gz",
        gzip.compress(MANY, mtime=0)[:-30],
        "is not a whole gzip file .*Copy or compress it again",
    ),
    "gzip cut off in its check": ("a.jsonl.gz", gzip.compress(MANY, mtime=0)[:-4], "is not a whole gzip file"),
    "gzip corrupt": ("a.jsonl.gz", damaged(gzip.compress(MANY, mtime=0)), "is not a whole gzip file"),
    "gzip with text behind it": ("a.jsonl.gz", gzip.compress(GOOD, mtime=0) + GOOD, "is not a whole gzip file"),
    "gzip that is none": ("a.jsonl.gz", GOOD, "is not a whole gzip file"),
    "bzip2 cut off": ("a.jsonl.bz2", bz2.compress(MANY)[:-30], "is not a whole bzip2 file .*end mark"),
    "bzip2 corrupt": ("a.jsonl.bz2", damaged(bz2.compress(MANY)), "is not a whole bzip2 file"),
    "bzip2 with text behind it": ("a.jsonl.bz2", bz2.compress(GOOD) + GOOD, "is not a whole bzip2 file"),
    "bzip2 that is none": ("a.jsonl.bz2", GOOD, "is not a whole bzip2 file"),
    "xz cut off": ("a.jsonl.xz", lzma.compress(MANY)[:-30], "is not a whole xz file"),
    "xz corrupt": ("a.jsonl.xz", damaged(lzma.compress(MANY)), "is not a whole xz file"),
    "xz with text behind it": ("a.jsonl.xz", lzma.compress(GOOD) + GOOD, "is not a whole xz file"),
    "zstd cut off": ("a.jsonl.zst", zstd(MANY)[:-3], "is not a whole zstd file"),
    "zstd that is none": ("a.jsonl.zst", GOOD, "is not a whole zstd file"),
    "compressed nothing": ("a.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
    # JSON
    "json cut off in a string": ("a.json", b'[{"a": 1},\n{"a": "x', "a.json:2: not JSON: Unterminated string"),
    "json cut off between rows": ("a.json", b'[{"a": 1},\n', "a.json:2: the array is not closed by ']'"),
    "json with rows behind the array": ("a.json", b'[{"a": 1}]\n{"a": 2}', "a.json:2: text after the end of the array"),
    "json closed twice": ("a.json", b'{"a": 1}]', "']' closes nothing here"),
    "json without a colon": ("a.json", b'[{"a": 1},\n\n{"a" 2}]', "a.json:3: not JSON: Expecting ':'"),
    "json of single quotes": ("a.json", b"[{'a': 1}]", "a.json:1: not JSON: Expecting property name"),
    "json of one endless bracket": ("a.json", b"[" * 5000, "a.json:1: nested too deeply|the array is not closed"),
    "json of no rows": ("a.json", b"[ ]", "holds no rows"),
    # text
    # tables
    "csv header with a column twice": ("a.csv", b"a,b,a\n1,2,3\n", "the header names 'a' twice"),
    "csv header with a nameless column": ("a.csv", b"a,,b\n1,2,3\n", "has a column without a name"),
    "csv with semicolons": ("a.csv", b"question;answer\n1;2\n", "looks separated by semicolons. Expected: commas"),
    "csv with tabs": ("a.csv", b"question\tanswer\n1\t2\n", "looks separated by tabs. Expected: commas"),
    "tsv with commas": ("a.tsv", b"question,answer\n1,2\n", "looks separated by commas. Expected: tabs"),
    "csv with a header alone": ("a.csv", b"a,b\n", "holds no rows"),
    "csv with a quote never closed": ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n', "a.csv:3: a quote that opens here is never"),
    "csv header not utf-8": ("a.csv", b"caf\xe9,b\n1,2\n", "is not UTF-8"),
    "csv ended by carriage returns": ("a.csv", b"a,b\r1,2\r", "a.csv:1: the header ends with a bare carriage return"),
    "csv header broken": ("a.csv", b'"a"x,b\n1,2\n', "the header is no row of a table"),
    # Arrow
    "parquet cut off": ("a.parquet", parquet(TABLE)[:-20], "is not a whole Parquet file .*Copy or write it again"),
    "parquet without its beginning": ("a.parquet", parquet(TABLE)[200:], "is not a whole Parquet file"),
    "parquet that is none": ("a.parquet", GOOD, "is not a whole Parquet file"),
    "parquet with a column twice": (
        "a.parquet", parquet({"x": pa.array(["1"]), "y": pa.array(["2"])}, names=["a", "a"]), "'a' names two columns"
    ),
    "parquet without rows": ("a.parquet", parquet({"text": pa.array([], pa.string())}), "holds no rows"),
    "parquet within gzip": ("a.parquet.gz", gzip.compress(parquet(TABLE), mtime=0), "not read with .gz around them"),
    "arrow cut off": ("a.arrow", arrow_file(TABLE)[:-40], "is not a whole Arrow file"),
    "arrow that is none": ("a.arrow", GOOD, "is not a whole Arrow file"),
    # pairs of token files
    "bin without its meta": ("a.bin", b'{"tokens": [1]}\n', "has no a.bin.meta beside it"),
}  # fmt: skip


def read_all(path: Path) -> list[read.Row]:
    return [row for file in expand(str(path)) for chunk in read_chunks(file) for row in chunk.rows]


@pytest.mark.parametrize("kind", FILES)
def test_a_malformed_file_is_refused_in_one_line_that_names_it(tmp_path, kind):
    name, content, message = FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_all(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_are_at_least_thirty_kinds_of_malformed_files():
    assert len(FILES) >= 60


METAS = {
    "no array": (b"not numpy", "is no whole numpy array"),
    "of another shape": (np.zeros(4, np.int64), r"holds int64 of shape \(4,\). Expected: integers of shape"),
    "of floats": (np.zeros((2, 2)), "holds float64 of shape"),
    "pickled": (np.array([[{}, 1]], object), "is no whole numpy array"),
    "with too few documents": (np.array([[0, 3]]), "names 1 documents, and more lines follow"),
    "with too many documents": (np.array([[0, 3], [22, 2], [39, 1]]), "names 3 documents, and there are 2 lines"),
    "with another beginning": (np.array([[0, 3], [21, 2]]), "document 2 begins at byte 22, not at 21"),
}
PAIR = b'{"tokens": [1, 2, 3]}\n{"tokens": [4, 5]}\n'


@pytest.mark.parametrize("kind", METAS)
def test_a_meta_file_that_does_not_fit_its_tokens_is_refused(tmp_path, kind):
    meta, message = METAS[kind]
    (tmp_path / "a.bin").write_bytes(PAIR)
    with open(tmp_path / "a.bin.meta", "wb") as file:
        file.write(meta) if isinstance(meta, bytes) else np.save(file, meta)
    with pytest.raises(UserError, match=message) as caught:
        read_all(tmp_path / "a.bin")
    assert "\n" not in str(caught.value)


def test_a_wrong_count_in_a_meta_file_costs_its_row_alone(tmp_path):
    (tmp_path / "a.bin").write_bytes(PAIR)
    with open(tmp_path / "a.bin.meta", "wb") as file:
        np.save(file, np.array([[0, 7], [22, 2]]))
    first, second = read_all(tmp_path / "a.bin")
    assert first.fault == "3 tokens, but the .bin.meta file says 7. Write the pair again."
    assert second.fault == ""


DEEP = b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}"
ROWS = {  # a row in a .jsonl file between two good ones, and the reason it is left out
    "invalid utf-8": (b'{"text": "\xff"}', r"not UTF-8 \(the bytes ff 22 7d 0a at column 11\)"),
    "a surrogate as utf-8": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "half of a surrogate pair": (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    "half of a pair as a key": (b'{"text": "x", "\\uDE00": 1}', "half of a surrogate pair"),
    "a NUL byte in a string": (b'{"text": "a\0b"}', "a NUL byte at column 12"),
    "NUL bytes": (b"\0" * 64, "a NUL byte at column 1, as in a file that was not written to its end"),
    "a tab in a string": (b'{"text": "a\tb"}', r"a raw control character \(\\x09\) at column 12. Write it as .u0009"),
    "an escape in a string": (b'{"text": "a\x1b[0m"}', r"a raw control character \(\\x1b\)"),
    "a key twice": (b'{"text": "a", "text": "b"}', "the key 'text' twice in one object, so a value would be lost"),
    "a key twice, deep": (b'{"a": [{"b": {"c": 1, "c": 1}}]}', "the key 'c' twice"),
    "NaN": (b'{"text": NaN}', "NaN, which is no JSON. Write null"),
    "Infinity": (b'{"text": -Infinity}', "-Infinity, which is no JSON"),
    "a number too large": (b'{"text": 1e999}', "the number 1e999, which is too large"),
    "a number of many digits": (b'{"text": ' + b"1" * 5000 + b"}", "a number that is too long"),
    "deep nesting": (DEEP, f"nested more than {MAX_DEPTH} levels deep"),
    "an array": (b'[{"text": "x"}]', "a list. Expected: one JSON object"),
    "a string": (b'"text"', "a str. Expected"),
    "a number": (b"17", "a int. Expected"),
    "null": (b"null", "a NoneType. Expected"),
    "true": (b"true", "a bool. Expected"),
    "words": (b"plain words", "not JSON: Expecting value at column 1. Expected: one JSON object a row"),
    "cut off": (b'{"text": "x', "the line ends within a string at column 12; it is cut off"),
    "two on a line": (b'{"text": "x"} {"text": "y"}', "Extra data at column 15"),
    "ended by carriage returns": (
        b'{"text": "x"}\r{"text": "y"}',
        "several rows on one line, ended by bare carriage returns",
    ),
    "of single quotes": (b"{'text': 'x'}", "a single quote at column 2, as Python prints a dict"),
    "with a comma too many": (b'{"text": "x",}', "not JSON"),
    "with a comment": (b'{"text": "x"} // fine', "Extra data"),
    "a byte order mark twice": (b'\xef\xbb\xbf\xef\xbb\xbf{"text": "x"}', "not JSON"),
}


def faults(found: list[read.Row]) -> list[BadRow]:
    bad = []
    for row in found:
        try:
            if row.fault:
                raise UserError(row.fault)
            parse_row(row.content)
        except UserError as error:
            bad.append(BadRow(row, str(error)))
    return bad


@pytest.mark.parametrize("kind", ROWS)
def test_a_malformed_row_costs_itself_alone(tmp_path, kind):
    content, message = ROWS[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + content + b"\n" + GOOD)
    found = read_all(path)
    assert [row.line for row in found] == [1, 2, 3]
    (bad,) = faults(found)
    assert bad.row.line == 2
    assert re.match(f"(not JSON: )?{message}", bad.reason), bad.reason


NO_VALUES = {  # where the next value of an array begins cannot be known behind these
    "NUL bytes", "words", "cut off",
    "a NUL byte in a string", "a tab in a string", "an escape in a string", "invalid utf-8", "a surrogate as utf-8",
    "ended by carriage returns", "of single quotes", "with a comma too many", "two on a line", "with a comment",
    "a byte order mark twice",
}  # fmt: skip


@pytest.mark.parametrize("block", [7, 1 << 18])
@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind not in NO_VALUES])
def test_a_malformed_value_of_an_array_costs_itself_alone(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(json_values, "BLOCK_CHARACTERS", block)
    content, message = ROWS[kind]
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + GOOD + b"," + content + b",\n" + GOOD + b"]")
    found = read_all(path)
    assert [row.line for row in found] == [1, 2, 3]
    (bad,) = faults(found)
    assert bad.row.line == 2
    assert re.match(f"(not JSON: )?{message}", bad.reason), bad.reason


CELLS = {
    "too many cells": (b"1,2,3", "3 cells, but the header has 2. Quote cells that hold the separator"),
    "too few cells": (b"1", "1 cells, but the header has 2"),
    "text behind a quote": (b'"a"b,2', "no row of a table .*each quote inside doubled"),
    "invalid utf-8": (b"caf\xe9,2", r"not UTF-8 \(found the bytes e9\)"),
    "a NUL byte": (b"a\0b,2", "a NUL byte"),
    "a bare carriage return": (b"a\rb,2", "a bare carriage return"),
}


@pytest.mark.parametrize("kind", CELLS)
def test_a_malformed_line_of_a_table_costs_itself_alone(tmp_path, kind):
    content, message = CELLS[kind]
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1,2\n" + content + b"\n3,4\n")
    found = read_all(path)
    assert [row.line for row in found] == [2, 3, 4]
    (bad,) = faults(found)
    assert bad.row.line == 3
    json.loads(bad.row.content)
    assert re.match(f"(not JSON: )?{message}", bad.reason), bad.reason


def test_a_row_too_large_to_hold_is_passed_over_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"x" * 5000 + b'"}\n' + GOOD)
    first, large, last = read_all(path)
    assert (first.fault, last.fault, last.line) == ("", "", 3)
    assert large.fault.startswith("5,013 bytes or more, over")
    assert len(large.content) <= rows.QUARANTINED_BYTES


@pytest.mark.parametrize("quote", [b"", b'"'])
@pytest.mark.parametrize("ending", [".json", ".csv", ".tsv", ".jsonl", ".parquet", ".arrow"])
def test_a_row_too_large_to_hold_costs_itself_alone(tmp_path, monkeypatch, ending, quote):
    """Strings that hold quotes, brackets and escapes, so that its end is not found where it is not."""
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_values, "BLOCK_CHARACTERS", 700)
    monkeypatch.setattr(arrow, "LARGE_BYTES", 4000)
    monkeypatch.setattr(rows, "QUARANTINED_BYTES", 100)
    large = ('x"]}\\[{\\' if quote else "x") * 1500 + "é"
    texts = [{"text": "one", "n": 1}, {"text": large, "n": 2}, {"text": "two", "n": 3}]
    path = tmp_path / f"a{ending}"
    if ending in (".json", ".jsonl"):
        path.write_text(json.dumps(texts, indent=1) if ending == ".json" else "\n".join(map(json.dumps, texts)))
    elif ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "n"], delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(texts)
    else:
        table = {"text": [row["text"] for row in texts], "n": [1, 2, 3]}
        path.write_bytes(parquet(table) if ending == ".parquet" else arrow_file(table))
    first, bad, last = read_all(path)
    assert [json.loads(row.content)["text"] for row in (first, last)] == ["one", "two"]
    assert (first.fault, last.fault) == ("", "")
    assert re.match(r"[\d,]+ bytes or more, over 0 MiB. Cut it into several rows", bad.fault)
    assert len(bad.content) < 70_000
    assert bad.line == {".json": 6, ".csv": 3, ".tsv": 3}.get(ending, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x" * 5000, "one document of over 0 MiB. Cut it into files"),
        ("a.txt", b"caf\xe9", r"not UTF-8 \(found the bytes e9\)"),
        ("a.txt", b"one\ntwo\0", r"a NUL byte in line 2, so this is no text"),
        ("a.json", b'[{"text": "\xff"}]', ""),
    ],
)
def test_a_file_of_one_bad_row_has_that_row(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    (tmp_path / name).write_bytes(content)
    [row] = read_all(tmp_path / name)
    assert re.match(message, row.fault)
    if not message:
        assert row.content == b'{"text": "\xff"}'
        with pytest.raises(UserError, match=r"not UTF-8 \(the bytes ff 22 7d at column 11\)"):
            parse_row(row.content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "' + b"x" * 50_000 + b"}]", "a.json:1: a value of over 0 MiB begins here, and the file"),
        ("a.csv", b'a,b\n1,"' + b"x\n" * 5000, "a.csv:2: a cell of over 0 MiB begins here. A quote that opens in it"),
    ],
)
def test_a_value_that_never_ends_stops_the_file(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_values, "BLOCK_CHARACTERS", 700)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_all(tmp_path / name)


def test_a_directory_a_missing_and_a_forbidden_file_are_refused(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"is a directory. Name its files, for example .*\*.jsonl"):
        expand(str(tmp_path))
    with pytest.raises(UserError, match=r"There is no data file .*trian.jsonl. Did you mean train.jsonl"):
        expand(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"There is no directory .* either"):
        expand(str(tmp_path / "none" / "train.jsonl"))
    with pytest.raises(UserError, match=r"cannot be looked at: File name too long. Check the path"):
        expand("x" * 5000)
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"link.jsonl is a link to gone.jsonl, which is not there"):
        expand(str(tmp_path / "link.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe.jsonl is a pipe, a socket or a device. Write what it gives to a file"):
        expand(str(tmp_path / "pipe.jsonl"))
    for name in ("", "https://example.com/a.jsonl"):
        with pytest.raises(UserError, match=f"data_path names '{name}'. Expected: a file or a pattern"):
            expand(name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"may not be read by this user. Change its permissions"):
        expand(str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize("change", ["append", "truncate", "replace", "remove"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",".join([GOOD] * 60_000) + b"]")
    chunks = read_chunks(path)
    next(chunks)
    if change == "append":
        with open(path, "ab") as file:
            file.write(GOOD)
    elif change == "truncate":
        os.truncate(path, 400_000)
    elif change == "replace":
        (tmp_path / "b").write_bytes(path.read_bytes())
        (tmp_path / "b").replace(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"(changed|was removed) while it was being read. Start again"):
        list(chunks)
