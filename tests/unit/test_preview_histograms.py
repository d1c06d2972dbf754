"""Histograms count every document once, in bins that can be read."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from preview_runs import words, write_run

from tuner.cli import run
from tuner.preview.histograms import MOST_BINS, bar, bin_edges, of_sources, of_values, png, round_width

VALUES = st.lists(st.integers(1, 300_000), min_size=1, max_size=200)


@given(values=VALUES)
@example(values=[1])
@example(values=[7, 7, 7])
@example(values=[1, 1, 1, 200_000])
@example(values=[1] * 50 + [2] * 50 + [1 << 20])
def test_every_value_is_counted_in_the_one_bin_that_names_it(values: list[int]):
    histogram = of_values("lengths", "documents", np.array(values))
    assert sum(histogram.counts) == len(values)
    for label, count in zip(histogram.labels, histogram.counts):
        low, _, high = label.replace(",", "").partition("-")
        assert count == sum(int(low) <= value <= int(high or low) for value in values)
    assert histogram.counts[-1] > 0
    assert len(histogram.labels) <= 22


def test_bins_are_equal_unless_the_tail_is_long():
    assert bin_edges(np.array([18, 82, 272])) == [0, 50, 100, 150, 200, 250, 300]
    assert bin_edges(np.array([100] * 9 + [1000])) == [64, 128, 256, 512, 1024]
    assert bin_edges(np.array([5])) == [5, 6]
    assert [round_width(width) for width in (0.1, 1, 1.1, 2.5, 21, 100)] == [1, 1, 2, 5, 50, 100]
    assert len(bin_edges(np.arange(1, 500))) <= MOST_BINS + 2


def test_a_bar_is_as_long_as_its_share_and_never_vanishes():
    assert bar(1.0) == "█" * 40
    assert bar(0.5) == "█" * 20
    assert bar(1 / 320) == "▏"
    assert bar(1e-9) == "▏"
    assert bar(0.0) == ""
    assert bar(0.26) == "█" * 10 + "▍"


def test_the_largest_sources_are_named_and_the_others_are_one_bar():
    names = [f"part-{place}.jsonl" for place in range(30)]
    histogram = of_sources(names, list(range(30)))
    assert histogram.labels[:2] == ["part-29.jsonl", "part-28.jsonl"]
    assert histogram.labels[-1] == "10 others"
    assert sum(histogram.counts) == sum(range(30))
    assert histogram.counts[-1] == sum(range(10))


def test_the_last_bin_ends_at_the_greatest_value():
    """With max_length = 300 a bar that says 300-319 would be wrong."""
    assert of_values("lengths", "documents", np.array([106, 291, 299])).labels[-1] == "280-299"
    assert of_values("lengths", "documents", np.array([106, 291, 300])).labels[-1] == "300"
    assert of_values("lengths", "documents", np.array([106, 291, 305])).labels[-1] == "300-305"


def test_a_long_name_leaves_room_for_its_bar():
    [label, short] = of_sources(["/data/" + "folder/" * 20 + "train.jsonl", "b.jsonl"], [2, 1]).labels
    assert label.startswith("...")
    assert label.endswith("folder/train.jsonl")
    assert len(label) == 48
    assert short == "b.jsonl"


def test_a_picture_grows_with_its_bars_and_stands_any_name():
    small = png(of_sources(["a"], [1]))
    large = png(of_sources(["$x^$ 数据 \u202e", *"bcdefghij"], list(range(1, 11))))
    heights = [struct.unpack(">II", picture[16:24])[1] for picture in (small, large)]
    assert heights[1] > heights[0]


def test_files_are_written_once_and_agree_with_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture):
    settings, target = write_run(tmp_path), tmp_path / "pictures"
    assert run(words(settings, "--histograms", str(target))) == 0
    text = capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    assert sorted(files) == ["lengths.png", "sources.png", "trained.png"]
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in files.values())
    assert run(words(settings, "--histograms", str(target))) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    ledger = {
        name: int(re.search(rf"{name} +(?:\d+ +)?([\d,]+) ", text)[1].replace(",", "")) for name in ("kept", "trained")
    }
    sums = [int(number.replace(",", "")) for number in re.findall(r"documents by their .*all ([\d,]+)\n", text)]
    assert sums == [ledger["kept"], ledger["trained"]]


def test_weighted_sources_count_what_an_epoch_takes_of_them(tmp_path: Path, capsys: pytest.CaptureFixture):
    settings = write_run(tmp_path)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:12]), encoding="utf-8")
    (tmp_path / "many.jsonl").write_text("\n".join(rows[12:]), encoding="utf-8")
    weighted = [{"path": str(tmp_path / "few.jsonl"), "weight": 3}, {"path": str(tmp_path / "many.jsonl"), "weight": 1}]
    assert run(words({**settings, "data_path": weighted})) == 0
    text = capsys.readouterr().out
    drawn = int(re.search(r"([\d,]+) documents in [\d,]+ packs", text)[1].replace(",", ""))
    counts = re.search(r"documents by their tokens.*?\n\n", text, re.DOTALL)[0].splitlines()[:-1]
    assert sum(int(re.match(r" *[\d,-]+ +([\d,]+)", line)[1]) for line in counts[1:]) == drawn
    few, many = (int(re.search(rf"{name}\.jsonl +([\d,]+) █", text)[1].replace(",", "")) for name in ("few", "many"))
    assert 2 < few / many < 4
    everything = int(re.search(r"= kept +\d+ +([\d,]+) ", text)[1].replace(",", ""))
    assert counts[0].endswith(f"all {few + many:,}")
    assert few + many != everything


def test_tokens_of_two_files_stand_beside_their_names(tmp_path: Path, capsys: pytest.CaptureFixture):
    settings = write_run(tmp_path)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:5]), encoding="utf-8")
    (tmp_path / "many.jsonl").write_text("\n".join(rows[5:]), encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("few.jsonl", "many.jsonl")]
    found = []
    for path in (*paths, paths):
        assert run(words({**settings, "data_path": path})) == 0
        text = capsys.readouterr().out.split("tokens by source")[1]
        found.append(dict(re.findall(r"(\w+\.jsonl) +([\d,]+) █", text)))
    assert found[2] == {**found[0], **found[1]}
    assert list(found[2]) == ["many.jsonl", "few.jsonl"]
