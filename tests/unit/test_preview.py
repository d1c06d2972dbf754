"""What a preview shows is what training gets: the same documents, tokens and labels, from the config alone."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from preview_runs import PRESET, Page, conversation, rows, words, write_run

from tuner.check import DATA_PARTS, check
from tuner.cli import run
from tuner.config import loads, render
from tuner.constants import IGNORE_INDEX
from tuner.dataset.build import PackedDataset, build_dataloader, build_shards
from tuner.dataset.sampler import StepPlan
from tuner.errors import UserError
from tuner.model.tokenizer import build_tokenizer
from tuner.preview.samples import pack_heading, pack_views


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preview")


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, object]:
    return write_run(folder)


def shards_of(folder: Path, max_length: int = 256, file: str = "rows.jsonl", data_format: Any = "openai") -> Any:
    """The data as training prepares it, by the calls that the recipe names."""
    return build_shards(
        str(folder / file), data_format=data_format, chat_template="internlm2", max_length=max_length,
        tokenizer=build_tokenizer(str(folder / "model")), cache_dir=folder / "cache",
    )  # fmt: skip


def page_of(arguments: list[str], tmp_path: Path) -> Page:
    target = tmp_path / "page.html"
    assert run([*arguments, "--html", str(target)]) == 0
    return Page(target.read_text(encoding="utf-8"))


def asked_for(batch: dict[str, Any]) -> list[tuple[int, bool]]:
    """(id, whether some label asks for it) of each token of a batch, label by label."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    trained = [False] * len(ids)
    for place, label in enumerate(labels):
        if label != IGNORE_INDEX:
            assert label == ids[place + 1]
            trained[place + 1] = True
    return list(zip(ids, trained))


@pytest.mark.parametrize(("step", "rank", "num_ranks"), [(0, 0, 1), (3, 0, 1), (1, 1, 2), (2, 2, 3)])
def test_a_step_of_a_rank_shows_the_documents_tokens_and_labels_that_its_dataloader_gives(
    folder: Path, settings: dict[str, object], tmp_path: Path, step: int, rank: int, num_ranks: int
):
    place = ["--step", str(step), "--rank", str(rank), "--num-ranks", str(num_ranks)]
    page = page_of(words(settings, *place), tmp_path)
    dataset = PackedDataset(shards_of(folder), max_length=256, seed=0)
    loader = build_dataloader(dataset, num_accumulation_steps=2, num_epochs=2, rank=rank, num_ranks=num_ranks)
    batches = list(loader)[step]
    assert len(page.packs) == len(batches) == 2
    for pack, batch in zip(page.packs, batches):
        shown = [token for document in pack for token in page.flat(document)]
        assert shown == asked_for(batch)
        edges = batch["cu_seqlens"].tolist()
        assert [len(page.flat(document)) for document in pack] == [b - a for a, b in pairwise(edges)]
        assert any(trained for _, trained in shown)
    numbers = [int(re.match(r"document (\d+) ", heading)[1]) for heading in page.headings]
    assert numbers == [number for pack in loader.sampler.plan(step).packs for number in pack]


def test_a_rank_without_a_pack_at_the_end_of_an_epoch_has_none_to_show(folder: Path, settings: dict[str, object]):
    shards = shards_of(folder)
    dataset = PackedDataset(shards, max_length=256, seed=0)
    plan = StepPlan(step=1, epoch=0, packs=((), (3,)), num_loss_tokens=5)
    empty, full = pack_views(plan, dataset[plan], shards, sequence_parallel=2)
    assert (empty.documents, empty.num_tokens, empty.padding) == ([], 1, 1)
    assert [document.number for document in full.documents] == [3]
    assert "0 documents in 1 token" in pack_heading(empty)


def test_a_message_that_weighs_half_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture):
    content = rows()[3:]
    for row in content[::2]:
        row["messages"][1]["loss"] = 0.5
    settings = write_run(tmp_path, content)
    page = page_of(words(settings, "--step", "0"), tmp_path)
    dataset = PackedDataset(shards_of(tmp_path), max_length=256, seed=0)
    batches = next(iter(build_dataloader(dataset, num_accumulation_steps=2)))
    shown = [token for pack in page.packs for document in pack for token in document]
    drawn = [token.weight for token in shown for _ in token.ids]
    wanted = [weight for batch in batches for weight in [0.0, *batch["loss_weights"][0].tolist()[:-1]]]
    assert drawn == wanted
    assert set(wanted) == {0.0, 0.5, 1.0}
    assert "⟦⟨×0.5⟩" in capsys.readouterr().out


