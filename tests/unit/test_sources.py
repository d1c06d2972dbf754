"""What data_path may name: files, patterns, sets of the hub, and sources with weights."""

import json
import sys
from pathlib import Path

import pytest

from tuner.dataset import hub
from tuner.dataset.read import read_chunks
from tuner.dataset.sources import expand, find_sources
from tuner.errors import UserError


@pytest.fixture
def files(tmp_path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    return tmp_path


def test_an_entry_may_be_a_pattern_or_several_paths_with_one_weight(files):
    path = [
        {"path": f"{files}/[bc].jsonl", "weight": 2},
        {"path": [f"{files}/a.jsonl"], "weight": 0.5},
    ]
    first, second = find_sources(path)
    assert (first.weight, [file.name for file in first.files]) == (2.0, ["b.jsonl", "c.jsonl"])
    assert (second.weight, [file.name for file in second.files]) == (0.5, ["a.jsonl"])
    assert expand(path) == first.files + second.files
    assert [source.weight for source in find_sources([f"{files}/a.jsonl", f"{files}/b.jsonl"])] == [None, None]


def test_an_entry_may_have_a_format_of_its_own_with_or_without_a_weight(files):
    path = [
        {"path": f"{files}/a.jsonl", "data_format": "alpaca"},
        {"path": f"{files}/b.jsonl", "data_format": str},
        f"{files}/c.jsonl",
    ]
    assert [source.data_format for source in find_sources(path)] == ["alpaca", str, None]
    assert [source.weight for source in find_sources(path)] == [None] * 3
    both = {"path": f"{files}/a.jsonl", "data_format": "alpaca", "weight": 2}
    assert find_sources(both)[0][:2] == (f"{files}/a.jsonl", 2.0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "is an empty list"),
        ([17], r"data_path holds 17. Expected: a path, or dict\(path=...\) with weight=..., data_format=... or both"),
        ([{"path": "{a}"}], r"has an entry with .'path'.. Expected: dict\(path=...\) with weight=..., data_format="),
        ([{"weight": 1}], r"has an entry with .'weight'.. Expected: dict\(path=...\)"),
        ([{"path": "{a}", "wieght": 1}], "or both. Did you mean weight"),
        ([{"path": "{a}", "dataformat": "qa"}], "or both. Did you mean data_format"),
        ([{"path": "{a}", "weight": None}], "the weight None. Expected: a number above 0"),
        ([{"path": "{a}", "weight": 1, "name": "x"}], r"Expected: dict\(path=...\)"),
        ([{"path": "{a}", "weight": 0}], "the weight 0. Expected: a number above 0; leave out what weighs nothing"),
        ([{"path": "{a}", "weight": -1}], "the weight -1"),
        ([{"path": "{a}", "weight": "2"}], "the weight '2'"),
        ([{"path": "{a}", "weight": True}], "the weight True"),
        ([{"path": "{a}", "weight": float("nan")}], "the weight nan"),
        ([{"path": "{a}", "weight": float("inf")}], "the weight inf"),
        ([{"path": [], "weight": 1}], r"path=\[\]. Expected: a path or a list of paths"),
        ([{"path": "{a}", "weight": 1}, "{b}"], "a weight to some sources and none to .*b.jsonl. Give all of them"),
        ([{"path": "{a}", "weight": 1}, {"path": "{a}", "weight": 2}], "names these files more than once"),
    ],
)
def test_entries_that_are_not_clear_are_refused(files, entries, message):
    text = json.dumps(entries).replace("{a}", f"{files}/a.jsonl").replace("{b}", f"{files}/b.jsonl")
    with pytest.raises(UserError, match=message):
        find_sources(json.loads(text))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:owner/name:test", ("owner/name", None, "test")),
        ("hub:owner/name:en:test[:100]", None),
        ("hub:owner/name:en:validation", ("owner/name", "en", "validation")),
        ("hub:", None),
        ("hub:owner/name:", None),
    ],
)
def test_the_parts_of_a_hub_name(text, parts):
    if parts is None:
        with pytest.raises(UserError, match=r"is no name of a dataset. Expected: hub:OWNER/NAME"):
            hub.parse(text)
    else:
        assert hub.parse(text) == parts


def test_a_set_of_the_hub_is_fetched_once_and_kept_as_rows(tmp_path, tuner_cache, monkeypatch):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}]} for n in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (file,) = expand(f"hub:{folder}")
    assert [json.loads(row.content) for chunk in read_chunks(file) for row in chunk.rows] == rows
    monkeypatch.setattr(hub, "_load", None)
    assert expand(f"hub:{folder}") == [file]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)\nmore"), "Couldn't reach"),
        (ValueError("Unknown split \"trian\". Should be one of ['train']."), "Should be one of"),
        (FileNotFoundError(), "no reason given"),
    ],
)
def test_what_cannot_be_fetched_is_said_in_one_line_and_leaves_nothing(tuner_cache, monkeypatch, error, words):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hub:owner/name:trian could not be fetched .*Check the name") as caught:
        expand("hub:owner/name:trian")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tuner_cache / "hub").iterdir() if path.is_dir()]


def test_without_the_package_the_command_that_installs_it_is_named(tuner_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"need the datasets package: pip install tuner\[data\]"):
        expand("hub:owner/name")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=r"needs pyarrow: pip install tuner\[data\]"):
        list(read_chunks(tmp_path / name))
