"""What `data_format` names, from a config or the command line to tokens: "auto", a function, a format refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_samples import bytelevel
from small_tokenizer import write_directory

from tuner.check import DATA_PARTS, check
from tuner.cli import run
from tuner.config import add_options, loads, render
from tuner.dataset.build import build_shards
from tuner.dataset.format_choice import choose_format
from tuner.dataset.formats import EXAMPLES, FORMATS
from tuner.dataset.joining import join_files
from tuner.dataset.prepare import Shards
from tuner.engine.assemble import Assembly
from tuner.errors import UserError

PAIR = {"question": "a", "answer": "b"}
OWN = """
def to_sample(row):
    return {"messages": [{"role": "user", "content": row["ask"]}, {"role": "assistant", "content": row["say"]}]}


def from_xtuner(row):
    return {"conversation": [{"system": "S", "input": row["ask"], "output": row["say"]}]}


def to_text(row):
    return {"text": row["say"]}


def nothing(row):
    return None


def empty_text(row):
    return {"text": ""}


def odd_messages(row):
    return {"messages": "hello"}


def wrong_role(row):
    return {"messages": [{"role": "owner", "content": "x"}]}
"""


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shards(path: Path | list[Path], data_format: Any, **changes: Any) -> Shards:
    paths = [str(part) for part in path] if isinstance(path, list) else str(path)
    folder = path[0].parent if isinstance(path, list) else path.parent
    settings = {"chat_template": "internlm2", "max_length": 2000, "cache_dir": folder / "cache"}
    return build_shards(paths, data_format=data_format, tokenizer=bytelevel("internlm2"), **settings | changes)


def texts(made: Shards) -> list[str]:
    tokenizer = bytelevel("internlm2")
    return [tokenizer.decode(made.document(place).ids) for place in range(len(made))]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with functions row -> sample, importable as one beside a config is."""
    name = f"own_rows_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"preference", "tokens"}))
def test_auto_makes_the_tokens_that_the_format_s_name_makes(tmp_path: Path, capsys, name: str):
    path = write(tmp_path / "rows.jsonl", *[EXAMPLES[name]] * 3)
    found = shards(path, "auto")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f'{path}: data_format = "{name}", for the first 3 rows have ')
    named = shards(path, name)
    assert texts(found) == texts(named) != []
    assert [*found.num_loss_tokens] == [*named.num_loss_tokens]


