"""`tuner convert llama` and back, against transformers' own Llama, in a process that knows nothing of us."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import write_directory
from transformers import AutoTokenizer, LlamaForCausalLM

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.cli import run
from tuner.convert import llama
from tuner.convert.llama import convert_to_internlm2, convert_to_llama
from tuner.errors import UserError
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM
from tuner.model.tokenizer import build_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 1000000,
    "initializer_range": 0.1,
    "bias": False,
    "pad_token_id": 2,
}
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "gqa, bias, dynamic": ({"bias": True, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, torch.float32),
    "mha, linear, tied": (
        {"num_key_value_heads": 8, "rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": True},
        torch.float32,
    ),
    "mqa, bfloat16": ({"num_key_value_heads": 1}, torch.bfloat16),
}
TEXTS = [
    "Hello  world\n",
    "你好，世界 12345",
    "<|im_start|>user\nhi<|im_end|>\n<s></s>",
    " <|plugin|> [UNUSED_TOKEN_3]",
]
TALK = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "你好"}, {"role": "user", "content": "?"}]


def make_model(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **overrides: Any) -> Path:
    """An InternLM2 directory with random weights, norms and biases included."""
    model = write_directory(folder)
    config = InternLM2Config(**(json.loads((model / "config.json").read_text()) | SHAPE | overrides))
    torch.manual_seed(0)
    llm = InternLM2ForCausalLM(config)
    for name, parameter in llm.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    llm.generation_config.eos_token_id = 2
    llm.to(dtype).save_pretrained(model, max_shard_size=shard_size)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The model, as a Llama, and back."""
    overrides, dtype = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("llama")
    model = make_model(folder / "model", dtype, "60KB", **overrides)
    made = convert_to_llama(model, folder / "llama", max_shard_size=100_000, verify="tied" in request.param)
    back = convert_to_internlm2(made, folder / "back", verify="bias" in request.param)  # one fresh process each way
    return model, made, back


