"""`tuner convert internevo`: parts cut here index by index join to the model; resizing and back keep all bits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_tokenizer import write_directory

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.cli import run
from tuner.convert.internevo import convert_internevo
from tuner.convert.internevo_again import origin_of
from tuner.convert.internevo_parts import join
from tuner.convert.pickled import read_pickle
from tuner.convert.record import RECORD
from tuner.convert.reload import MismatchError, compare
from tuner.convert.tensors import Piece
from tuner.convert.torch_archive import STORAGE_CLASSES, write_archive
from tuner.errors import UserError
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM

HEADS, KEYS, HIDDEN, WIDE, LAYERS = 8, 4, 32, 48, 3
SIZE, GROUPS = HIDDEN // HEADS, HEADS // KEYS
SETTINGS: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "num_kv_attention_heads": KEYS,
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "vocab_size": 1012,
    "layer_norm_epsilon": 1e-5,
    "rope_base": 50000,
    "no_bias": True,
    "adapt_hf": True,
    "norm_head": False,
    "embed_split_hidden": True,
    "dtype": torch.bfloat16,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternLM2 directory of these sizes, in bf16."""
    folder = write_directory(tmp_path_factory.mktemp("base") / "model")
    settings = json.loads((folder / "config.json").read_text())
    config = InternLM2Config(
        **settings
        | {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "bias": False}
        | {
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEYS,
            "max_position_embeddings": 4096,
            "vocab_size": 1012,
        }
        | {"rms_norm_eps": 1e-5, "rope_theta": 50000, "pad_token_id": 2}
    )
    torch.manual_seed(0)
    llm = InternLM2ForCausalLM(config)
    for name, parameter in llm.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    llm.bfloat16().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rows_of_rank(rank: int, tp: int) -> list[int]:
    """Rows of wqkv of a rank: of each of its key heads the query heads, the key head and the value head."""
    found = []
    for key in range(rank * KEYS // tp, (rank + 1) * KEYS // tp):
        for head in range(GROUPS + 2):
            found += [(key * (GROUPS + 2) + head) * SIZE + place for place in range(SIZE)]
    return found


def cut(name: str, tensor: torch.Tensor, rank: int, tp: int, embedding: str) -> torch.Tensor:
    """What a rank holds, told by single indices."""
    if "norm" in name:
        return tensor
    if "wqkv" in name:
        return tensor[rows_of_rank(rank, tp)]
    if "attention.wo" in name or "w2" in name or ("tok" in name and embedding == "columns"):
        return tensor[:, [place for place in range(tensor.shape[1]) if place * tp // tensor.shape[1] == rank]]
    return tensor[[place for place in range(tensor.shape[0]) if place * tp // tensor.shape[0] == rank]]


def write_parts(
    folder: Path,
    state: dict[str, torch.Tensor],
    tp: int,
    *,
    pp: tuple[int, ...] = (LAYERS,),
    prefix: str = "model.",
    embedding: str = "columns",
    **settings: Any,
) -> Path:
    """As InternEvo saves: layers counted anew in each pipeline stage of `pp` layers, embedding first, head last."""
    folder.mkdir()
    first = 0
    for stage, count in enumerate(pp):
        for rank in range(tp):
            part = {}
            for name, tensor in state.items():
                bare = name.removeprefix("model.")
                if bare.startswith("layers."):
                    place = int(bare.split(".")[1])
                    if not first <= place < first + count:
                        continue
                    bare = bare.replace(f"layers.{place}.", f"layers.{place - first}.", 1)
                elif stage != (0 if "tok" in bare else len(pp) - 1):
                    continue
                part[prefix + bare] = cut(bare, tensor, rank, tp, embedding).clone()
            part[f"{prefix}layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
            torch.save(part, folder / f"model_tp{rank}_pp{stage}.pt")
        first += count
    torch.save(SETTINGS | {"embed_split_hidden": embedding == "columns"} | settings, folder / "model_config.pt")
    return folder


def to_model(source: Path, out: Path, base: Path | None, interleaved: bool | None = None) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = {"interleaved": interleaved, "split_hidden": None, "verify": False}
    return weights(convert_internevo(source, out, tp=None, base=base, **options))


def reloaded(parts: Path, out: Path, base: Path, tmp_path: Path, *, is_turned: bool = False) -> list[str]:
    """What a fresh process would find, in this one."""
    digests = {name: entry["sha256"] for name, entry in json.loads((out / RECORD).read_text())["tensors"].items()}
    (tmp_path / "expected").mkdir()
    found = compare(origin_of(parts, base, tmp_path / "expected", is_turned=is_turned), out, digests)
    assert found.not_checked == []
    return found.checked


def to_parts(source: Path, out: Path, tp: int, split_hidden: bool | None = None) -> Path:
    return convert_internevo(source, out, tp=tp, base=None, interleaved=None, split_hidden=split_hidden)


@pytest.mark.parametrize(
    ("tp", "options"),
    [
        (4, {}),
        (2, {"pp": (2, 1), "prefix": "", "embedding": "rows"}),
        (1, {"pp": (1, 1, 1)}),
    ],
)
def test_parts_join_to_the_model(tp: int, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    expected = weights(base)
    parts = write_parts(tmp_path / "parts", expected, tp, **options)
    found = to_model(parts, tmp_path / "hf", base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    read, given = (InternLM2Config.from_pretrained(folder).to_dict() for folder in (tmp_path / "hf", base))
    differing = {key for key in given if given[key] != read.get(key)}
    assert differing <= {"auto_map", "transformers_version", "_name_or_path"}
    checked = reloaded(parts, tmp_path / "hf", base, tmp_path)
    assert [text for text in checked if "logits" in text][1].startswith("logits of a text of 4,096 tokens: they differ")
    assert any("50000" in text for text in checked if "RoPE" in text)


@pytest.mark.parametrize("wanted", [1, 2])
def test_parts_for_another_number_of_ranks(wanted: int, base: Path, tmp_path: Path) -> None:
    state = weights(base)
    parts = write_parts(tmp_path / "four", state, 4, adapt_hf=False, rope_base=7)
    resized = to_parts(parts, tmp_path / "resized", wanted)
    assert {path.name for path in resized.glob("model_tp*")} == {f"model_tp{rank}_pp0.pt" for rank in range(wanted)}
    for rank in range(wanted):
        part = torch.load(resized / f"model_tp{rank}_pp0.pt", weights_only=True)
        assert part.keys() == {f"model.{name.removeprefix('model.')}" for name in state}
        for name, tensor in state.items():
            bare = name.removeprefix("model.")
            assert torch.equal(part[f"model.{bare}"], cut(bare, tensor, rank, wanted, "columns")), name
    assert torch.load(resized / "model_config.pt", weights_only=True) == SETTINGS | {"adapt_hf": False, "rope_base": 7}
    grown = to_parts(resized, tmp_path / "again", 4)
    for rank in range(4):
        before, after = (torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True) for folder in (parts, grown))
        before.pop("model.layers.0.attention.rotary_emb.inv_freq")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("split_hidden", [True, False])
def test_a_model_becomes_parts_and_comes_back(split_hidden: bool, base: Path, tmp_path: Path) -> None:
    parts = to_parts(base, tmp_path / "parts", 4, split_hidden)
    state = weights(base)
    part = torch.load(parts / "model_tp2_pp0.pt", weights_only=True)
    for name, tensor in state.items():
        bare = name.removeprefix("model.")
        assert torch.equal(part[bare], cut(bare, tensor, 2, 4, "columns" if split_hidden else "rows")), name
    settings = torch.load(parts / "model_config.pt", weights_only=True)
    assert {key: settings[key] for key in SETTINGS} == SETTINGS | {"embed_split_hidden": split_hidden}
    found = to_model(parts, tmp_path / "hf", base)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_written_part_is_a_file_as_torch_saves_it(tmp_path: Path) -> None:
    tensors = {f"of {dtype}": torch.arange(12).view(3, 4).to(dtype) for dtype in STORAGE_CLASSES}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(2.5), "long": torch.randn(3, 1 << 20)}
    torch.save(tensors, tmp_path / "theirs.pt")
    blocks = {name: (tensor[:1], tensor[1:]) if tensor.dim() else (tensor,) for name, tensor in tensors.items()}
    pieces = {
        name: Piece(name, tensor.dtype, tuple(tensor.shape), partial(iter, blocks[name]))
        for name, tensor in tensors.items()
    }
    write_archive(tmp_path / "ours.pt", pieces)
    ours, theirs = (read_pickle(tmp_path / name) for name in ("ours.pt", "theirs.pt"))
    assert list(ours) == list(theirs)
    for options in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
        found = torch.load(tmp_path / "ours.pt", **options)
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[name], tensor), name
    for name in tensors:
        assert (ours[name].strides, ours[name].region.crc) == (theirs[name].strides, theirs[name].region.crc), name
        assert ours[name].begin % 64 == 0, "as torch.save aligns them"


def interleaved(wqkv: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys as InternEvo has them with adapt_hf=False: rotary pairs are neighbours."""
    result = wqkv.clone()
    for key in range(KEYS):
        for head in range(GROUPS + 1):
            start = (key * (GROUPS + 2) + head) * SIZE
            for pair in range(SIZE // 2):
                result[start + 2 * pair] = wqkv[start + pair]
                result[start + 2 * pair + 1] = wqkv[start + SIZE // 2 + pair]
    return result


@pytest.mark.parametrize(
    "settings", [{"adapt_hf": False}, {"adapt_hf": None, "qk_interleaved": True}, {"adapt_hf": None}], ids=str
)
def test_interleaved_rotary_rows_and_a_normalised_head(settings: dict, base: Path, tmp_path: Path) -> None:
    expected = weights(base)
    state = {name: interleaved(tensor) if "wqkv" in name else tensor for name, tensor in expected.items()}
    parts = write_parts(tmp_path / "parts", state, 2, norm_head=True, **settings)
    if settings == {"adapt_hf": None}:
        with pytest.raises(UserError, match="--rotary half"):
            to_model(parts, tmp_path / "hf", base)
    found = to_model(parts, tmp_path / "hf", base, interleaved=None if len(settings) == 2 else True)
    checked = reloaded(parts, tmp_path / "hf", base, tmp_path, is_turned=True)
    assert any("1 of them were computed" in text for text in checked)
    head = expected.pop("output.weight").double()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(
        found["output.weight"].double(), head / head.norm(dim=1, keepdim=True), rtol=4e-3, atol=0
    )


def edited(folder: Path, name: str, change: Any) -> None:
    part = torch.load(folder / name, weights_only=True)
    change(part)
    torch.save(part, folder / name)


def renamed(part: dict[str, Any]) -> None:
    part["model.blocks.0.mixer.Wqkv.weight"] = part.pop("model.layers.0.attention.wqkv.weight")


def everywhere(change: Any) -> Any:
    return lambda folder: [edited(folder, path.name, change) for path in folder.glob("model_tp*")]


W1 = "model.layers.1.feed_forward.w1.weight"
MISTAKES: dict[str, tuple[Any, str]] = {
    "a part is missing": (lambda f: (f / "model_tp1_pp0.pt").unlink(), "lacks model_tp1_pp0.pt: .* of 4 tensor ranks"),
    "no settings": (lambda f: (f / "model_config.pt").unlink(), "has no model_config.pt"),
    "weight-parallel parts": (
        lambda f: (f / "model_tp0_pp0.pt").rename(f / "model_wp0_pp0.pt"),
        r"model_wp0_pp0.pt: .*ISP.*model_tp\*_pp\*.pt",
    ),
    "a part of another width": (
        lambda f: edited(f, "model_tp1_pp0.pt", lambda p: p.update({W1: p[W1][:, :9].clone()})),
        r"parts of layers.1.feed_forward.w1.weight .* do not fit: \(12, 32\), \(12, 9\)",
    ),
    "a part of another height": (
        lambda f: edited(f, "model_tp1_pp0.pt", lambda p: p.update({W1: p[W1][:9].clone()})),
        r"layers.1.feed_forward.w1.weight of .* is \(45, 32\); .* should be \(48, 32\)",
    ),
    "a tensor that one part lacks": (
        lambda f: edited(f, "model_tp3_pp0.pt", lambda p: p.pop(W1)),
        "other tensors than",
    ),
    "a tensor that all lack": (everywhere(lambda p: p.pop(W1)), f"lack {W1.removeprefix('model.')}"),
    "norms of another step": (
        lambda f: edited(f, "model_tp1_pp0.pt", lambda p: p["model.norm.weight"].add_(1)),
        "norm.weight should be the same",
    ),
    "the first InternLM": (everywhere(renamed), "no InternLM2: they have blocks"),
    "biases": (lambda f: torch.save(SETTINGS | {"no_bias": False}, f / "model_config.pt"), "no_bias=False"),
    "other heads": (lambda f: torch.save(SETTINGS | {"num_kv_attention_heads": 8}, f / "model_config.pt"), "should be"),
    "hostile": (lambda f: torch.save({"a": pytest.raises}, f / "model_config.pt"), "is refused: it names _pytest"),
    "a flipped bit": (lambda f: flip(f / "model_tp2_pp0.pt"), "damaged"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", MISTAKES)
def test_parts_that_do_not_make_a_model_are_told(name: str, base: Path, tmp_path: Path) -> None:
    make, message = MISTAKES[name]
    make(write_parts(tmp_path / "parts", weights(base), 4))
    with pytest.raises(UserError, match=message):
        to_model(tmp_path / "parts", tmp_path / "hf", base)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_what_the_command_needs_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = str(write_parts(tmp_path / "parts", weights(base), 2))
    for words, message in [
        ([parts, str(tmp_path / "hf")], "--base"),
        ([str(base), str(tmp_path / "hf")], "--tp 4"),
        ([parts, str(tmp_path / "hf"), "--tp", "3"], "--tp 3 does not divide the 4 key heads; 1, 2, 4 would do"),
        ([parts, str(base)], "exists and is not empty"),
        ([parts, str(tmp_path / "hf"), "--tp", "2", "--max-shard-size", "1GB"], "one file a rank"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "hf")], "no directory"),
    ]:
        assert run(["convert", "internevo", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_fresh_process_checks_the_model_by_default(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = str(write_parts(tmp_path / "parts", weights(base), 2))
    assert run(["convert", "internevo", parts, str(tmp_path / "hf"), "--base", str(base)]) == 0
    record = json.loads((tmp_path / "hf" / RECORD).read_text())
    assert record["not_checked"] == []
    assert capsys.readouterr().out.count("checked: ") == len(record["checked"]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 10000}, "RoPE"),
        ({"rms_norm_eps": 0.5}, "logits of a text of 16 tokens differ"),
    ],
)
def test_a_model_with_other_settings_than_its_parts_is_found(
    change: dict, message: str, base: Path, tmp_path: Path
) -> None:
    parts = write_parts(tmp_path / "parts", weights(base), 2)
    to_model(parts, tmp_path / "hf", base)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MismatchError, match=message):
        reloaded(parts, tmp_path / "hf", base, tmp_path)


def test_wrongly_written_parts_are_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.convert import internevo

    right = internevo.part_of
    wrong = lambda name, source, rank, *more: right(name, source, 1 - rank if "w1" in name else rank, *more)  # noqa: E731
    monkeypatch.setattr(internevo, "part_of", wrong)
    with pytest.raises(RuntimeError, match=r"w1.weight differs"):
        to_parts(base, tmp_path / "parts", 2)
    assert list(tmp_path.iterdir()) == []
    assert join(write_parts(tmp_path / "good", weights(base), 2)).prefix == "model."