def test_auto_and_the_name_share_their_shards(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", PAIR)
    assert shards(path, "auto").fingerprint == shards(path, "qa").fingerprint


def test_a_later_row_of_another_format_is_a_bad_row(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", *[PAIR] * 100, EXAMPLES["sharegpt"])
    with pytest.raises(UserError, match=r"rows.jsonl:101: bad row: Expected either 'question' or 'prompt' in the row"):
        shards(path, "auto")
    assert shards(path, "auto", on_bad_row="skip").ledger.skipped == 1


def test_bad_rows_do_not_hide_the_format(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{broken\n" + json.dumps(PAIR) + "\n", encoding="utf-8")
    assert len(shards(path, "auto", on_bad_row="skip")) == 1


def test_auto_refuses_what_is_uncertain_and_names_the_file(tmp_path: Path):
    unknown = write(tmp_path / "c.jsonl", {"a": 1})
    with pytest.raises(UserError) as caught:
        shards(unknown, "auto")
    assert str(caught.value).startswith(f'data_format="auto": {unknown}: row 1 is in no known format: it has the keys ')


def mixed_files(folder: Path) -> list[Path]:
    """Files of three formats, one of them twice and not side by side."""
    rows = [PAIR, EXAMPLES["sharegpt"], {"question": "c", "answer": "d"}, EXAMPLES["alpaca"]]
    return [write(folder / f"{number}.jsonl", row) for number, row in enumerate(rows)]


def test_auto_finds_the_format_of_each_file_and_says_it(tmp_path: Path, capsys):
    files = mixed_files(tmp_path)
    made = shards(files, "auto")
    said = capsys.readouterr().out
    names = ["qa", "sharegpt", "qa", "alpaca"]
    assert texts(made) == [text for file, name in zip(files, names) for text in texts(shards(file, name))]
    assert [made.source(number) for number in range(4)] == [f"{file}:1" for file in files]
    assert said.count("data_format = ") == 4
    pattern = shards(tmp_path / "[0-9].jsonl", "auto")
    assert pattern.fingerprint == made.fingerprint
    said = capsys.readouterr().out
    assert f'{files[0]}: data_format = "qa", for the first row has a question' in said
    assert "(so is 1 more)" in said


def test_an_entry_of_data_path_may_say_its_own_format(tmp_path: Path, own: str):
    files = mixed_files(tmp_path)
    other = write(tmp_path / "own.jsonl", {"ask": "a", "say": "b"})
    path: list[Any] = [
        {"path": [str(files[0]), str(files[2])], "weight": 2},
        {"path": str(files[1]), "data_format": "auto", "weight": 1},
        {"path": str(other), "data_format": f"{own}:to_text", "weight": 1},
    ]
    settings = {"chat_template": "internlm2", "max_length": 2000, "tokenizer": bytelevel("internlm2")}
    made = build_shards(path, data_format="qa", cache_dir=tmp_path / "cache", **settings)
    assert [share.weight for share in made.shares] == [2, 1, 1]
    alone = [*texts(shards(files[0], "qa")), *texts(shards(files[2], "qa")), *texts(shards(files[1], "sharegpt"))]
    assert texts(made) == [*alone, "<s>b</s>"]
    keys = [json.loads((folder / "meta.json").read_text())["ingredients"]["data_format"] for folder in made.directories]
    assert keys[:3] == ["qa", "qa", "sharegpt"]
    assert keys[3] not in FORMATS
    again = build_shards(path[0]["path"], data_format="qa", cache_dir=tmp_path / "cache", **settings)
    assert again.directories == made.directories[:2], "the same file in the same format is the same shard"


def test_the_lab_s_files_of_bare_lists_are_read(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", EXAMPLES["ftdp"]["messages"])
    assert texts(shards(path, "auto")) == texts(shards(write(tmp_path / "b.jsonl", EXAMPLES["ftdp"]), "ftdp"))


def test_preference_pairs_are_refused_in_one_line_before_any_work(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", EXAMPLES["preference"])
    said = (
        "data_format='preference': No method trains on preference pairs yet; supervised fine-tuning takes one answer "
    )
    for data_format in ("preference", "auto"):
        with pytest.raises(UserError) as caught:
            shards(path, data_format)
        assert str(caught.value) == said + "a row. Keep the chosen one, as openai messages."


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("to_sample", "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"),
        (
            "from_xtuner",
            "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ),
        ("to_text", "<s>b</s>"),
    ],
)
def test_a_function_of_the_user_s_own_goes_in_the_format_s_place(tmp_path: Path, own: str, function: str, text: str):
    path = write(tmp_path / "rows.jsonl", {"ask": "a", "say": "b"})
    assert texts(shards(path, f"{own}:{function}")) == [text]
    assert texts(shards(path, getattr(sys.modules[own], function))) == [text]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "nothing",
            'Expected the data_format function to return {"messages": [...], "tools"?: [...]} or {"text": ...}, ',
        ),
        ("empty_text", "Expected 'text' of the data_format function to be some text, got ''."),
        ("odd_messages", "Expected 'messages' of the data_format function to be a list, got 'hello'."),
        (
            "wrong_role",
            "Expected the role of message 0 to be one of ('system', 'user', 'assistant', 'tool'), got 'owner'.",
        ),
    ],
)
def test_what_a_function_returns_is_checked_and_the_row_named(tmp_path: Path, own: str, function: str, said: str):
    path = write(tmp_path / "rows.jsonl", {"ask": "a", "say": "b"})
    with pytest.raises(UserError) as caught:
        shards(path, f"{own}:{function}")
    assert str(caught.value).startswith(f"{path}:1: bad row: {said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here:f", "'no_such_module_here' cannot be imported"),
        ("json:lods", "json has no function 'lods'. Did you mean loads"),
        (":f", "'' cannot be imported"),
        ("sharegtp", "Did you mean sharegpt?"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(name: str, said: str):
    with pytest.raises(UserError) as caught:
        choose_format(name, [])
    assert str(caught.value).startswith(f"data_format={name!r}: ")
    assert said in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("place", ["setting", "option", "config"])
def test_a_config_takes_a_function_as_a_setting_an_option_or_an_import(
    tmp_path: Path, own: str, model: Path, place: str
):
    path = write(tmp_path / "rows.jsonl", {"ask": "a", "say": "b"})
    values = {"model_path": str(model), "data_path": str(path), "cache_dir": str(tmp_path / "cache")}
    named = f"{own}:to_sample"
    source = render("internlm2_tiny-sft_full", values | ({"data_format": named} if place == "setting" else {}))
    if place == "option":
        source = add_options(source, {"train_dataloader.dataset.shards.data_format": named})
    if place == "config":
        source = source.replace("# settings: the model", f"from {own} import to_sample\n\n# settings: the model")
        source = source.replace("data_format=data_format", "data_format=to_sample")
    config = loads(source, "config.py")
    check(config, DATA_PARTS)
    made = Assembly(config).build(config.train_dataloader.dataset.shards)
    assert len(made) == 1
    assert made.ledger.rows == 1


def test_list_formats_shows_each_with_a_row_that_can_be_copied(capsys):
    assert run(["list-formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, example in EXAMPLES.items():
        [place] = [place for place, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert json.loads(lines[place + 1]) == example
    assert 'data_format=NAME. "auto" looks into the rows' in "\n".join(lines)


@pytest.mark.parametrize("name", FORMATS)
def test_list_formats_shows_one_in_full(capsys, name: str):
    assert run(["list-formats", name]) == 0
    shown = capsys.readouterr().out
    row, sample = shown.partition("\nA row:\n")[2].split("\nThe sample:\n")
    assert json.loads(row) == EXAMPLES[name]
    assert json.loads(sample) == FORMATS[name](EXAMPLES[name])


def test_list_formats_suggests_the_nearest_name(capsys):
    assert run(["list-formats", "sharegpd"]) == 2
    assert "There is no format sharegpd. Did you mean sharegpt?" in capsys.readouterr().err


def test_join_files_puts_rows_of_one_id_together(tmp_path: Path, capsys):
    first = write(tmp_path / "q.jsonl", {"id": "1", "question": "a"}, {"id": "2", "question": "b"}, {"id": 3, "q": "c"})
    second = write(tmp_path / "a.jsonl", {"id": 3, "answer": "z"}, {"id": "1", "answer": "x"})
    out = tmp_path / "out.jsonl"
    assert run(["join-files", str(first), str(second), str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"id": "1", "question": "a", "answer": "x"},
        {"id": 3, "q": "c", "answer": "z"},
    ]
    assert capsys.readouterr().out == f"{out}: 2 rows; 1 of {first} have no partner and were left out.\n"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([{"id": 1}], [{"id": 1}, {"id": 1}], "a.jsonl:2: the id 1 comes twice. Expected each id once."),
        ([{"a": 1}], [{"id": 1}], "q.jsonl:1: expected an 'id' (text or a number), the row has ['a']."),
        ([{"id": 1, "x": 1}], [{"id": 1, "x": 2}], "q.jsonl:1: both rows with id 1 have ['x'], with different values."),
    ],
)
def test_join_files_refuses_what_does_not_fit_and_leaves_no_file(tmp_path: Path, first: list, second: list, said: str):
    with pytest.raises(UserError) as caught:
        join_files(write(tmp_path / "q.jsonl", *first), write(tmp_path / "a.jsonl", *second), tmp_path / "out.jsonl")
    assert str(caught.value).endswith(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]
    with pytest.raises(UserError, match="exists already; nothing was written"):
        join_files(tmp_path / "q.jsonl", tmp_path / "a.jsonl", tmp_path / "a.jsonl")
