"""Rows out of files: each with the line it begins on, whatever the ending, and no file is misread in silence."""

import gzip
import json
from pathlib import Path

import pytest

from tuner.dataset import read
from tuner.dataset.read import read_chunks
from tuner.dataset.reading import json_values
from tuner.dataset.reading.strict_json import parse_row
from tuner.errors import UserError


def rows(path: Path) -> list[tuple[int, bytes]]:
    return [(row.line, row.content.strip()) for chunk in read_chunks(path) for row in chunk.rows]


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_are_counted_through_blank_ones_and_windows_line_ends(tmp_path):
    assert rows(write(tmp_path, "a.jsonl", '\ufeff{"a": 1}\r\n\r\n  \n{"a": 2}')) == [
        (1, b'{"a": 1}'),
        (4, b'{"a": 2}'),
    ]


VALUES = [{"text": "a,]}\n" * n, "more": [{"ä中🙂": None}] * (n % 3)} for n in range(40)]


@pytest.mark.parametrize("block", [1, 2, 3, 17, 1000, 1 << 18])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(json_values, "BLOCK_CHARACTERS", block)
    text = json.dumps(VALUES[:12], ensure_ascii=False, indent=indent)
    found = rows(write(tmp_path, "a.json", text))
    assert [json.loads(content) for _, content in found] == VALUES[:12]
    starts = [number for number, line in enumerate(text.split("\n"), 1) if line.startswith(" {")]
    assert [line for line, _ in found] == (starts if indent else [1] * 12)


@pytest.mark.parametrize("join", ["\n", " ", "\n\n"])
def test_a_json_file_may_hold_objects_one_after_another(tmp_path, join):
    text = join.join(json.dumps(value, indent=2) for value in VALUES)
    assert [json.loads(content) for _, content in rows(write(tmp_path, "a.json", text))] == VALUES


def test_a_text_file_is_one_row(tmp_path):
    ((line, content),) = rows(write(tmp_path, "a.txt", "你好\n\nBye\n"))
    assert (line, parse_row(content)) == (1, {"text": "你好\n\nBye\n"})


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".txt"])
def test_compressed_files_give_the_same_rows(tmp_path, ending):
    content = b'{"text": "x"}\n{"text": "y"}\n' * 500
    plain = write(tmp_path, f"a{ending}", content)
    packed = write(tmp_path, f"b{ending}.gz", gzip.compress(content))
    assert rows(plain) == rows(packed)


def test_chunks_are_small_and_their_positions_end_at_the_size_of_the_file(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"text": "' + b"x" * 1000 + b'"}\n' + b'{"text": "y"}\n' * 100_000)
    chunks = list(read_chunks(path))
    assert sum(len(chunk.rows) for chunk in chunks) == 100_001
    assert max(sum(len(row.content) for row in chunk.rows) for chunk in chunks) < 2 * read.CHUNK_BYTES
    positions = [chunk.position for chunk in chunks]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1}, {"a" 2}]', "a.json:1: not JSON: Expecting ':'"),
        ("a.json", '[{"a": 1},\n\n{"a": tru}]', "a.json:3: not JSON"),
        ("a.json", '[{"a": 1},\n{"a": "x', "a.json:2: not JSON: Unterminated string"),
        ("a.json", '[{"a": 1}', r"a.json:1: the array is not closed"),
        ("a.json", '[{"a": 1}]\n[2]', "a.json:2: text after the end of the array"),
        ("a.json", '{"a": 1}]', "closes nothing"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '[{"a": "é'.encode()[:-1], "a.json:1: not JSON: Unterminated string"),
        ("a.jsonl", "\ufeff{}".encode("utf-16"), "is UTF-16"),
        ("a.xml", "a,b", r"ending '.xml' is not known. Known: .jsonl"),
        ("a", "{}", "ending '' is not known"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 10_000, mtime=0)[:-20], "not a whole gzip file"),
        ("a.jsonl.gz", b"{}", "not a whole gzip file"),
    ],
)
def test_files_that_are_not_what_their_ending_says_are_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        rows(write(tmp_path, name, content))


def test_a_mistake_early_in_a_large_array_is_found_without_reading_it_all(tmp_path, monkeypatch):
    path = write(tmp_path, "a.json", '[{"a" 1},' + '{"a": 1},' * 400_000)
    grow, blocks = json_values._Window._grow, []
    monkeypatch.setattr(json_values._Window, "_grow", lambda window, size: blocks.append(size) or grow(window, size))
    with pytest.raises(UserError, match="not JSON"):
        rows(path)
    assert len(blocks) <= 2 < path.stat().st_size // json_values.BLOCK_CHARACTERS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
        (b"plain words", "Expected: one JSON object a row"),
        (b"{\n", "Expecting property name .* where the line ends. .* A file of longer values is named .json"),
        (b"\xef\xbb\xbf{}", "a byte order mark at column 1, which is not at the beginning of the text"),
        (b"[1, 2]", "a list. Expected: one JSON object"),
        (b'"text"', "a str. Expected"),
        (b"null", "a NoneType. Expected"),
        (b'{"a": "\xff"}', r"not UTF-8 \(the bytes ff 22 7d at column 8\)"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 100_000, "nested more than 100 levels deep"),
    ],
)
def test_a_row_that_is_no_json_object_is_named_for_what_it_is(content, message):
    with pytest.raises(UserError, match=message):
        parse_row(content)


def test_whole_surrogate_pairs_are_characters():
    assert parse_row(b'{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}


KINDS = {
    "a.jsonl": b"\xef\xbb\xbf" + b'{"text": "x"}\n\n{"text": "yy"}\r\n  \n' * 40,
    "a.jsonl.gz": gzip.compress(b'{"text": "x"}\n\n{"text": "yy"}\n' * 40, mtime=0),
    "a.json": b"[" + b",\n".join([b'{"text": "x"}', b'{"text": "yy"}'] * 40) + b"]",
    "a.csv": b"text,more\n" + b'"x\ny",1\nz,2\n' * 40,
}


@pytest.mark.parametrize("name", KINDS)
def test_reading_on_behind_any_chunk_gives_the_same_chunks_as_reading_from_the_begin(tmp_path, monkeypatch, name):
    monkeypatch.setattr(read, "CHUNK_BYTES", 100)
    path = write(tmp_path, name, KINDS[name])
    chunks = list(read_chunks(path))
    assert len(chunks) > 5
    place = read.BEGIN
    for number, chunk in enumerate(chunks, start=1):
        place = place.behind(chunk)
        assert list(read_chunks(path, place)) == chunks[number:]
    assert place.num_rows == 80
