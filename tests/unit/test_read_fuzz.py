"""Whatever bytes a file holds, reading it gives rows or one UserError in one line; nothing else is ever raised."""

import bz2
import gzip
import json
import lzma
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.dataset.read import READERS, read_chunks
from tuner.dataset.reading import json_values
from tuner.dataset.reading.strict_json import loads, parse_row
from tuner.errors import UserError

KINDS = [kind for kind in READERS if kind not in (".parquet", ".arrow", ".bin")]
PIECES = st.sampled_from([
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r\n", b"\r", b"\\", b"\0", b"\xef\xbb\xbf", b"\xff", b"\t",
    b";", b'"a"', b'{"text": "x"}', b"1e999", b"NaN", b"\\ud800", b'"\\ud83d\\ude42"', "é中🙂".encode(), b"''",
    b"  ", b"null",
])  # fmt: skip
CONTENT = st.lists(PIECES | st.binary(max_size=4), max_size=40).map(b"".join)
quick = settings(
    max_examples=int(os.environ.get("TUNER_FUZZ", "60")),
    derandomize="TUNER_FUZZ" not in os.environ,  # a broken file may break others' parsers, which is no reason to fail
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_message(message: str, path: str = "") -> None:
    """One line that names the file, where there is one to name."""
    assert message
    assert path in message
    assert "\n" not in message


def read_as_far_as_it_goes(path) -> None:
    """Read the rows that can be read; every complaint is checked."""
    try:
        for chunk in read_chunks(path):
            for row in chunk.rows:
                assert row.line >= 1
                check_row(row)
    except UserError as error:
        check_message(str(error), str(path))


def check_row(row) -> None:
    """Parse a row that the reader found nothing wrong with."""
    if row.fault:
        check_message(row.fault)
        return
    try:
        parse_row(row.content)
    except UserError as error:
        check_message(str(error))


@quick
@given(kind=st.sampled_from(KINDS), content=CONTENT, block=st.sampled_from([1, 5, 1 << 18]))
def test_any_bytes_give_rows_or_one_clear_error(tmp_path, kind, content, block):
    path = tmp_path / f"a{kind}"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "BLOCK_CHARACTERS", block)
        read_as_far_as_it_goes(path)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
WHOLE = b"".join(b'{"text": "row %d"}\n' % number for number in range(200))


@quick
@given(ending=st.sampled_from(sorted(COMPRESS)), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_compressed_file_with_one_byte_changed_is_noticed_or_gives_the_same(tmp_path, ending, place, flip):
    packed = bytearray(COMPRESS[ending](WHOLE))
    packed[int(place * len(packed))] ^= flip
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed)
    try:
        found = b"".join(row.content for chunk in read_chunks(path) for row in chunk.rows)
    except UserError:
        return
    assert found == WHOLE, "a damaged file must not be read as another"


@quick
@given(ending=st.sampled_from(sorted(COMPRESS)), place=st.floats(0, 1, exclude_max=True))
def test_a_compressed_file_cut_off_anywhere_is_noticed(tmp_path, ending, place):
    packed = COMPRESS[ending](WHOLE)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: max(1, int(place * len(packed)))])
    with pytest.raises(UserError):
        list(read_chunks(path))


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
@quick
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3), cut=st.floats(0, 1)
)
def test_a_damaged_arrow_file_raises_nothing_but_a_clear_error(tmp_path, kind, places, cut):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [f"row {number}" for number in range(50)], "n": list(range(50))})
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    content = bytearray(path.read_bytes())
    for place, flip in places:
        content[int(place * len(content))] ^= flip
    path.write_bytes(content[: max(1, int(cut * len(content)))])
    read_as_far_as_it_goes(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@quick
@given(JSON_VALUES, st.booleans())
def test_what_plain_json_reads_without_loss_is_read_alike(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert loads(text) == value


@quick
@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=3), min_size=1, max_size=8), st.booleans())
def test_rows_come_out_of_every_json_file_as_they_went_in(tmp_path, rows, indented):
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    array.write_text(json.dumps(rows, indent=2 if indented else None, ensure_ascii=False), encoding="utf-8")
    for path in (lines, array):
        assert [parse_row(row.content) for chunk in read_chunks(path) for row in chunk.rows] == rows