def test_without_a_step_the_first_documents_of_training_are_shown_in_its_order(
    folder: Path, settings: dict[str, object], tmp_path: Path
):
    page = page_of(words(settings, "-n", "9"), tmp_path)
    dataset = PackedDataset(shards_of(folder), max_length=256, seed=0)
    steps = build_dataloader(dataset, num_accumulation_steps=2).sampler
    order = [number for plan in steps for pack in plan.packs for number in pack][:9]
    lines = [f"document {number} · {dataset.shards.source(number)} · " for number in order]
    assert [heading.startswith(line) for heading, line in zip(page.headings, lines)] == [True] * 9
    assert len(page.headings) == 9
    assert len(page.packs) > 1


def test_a_document_says_its_row_its_tokens_and_how_many_are_trained(
    folder: Path, settings: dict[str, object], capsys: pytest.CaptureFixture
):
    assert run(words(settings, "-n", "1")) == 0
    shards = shards_of(folder)
    heading = re.search(r"document (\d+) · (\S+:\d+) · (\d+) tokens, (\d+) trained", capsys.readouterr().out)
    number = int(heading[1])
    assert heading[2] == shards.source(number) == f"{folder / 'rows.jsonl'}:{number + 1}"
    assert int(heading[3]) == shards.lengths[number]
    assert int(heading[4]) == shards.num_loss_tokens[number]


def test_the_brackets_hold_the_answers_and_nothing_else(folder: Path, settings: dict[str, object], capsys: Any):
    assert run(words(settings, "-n", "100", pack=False)) == 0
    text = capsys.readouterr().out
    documents = re.findall(r"document (\d+) ·.*?\n(.*?)\n[├└]", text, re.DOTALL)
    assert len(documents) == 40
    for number, drawn in documents:
        if int(number) < 3:
            continue  # those with signs for what is not seen
        answers = [turn["content"] for turn in rows()[int(number)]["messages"] if turn["role"] == "assistant"]
        assert re.findall("⟦(.*?)⟧", drawn, re.DOTALL) == [f"{answer}«<|im_end|>»" for answer in answers]