@torch.no_grad()
def test_transformers_own_llama_gives_the_logits(converted: tuple[Path, Path, Path]) -> None:
    model, made, _ = converted
    assert len(list(made.glob("*.safetensors"))) > 1
    ours = InternLM2ForCausalLM.from_pretrained(model, attn_implementation="eager").float()
    theirs, report = LlamaForCausalLM.from_pretrained(made, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values())
    for length in (20, 80):  # within and beyond max_position_embeddings, where dynamic scaling begins
        ids = torch.randint(3, 900, (2, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(theirs.float()(ids).logits, ours(ids).logits, rtol=0, atol=2e-5)


def test_there_and_back_is_bit_for_bit(converted: tuple[Path, Path, Path]) -> None:
    model, _, back = converted
    before, after = weights(model), weights(back)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    read = [InternLM2Config.from_pretrained(folder).to_dict() for folder in (model, back)]
    different = {key for key in read[0] | read[1] if read[0].get(key) != read[1].get(key)}
    assert different <= {"auto_map", "transformers_version", "_name_or_path"}
    tokenizers = [build_tokenizer(str(folder)) for folder in (model, back)]
    assert len({str([tokenizer(text)["input_ids"] for text in TEXTS]) for tokenizer in tokenizers}) == 1
    assert (model / "tokenizer.model").read_bytes() == (back / "tokenizer.model").read_bytes()


STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, texts, talk = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps({
    "ids": [tokenizer(text)["input_ids"] for text in texts],
    "talk": tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False),
    "special": [str(token) for token in tokenizer.all_special_tokens],
    "class": type(AutoModelForCausalLM.from_pretrained(folder)).__name__,
    "stops": GenerationConfig.from_pretrained(folder).eos_token_id,
    "rope": AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters,
    "ours": [name for name in sys.modules if name.split(".")[0] == "tuner"],
}))
"""


def test_a_process_without_us_reads_ids_template_and_stops(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", bias=True, rope_scaling={"type": "dynamic", "factor": 2.0})
    made = convert_to_llama(model, tmp_path / "llama", verify=False)
    words = json.dumps([str(made), TEXTS, TALK])
    done = subprocess.run([sys.executable, "-c", STRANGER, words], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert told["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert told["talk"] == tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert set(told["special"]) == set(tokenizer.all_special_tokens)
    assert told["class"] == "LlamaForCausalLM"
    assert told["stops"] == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert told["rope"] == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000}
    assert told["ours"] == []
    assert not list(made.glob("*.py"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, name: str, **added: torch.Tensor) -> None:
    tensors = weights(folder)
    tensors.pop(name)
    save_file(tensors | added, folder / "model.safetensors", metadata={"format": "pt"})


def with_index(folder: Path, file: str) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(weights(folder), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


MISTAKES: dict[str, tuple[Any, str]] = {
    "a Qwen": (lambda m: edit(m, model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "Qwen2.*takes.*'internlm2'"),
    "a reward model": (lambda m: edit(m, architectures=["InternLM2ForRewardModel"]), "InternLM2ForRewardModel"),
    "quantised": (lambda m: edit(m, quantization_config={"bits": 4}), "quantised"),
    "other heads": (lambda m: edit(m, num_key_value_heads=4), r"wqkv.weight is \(96, 64\), not \(128, 64\)"),
    "a tensor is missing": (
        lambda m: without(m, "model.layers.1.attention.wo.weight"),
        "1.attention.wo.weight is missing",
    ),
    "a tensor too much": (
        lambda m: without(m, "output.weight", **{"output.weight": torch.zeros(1010, 64), "extra": torch.zeros(1)}),
        "extra is not known",
    ),
    "truncated": (truncated, "damaged"),
    "an index that leads out": (lambda m: with_index(m, "../elsewhere.safetensors"), "by their plain names"),
    "an index with a whole path": (lambda m: with_index(m, "/etc/passwd"), "by their plain names"),
    "a link": (linked, "is a link to"),
    "no tokenizer": (lambda m: (m / "tokenizer.model").unlink(), "tokenizer.model"),
    "no config": (lambda m: (m / "config.json").write_text("["), "config.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    make, message = MISTAKES[name]
    make(make_model(tmp_path / "model"))
    with pytest.raises(UserError, match=message):
        convert_to_llama(tmp_path / "model", tmp_path / "llama")
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "elsewhere.safetensors"}


def test_a_llama_that_is_no_internlm2_is_refused(tmp_path: Path) -> None:
    made = convert_to_llama(make_model(tmp_path / "model"), tmp_path / "llama", verify=False)
    edit(made, rope_scaling={"rope_type": "llama3", "factor": 4.0})
    with pytest.raises(UserError, match=r"config.json.*not right.*high_freq_factor"):
        convert_to_internlm2(made, tmp_path / "back")
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    edit(made, mlp_bias=True, rope_scaling={"rope_type": "llama3", "factor": 4.0, **bounds})
    with pytest.raises(UserError, match=r"mlp_bias.*rope type 'llama3'"):
        convert_to_internlm2(made, tmp_path / "back")
    with pytest.raises(UserError, match=r"type 'llama'.*takes.*'internlm2'"):
        convert_to_llama(made, tmp_path / "again")


def test_what_is_there_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    assert run(["convert", "llama", str(model), str(model)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert run(["convert", "llama", str(model), str(tmp_path / "llama"), "--no-verify"]) == 0
    assert run(["convert", "internlm2", str(tmp_path / "llama"), str(tmp_path / "llama")]) == 2


def test_a_wrong_layout_is_found_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    right = llama.as_llama

    def swapped(tensors: Any, heads: Any) -> Any:
        found = right(tensors, heads)
        names = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight")
        return found | {names[0]: found[names[1]], names[1]: found[names[0]]}

    monkeypatch.setattr(llama, "as_llama", swapped)
    with pytest.raises(RuntimeError, match=r"layers.0.attention.wqkv.weight differs"):
        convert_to_llama(model, tmp_path / "llama", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(model)


def test_the_record_says_what_was_compared(converted: tuple[Path, Path, Path]) -> None:
    _, made, back = converted
    for folder in (made, back):
        record = json.loads((folder / "conversion.json").read_text())
        said = " ".join(record["checked"])
        assert "mapped back" in said
        if not record["not_checked"]:
            assert all(word in said for word in ("sha256", "tokenizer ids", "chat template", "RoPE", "logits"))
