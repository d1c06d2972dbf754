"""What others made, models, adapters, templates, configs, neither runs code nor reads what lies elsewhere."""

import ast
import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.cli import run
from tuner.dataset import jinja_process
from tuner.dataset.jinja_process import TemplateProcess, limited_here
from tuner.dataset.messages import RowError
from tuner.errors import UserError
from tuner.model.adapter_directory import check_adapter_weights, read_adapter_config
from tuner.model.build import build_llm
from tuner.model.directory import WEIGHTS_INDEX
from tuner.model.hollow import StoredWeights
from tuner.model.tokenizer import build_tokenizer

PACKAGE = Path(__file__).resolve().parent.parent.parent / "tuner"
EFFECT = "import pathlib\npathlib.Path({mark!r}).touch()\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama in two files with an index."""
    directory = tmp_path_factory.mktemp("llama") / "model"
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(directory, max_shard_size="2KB")
    return directory


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def rename_in_index(directory: Path, old: str, new: str) -> None:
    index = directory / WEIGHTS_INDEX
    index.write_text(index.read_text().replace(old, new))


@pytest.mark.parametrize("name", ["../{}", "{directory}/{}", "sub/../{}", "sub/{}"])
def test_an_index_that_leads_out_of_its_directory_is_refused(copy, name):
    first = sorted(path.name for path in copy.glob("*.safetensors"))[0]
    (copy / "sub").mkdir()
    for place in (copy.parent, copy / "sub"):
        shutil.copy(copy / first, place / first)
    rename_in_index(copy, f'"{first}"', json.dumps(name.format(first, directory=copy)))
    for load in (build_llm, lambda path: StoredWeights(path, is_offline=True)):
        with pytest.raises(UserError, match="Only safetensors files beside it are read"):
            load(str(copy))


def test_a_link_is_followed_only_in_the_hub_s_own_cache(copy, tmp_path):
    first = sorted(copy.glob("*.safetensors"))[0]
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    first.rename(blobs / "0123")
    first.symlink_to(blobs / "0123")
    with pytest.raises(UserError, match="is a link to"):
        build_llm(str(copy))
    snapshot = blobs.parent / "snapshots" / "4567"
    shutil.copytree(copy, snapshot, symlinks=True)
    build_llm(str(snapshot))


def test_an_index_that_is_none_is_refused(copy):
    for text in ("[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"):
        (copy / WEIGHTS_INDEX).write_text(text)
        with pytest.raises(UserError, match="Fetch it again"):
            build_llm(str(copy))


def test_the_code_beside_a_model_is_never_run(copy, tmp_path):
    mark = tmp_path / "mark"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (copy / f"{name}.py").write_text(EFFECT.format(mark=str(mark)))
    config = json.loads((copy / "config.json").read_text())
    named = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    assert isinstance(build_llm(str(copy)), LlamaForCausalLM)  # transformers' own class, which needs none of it
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": named, "model_type": "x"}))
    with pytest.raises(UserError, match="is never run"):
        build_llm(str(copy))
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    )
    with pytest.raises(UserError, match="remote code is never run"):
        build_tokenizer(str(copy))
    assert not mark.exists()


class Effect:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickled_weights_are_not_opened(copy, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"a": Effect(mark)}, copy / "adapter_model.bin")
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="is a pickle"):
        check_adapter_weights(copy)
    for path in [*copy.glob("*.safetensors"), copy / WEIGHTS_INDEX, copy / "adapter_config.json"]:
        path.unlink()
    (copy / "adapter_model.bin").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="only as pickles"):
        build_llm(str(copy))
    assert not mark.exists()


def test_an_adapter_that_asks_for_more_than_a_lora_is_refused(tmp_path):
    file = tmp_path / "adapter_config.json"
    cases = {
        "[]": "of the kind 'list'",
        '{"peft_type": "XLORA"}': "of the kind 'XLORA'",
        "{": "cannot be read",
        '{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "this"}': "would be imported",
    }
    for text, message in cases.items():
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_adapter_config(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is a link to"):
        check_adapter_weights(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "config.yml", "config.json"])
