"""`tuner.train.train` from a preset to curves, and on again from its checkpoint in a new process, bit for bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tuner.chat.loading import find_source, load_llm
from tuner.config import render
from tuner.convert.to_hf import convert
from tuner.demo.files import resolve
from tuner.engine.checkpoint import find_checkpoint, list_checkpoints, verify_checkpoint
from tuner.errors import UserError
from tuner.model.build import build_llm
from tuner.model.tokenizer import check_vocabulary
from tuner.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
WEIGHTS = "model-00000-of-00001.safetensors"
SECRET, SECRET_OF_ENVIRONMENT = "opensesame", "plainwords"
EXECUTED = "open({path!r}, 'a').write('x')\n"


def write_rows(path: Path) -> None:
    """Forty short conversations, in two languages, that a model can learn."""
    rows = []
    for number in range(40):
        question, answer = ("{} 加 1 是多少？", "是 {}。") if number % 2 else ("What is {} plus 1?", "It is {}.")
        turns = [("user", question.format(number)), ("assistant", answer.format(number + 1))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """The recipe over a model of 30 thousand parameters and the demo's tokenizer: 2 epochs of some steps."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.jsonl")
    settings = {
        "model_path": str(small_model(folder / "model")),
        "weights": "random",
        "data_path": str(folder / "rows.jsonl"),
        "cache_dir": str(folder / "cache"),
        "max_length": 128,
        "num_accumulation_steps": 2,
        "num_epochs": 2,
        "max_steps": None,
        "lr": 1e-2,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "log_interval": 4,
        "save_interval": 3,
        "sample_interval": 2,
        "sample_prompts": ["What is 3 plus 1?"],
    }
    text = render("internlm2_tiny-sft_full", settings)
    return f"{text}hub_token = {SECRET!r}\n" + EXECUTED.format(path=str(folder / "executed"))


