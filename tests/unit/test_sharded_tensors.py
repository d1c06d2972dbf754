"""Tensors written a block at a time are read by safetensors as they were, in the shards that others would make."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from tuner.convert import published_names, tensors
from tuner.convert.model_files import model_tensors
from tuner.convert.output import publishing
from tuner.convert.published_names import published
from tuner.convert.sharding import INDEX, header_of, parse_size, write_shards
from tuner.convert.tensors import Piece, cast
from tuner.errors import UserError


def weights() -> dict[str, torch.Tensor]:
    """Shapes and dtypes that models have, and an empty one and a scalar."""
    torch.manual_seed(0)
    return {
        "embed": torch.randn(50, 7),
        "norm": torch.randn(7).to(torch.bfloat16),
        "行": torch.randn(3, 5, 7).to(torch.float16),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "head": torch.randn(50, 7),
    }


def write_source(folder, given=None):
    """A model directory with all weights in one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(given or weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("max_shard_size", [10**9, 1500, 64])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_what_is_written_is_what_safetensors_reads(tmp_path, monkeypatch, max_shard_size, dtype):
    monkeypatch.setattr(tensors, "BLOCK_SIZE", 16)
    source = model_tensors(write_source(tmp_path / "source"))
    pieces = [cast(tensor, dtype) for tensor in source.values()]
    digests = write_shards(tmp_path, pieces, max_shard_size=max_shard_size)
    written = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    expected = {
        name: tensor.to(dtype) if dtype and tensor.dtype.is_floating_point else tensor
        for name, tensor in weights().items()
    }
    assert written.keys() == expected.keys() == digests.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert digests[name] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("max_shard_size", [10**9, 1500, 64])
def test_shards_and_index_are_those_of_the_hub_library(tmp_path, max_shard_size):
    pieces = [cast(tensor) for tensor in model_tensors(write_source(tmp_path / "source")).values()]
    write_shards(tmp_path, pieces, max_shard_size=max_shard_size)
    state = {piece.name: weights()[piece.name] for piece in pieces}
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    assert {path.name: set(load_file(path)) for path in tmp_path.glob("*.safetensors")} == {
        file: set(names) for file, names in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == plan.tensor_to_filename
        assert index["metadata"] == {"total_size": plan.metadata["total_size"]}


def test_a_value_beyond_a_dtype_is_refused(tmp_path):
    source = write_source(tmp_path / "source", {"w": torch.tensor([1.0, 7e4])})
    [piece] = [cast(tensor, torch.float16) for tensor in model_tensors(source).values()]
    with pytest.raises(UserError, match="w has values up to 7e"), publishing(tmp_path / "out") as draft:
        write_shards(draft, [piece])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "..", ""])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="plain names"):
        model_tensors(tmp_path)


def test_a_link_out_of_the_directory_is_refused_but_not_the_hubs_own(tmp_path):
    elsewhere = write_source(tmp_path / "elsewhere")
    linked = write_source(tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    with pytest.raises(UserError, match="is a link to"):
        model_tensors(linked)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        os.rename(elsewhere / name, tmp_path / "models--a--b" / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert model_tensors(snapshot).keys() == weights().keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is damaged"),
        (lambda data: data + b"x", "is damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "F99"),
        (lambda data: data.replace(b"[50,7]", b"[50,8]"), "is damaged"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, message):
    path = write_source(tmp_path / "source") / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        model_tensors(tmp_path / "source")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2 << 30), ("77", 77)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 parsecs", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


def peak_growth(work) -> int:
    """Bytes by which the process's peak grows while `work` runs; the kernel's own count, set back before."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmHWM")
    work()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """A tensor of 256 MB, a hole in its file, goes from fp32 to bf16 in a quarter of its size; read whole, not."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    count = 1 << 26
    header = header_of([Piece("w", torch.float32, (count,), list)])
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * count)
    [tensor] = model_tensors(source).values()
    write_shards(tmp_path, [cast(tensor, torch.bfloat16)])  # what is loaded once, such as sha256, is then there
    (tmp_path / "model.safetensors").unlink()
    assert peak_growth(lambda: write_shards(tmp_path, [cast(tensor, torch.bfloat16)])) < 64e6
    assert peak_growth(tensor.whole) > 200e6


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
def test_joined_experts_are_written_one_by_one_as_save_pretrained_does(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(published_names, "BLOCK_SIZE", 100)
    sizes = dict(hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=1, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    config = kind(**sizes, **heads, num_local_experts=3, num_experts=3)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    llm.save_pretrained(tmp_path / "theirs")
    loaded = write_source(tmp_path / "loaded", {name: weight.detach() for name, weight in llm.named_parameters()})
    (tmp_path / "ours").mkdir()
    write_shards(tmp_path / "ours", published(model_tensors(loaded), tmp_path / "theirs", torch.bfloat16))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() != dict(llm.named_parameters()).keys()
    assert all(torch.equal(ours[name], tensor.to(torch.bfloat16)) for name, tensor in theirs.items())