def test_sequence_parallel_cuts_stand_where_equal_parts_of_the_pack_begin(settings: dict[str, object], tmp_path: Path):
    page = page_of(words(settings, "--step", "0", "--sequence-parallel-size", "4"), tmp_path)
    lengths = [[len(page.flat(document)) for document in pack] for pack in page.packs]
    found = []
    for place, before in page.cuts:
        pack = 0 if place < len(lengths[0]) else 1
        inside = place - pack * len(lengths[0])
        found.append((pack, sum(lengths[pack][:inside]) + before))
    sizes = [sum(pack) for pack in lengths]
    assert found == [(pack, part * -(-size // 4)) for pack, size in enumerate(sizes) for part in (1, 2, 3)]


def test_padding_is_told_and_never_part_of_a_document(settings: dict[str, object], tmp_path: Path, capsys: Any):
    options = ["--cfg-options", "train_dataloader.dataset.pad_to_multiple_of=256"]
    page = page_of(words(settings, "--step", "1", *options), tmp_path)
    sizes = [sum(len(page.flat(document)) for document in pack) for pack in page.packs]
    text = capsys.readouterr().out
    for size in sizes:
        assert f"{256 - size} tokens of padding" in text or size == 256
    assert text.count("in 256 tokens") == 2


def test_what_truncation_took_is_shown_behind_what_is_left(folder: Path, settings: dict[str, object], tmp_path: Path):
    """Every document of the step against the same data prepared with room for all of it."""
    page = page_of(words(settings, "-n", "40", max_length=60), tmp_path)
    whole = shards_of(folder, max_length=100_000)
    num_cut = num_long = 0
    for heading, document in zip(page.headings, [document for pack in page.packs for document in pack]):
        line = int(re.search(r":(\d+) · ", heading)[1])
        cut = [index for token in document if token.mark == "cut off" for index in token.ids]
        assert [index for index, _ in page.flat(document)] + cut == whole.document(line - 1).ids.tolist()
        num_cut += bool(cut)
        num_long += whole.lengths[line - 1] > 60
    assert num_cut == num_long > 20


def test_what_truncation_took_is_found_in_the_format_of_each_file(tmp_path: Path):
    settings = write_run(tmp_path)
    pair = {"question": "What is it?", "answer": "ba ne " * 60}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    path = [{"path": str(tmp_path / "rows.jsonl"), "weight": 1}]
    path += [{"path": str(tmp_path / "pairs.jsonl"), "weight": 1, "data_format": "auto"}]
    page = page_of(words(settings, "-n", "40", max_length=60, data_path=json.dumps(path)), tmp_path)
    whole = {name: shards_of(tmp_path, 100_000, name, "auto") for name in ("rows.jsonl", "pairs.jsonl")}
    seen = set()
    for heading, document in zip(page.headings, [document for pack in page.packs for document in pack]):
        name, line = re.search(r"(\w+\.jsonl):(\d+) · ", heading).groups()
        cut = [index for token in document if token.mark == "cut off" for index in token.ids]
        assert [index for index, _ in page.flat(document)] + cut == whole[name].document(int(line) - 1).ids.tolist()
        seen |= {name} if cut else set()
    assert seen == set(whole)


def test_rows_in_one_line_of_an_array_are_told_apart_or_said_not_to_be(folder: Path, tmp_path: Path, capsys: Any):
    twins = [conversation("ba ba ba ba", f"ne ne ne ne {end}") for end in ("的的的", "人人人人人")]
    content = [conversation("th th", "ing ing ing ing ing ing ing"), *twins]
    settings = write_run(tmp_path, content)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    tokens = build_tokenizer(str(tmp_path / "model"))
    room = len(tokens("<s><|im_start|>user\nba ba ba ba<|im_end|>\n<|im_start|>assistant\nne ne").input_ids)
    assert run(words(settings, data_path=file, pack=False, max_length=room)) == 0
    text = capsys.readouterr().out
    assert text.count("was cut is not known: 2 different rows of this line begin like the document") == 2
    assert text.count("tokens were cut off") == 1


def test_a_preview_needs_a_tokenizer_and_nothing_else_of_the_model(tmp_path: Path, capsys: Any):
    settings = {name: str(value) for name, value in write_run(tmp_path).items()}
    source = render(PRESET, settings)
    check(loads(source), DATA_PARTS)
    with pytest.raises(UserError, match="has no weights"):
        check(loads(source))
    (tmp_path / "model" / "config.json").unlink()
    check(loads(source), DATA_PARTS)
    assert run(words(settings)) == 0
    assert "document" in capsys.readouterr().out


def test_what_only_trains_is_not_loaded():
    """The engine with its packages is some seconds of start-up."""
    code = "import tuner.preview.command, sys; print({'mmengine', 'deepspeed', 'peft'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert shown.stdout == "set()\n"


def test_mistakes_in_the_data_part_are_told_all_at_once(tmp_path: Path, capsys: Any):
    arguments = [f"data_path={tmp_path / 'none.jsonl'}", "max_length=1", "too_long=cut", "lr=0.0"]
    assert run(["preview", PRESET, *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in ("none.jsonl", "max_length", "too_long"))
    assert "lr" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n 0: give at least 1"),
        (["-n", "-3"], "-n -3: give at least 1"),
        (["--num-ranks", "0"], "--num-ranks 0: give at least 1"),
        (["--sequence-parallel-size", "0"], "--sequence-parallel-size 0: give at least 1"),
        (["--step", "100000"], "--step 100000: the run has "),
        (["--step", "-1"], "--step -1: the run has "),
        (["--step", "0", "--rank", "2", "--num-ranks", "2"], "--rank 2: the run has 2 data-parallel ranks"),
        (["--rank", "-1"], "--rank -1: the run has 1 data-parallel rank"),
        (["--rank", "3"], "--num-ranks says how many"),
        (["lrr=1"], "lrr"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_message_and_exit_code_2(
    settings: dict[str, object], capsys: Any, arguments: list[str], message: str
):
    assert run(words(settings, *arguments)) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "tokenising" not in line]
    assert message in error
    assert len(lines) == 1


def test_a_config_that_is_not_there_is_told(capsys: Any):
    assert run(["preview", "nowhere.py"]) == 2
    assert "There is no config file nowhere.py" in capsys.readouterr().err


def test_the_last_step_is_there_and_the_one_after_it_is_not(folder: Path, settings: dict[str, object], capsys: Any):
    dataset = PackedDataset(shards_of(folder), max_length=256, seed=0)
    num_steps = len(build_dataloader(dataset, num_accumulation_steps=2, num_epochs=2).sampler)
    assert run(words(settings, "--step", str(num_steps - 1))) == 0
    assert f"step {num_steps - 1} · epoch 1" in capsys.readouterr().out
    assert run(words(settings, "--step", str(num_steps))) == 2
    assert f"the run has {num_steps} steps, counted from 0 to {num_steps - 1}" in capsys.readouterr().err