def small_model(folder: Path) -> Path:
    """The demo's model directory with a smaller network."""
    shutil.copytree(resolve("demo:model"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET_OF_ENVIRONMENT)
        return train(source, work_dir=tmp_path_factory.mktemp("runs") / "straight")


def metrics(work_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_everything_is_written(run, source):
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, rows[-1]["num_steps"] + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert all(0 < row["mfu"] <= row["hfu"] for row in rows)
    assert (run / "curves.png").stat().st_size > 10_000
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "config.py").read_text() == source.replace(SECRET, "***")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [row["step"] for row in rows if row["step"] % 2 == 0]
    verify_checkpoint(find_checkpoint(run))


def test_every_trained_token_of_the_ledger_is_in_every_epoch(run):
    ledger = json.loads((run / "ledger.json").read_text())
    rows = metrics(run)
    for epoch in (0, 1):
        assert sum(row["num_loss_tokens"] for row in rows if row["epoch"] == epoch) == ledger["trained"]
        assert sum(row["num_tokens"] for row in rows if row["epoch"] == epoch) == ledger["kept"]["tokens"]


RESUME = """
import sys
from pathlib import Path
from tuner.train import train
work_dir = Path(sys.argv[1])
train((work_dir / "config.py").read_text(), work_dir=work_dir, resume="auto")
"""


def test_a_new_process_resumes_bit_for_bit(run, source, tmp_path):
    """Stop after the first checkpoint as a kill would, then go on in another process."""
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        train(interrupted_after(source, 4), work_dir=half)
    assert [path.name for path in list_checkpoints(half)] == ["step_00000003"]
    (half / "config.py").write_text(source)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(half)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("loss", "lr", "grad_norm"):
        assert [row[name].hex() for row in metrics(half)] == [row[name].hex() for row in metrics(run)], name
    assert (find_checkpoint(half) / WEIGHTS).read_bytes() == (find_checkpoint(run) / WEIGHTS).read_bytes()


def interrupted_after(source: str, step: int) -> str:
    """The same config with a hook that leaves without a goodbye."""
    hook = (
        "from mmengine.hooks import Hook\n\n\n"
        "class Interrupt(Hook):\n"
        '    priority = "LOWEST"\n\n'
        "    def after_train_iter(self, runner, batch_idx, data_batch, outputs):\n"
        f"        if runner.strategy.step == {step}:\n"
        "            raise KeyboardInterrupt\n"
    )
    folder = Path(re.search(r'cache_dir.* = "(.*)"', source).group(1)).parent
    (folder / "interrupting.py").write_text(hook)
    sys.path.insert(0, str(folder))
    source = source.replace("# settings: the model", "from interrupting import Interrupt\n\n# settings: the model", 1)
    return source.replace("dict(type=CurvesHook),", "dict(type=CurvesHook),\n    dict(type=Interrupt),")


def test_a_work_dir_with_a_run_is_not_written_over(run, source):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match="holds a run already"):
        train(source, work_dir=run)
    assert {path: path.read_bytes() for path in before} == before


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_training(source, tmp_path):
    """The recipe's tokenizer with another model's network: each directory is right by itself."""
    folder = Path(re.search(r'model_path.* = "(.*)"', source).group(1))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 8}))
    wrong = source.replace("path=model_path,\n        weights", f"path={str(tmp_path / 'other')!r},\n        weights")
    assert wrong != source
    with pytest.raises(UserError, match=r"tokenizer has ids up to \d+, the model's embedding only \d+ rows"):
        train(wrong, work_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_config_that_fails_its_check_leaves_no_work_dir(source, tmp_path):
    wrong = re.sub(r"(?m)^lr = [^ ]+", "lr = -1", source)
    with pytest.raises(UserError, match="lr = -1: allowed is a number above 0"):
        train(wrong, work_dir=tmp_path / "run", name="mine.py")
    assert not (tmp_path / "run").exists()


def test_an_embedding_larger_than_the_tokenizer_is_fine():
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "b": 9}

    class Model:
        def __init__(self, rows):
            self.rows = rows

        def get_input_embeddings(self):
            return torch.nn.Embedding(self.rows, 2)

    check_vocabulary(Tokenizer(), Model(10))
    check_vocabulary(Tokenizer(), Model(16))
    with pytest.raises(UserError, match="ids up to 9"):
        check_vocabulary(Tokenizer(), Model(9))


def test_the_checkpoint_holds_the_models_own_names(run):
    names = set(load_file(find_checkpoint(run) / WEIGHTS))
    llm = build_llm("demo:model", weights="random")
    assert llm.config.tie_word_embeddings  # the output is the embedding: it is kept once
    assert names == set(llm.state_dict()) - {"output.weight"}
    assert "model.layers.1.attention.wqkv.weight" in names


def test_no_file_of_a_run_holds_a_secret(run, source):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "config.py" and path.parent != run for path in files)
    assert SECRET in source
    held = [
        path for path in files for secret in (SECRET, SECRET_OF_ENVIRONMENT) if secret.encode() in path.read_bytes()
    ]
    assert held == []
    assert "hub_token = '***'" in (run / "config.py").read_text()
    assert json.loads((find_checkpoint(run) / "state.json").read_text())["settings"]["hub_token"] == "***"


def test_the_config_in_a_checkpoint_is_never_executed(run, source, tmp_path):
    mark = Path(source.splitlines()[-1].split("'")[1])
    executed = mark.read_text()
    assert executed  # by the user's own command
    convert(run, tmp_path / "converted", verify=False)
    llm = load_llm(find_source(str(run), None))
    trained = load_file(find_checkpoint(run) / WEIGHTS)
    assert all(torch.equal(llm.state_dict()[name], tensor) for name, tensor in trained.items())
    shutil.copytree(run, tmp_path / "run")
    train(source.replace(source.splitlines()[-1], ""), work_dir=tmp_path / "run", resume="auto")
    assert mark.read_text() == executed