def test_configs_are_python_files_and_nothing_else(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text('{"custom_imports": {"imports": ["this"]}, "model": {}}')
    assert run(["train", str(path)]) == 2
    assert "A config file ends in .py" in capsys.readouterr().err


TEMPLATE = """{%- for m in messages %}
{%- if m.content == 'long' %}{{ 'x' * 34000000 }}{% endif %}
{%- if m.content == 'loud' %}{{ raise_exception('x' * 900000) }}{% endif %}
{{- m.role + ': ' + m.content + '</s>' }}{% endfor %}"""


@pytest.mark.usefixtures("template_processes_of_users")
def test_what_a_template_writes_and_says_is_bounded():
    process = TemplateProcess(TEMPLATE, {}, ["</s>"], [])
    with pytest.raises(RowError, match="writes 34,000,0"):
        process.lay_out([{"role": "user", "content": "long"}], None, (), False)
    with pytest.raises(RowError) as caught:
        process.lay_out([{"role": "user", "content": "loud"}], None, (), False)
    assert len(str(caught.value)) <= jinja_process.MAX_ERROR
    layout = process.lay_out([{"role": "user", "content": "a"}], None, (), False)
    assert layout.text.strip() == "user: a</s>"


def spin() -> None:
    """In a process of its own."""
    jinja_process.CPU_SECONDS = 1
    with limited_here():
        try:
            bytearray(jinja_process.MEMORY)
        except MemoryError:
            while True:
                9**9**6


def test_transformers_own_rendering_in_a_check_is_bounded():
    process = multiprocessing.get_context("fork").Process(target=spin)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGPROF


RUNS_CODE = {"eval", "exec", "compile", "__import__"}
ALLOWED = {
    ("demo/world.py", "exec"),  # programs of that module
    ("chat/interpreter_process.py", "exec"),  # with --allow-code, in another process
    ("chat/interpreter_process.py", "compile"),
    ("convert/reload.py", "apply_chat_template"),  # in another process, with limits
}


def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    """(last name, call) of every call in a module; of re.compile and the like, `re.compile`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.append((node.func.id, node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found.append((f"{ast.unparse(node.func.value)}.{node.func.attr}", node))
    return found


def complaints(path: Path, name: str) -> list[str]:
    """Calls in a module that would run or unpickle what others wrote."""
    problems = []
    for called, node in calls_of(path):
        last, options = called.rpartition(".")[2], {option.arg: ast.unparse(option.value) for option in node.keywords}
        is_auto = called.startswith("Auto") and last in ("from_pretrained", "from_config")
        problems += [
            f"{name}:{node.lineno}: {called}"
            for is_wrong in (
                called in RUNS_CODE and (name, called) not in ALLOWED,
                last == "apply_chat_template" and (name, last) not in ALLOWED,
                called == "torch.load" and options.get("weights_only") != "True",
                called in ("pickle.load", "pickle.loads", "yaml.load", "os.system"),
                options.get("shell") == "True",
                options.get("trust_remote_code", "False") != "False",
                is_auto and options.get("trust_remote_code") != "False",
                is_auto
                and "Model" in called
                and last == "from_pretrained"
                and options.get("use_safetensors") != "True",
            )
            if is_wrong
        ]
    return problems


def test_no_module_runs_or_unpickles_what_others_wrote():
    found = [problem for path in sorted(PACKAGE.rglob("*.py"))
             for problem in complaints(path, path.relative_to(PACKAGE).as_posix())]  # fmt: skip
    assert found == []


def test_such_a_call_is_found(tmp_path):
    path = tmp_path / "x.py"
    lines = ["eval(x)", "torch.load(x)", "AutoModel.from_pretrained(x, trust_remote_code=False)", "pickle.loads(x)"]
    lines += ["AutoTokenizer.from_pretrained(x)", "t.apply_chat_template(x)", "subprocess.run(x, shell=True)"]
    path.write_text("\n".join([*lines, "re.compile(x)", "torch.load(x, weights_only=True)"]))
    assert [problem.split(":")[1] for problem in complaints(path, "x.py")] == ["1", "2", "3", "4", "5", "6", "7"]
