"""InternEvo's tensor-parallel parts: which files are a model, how they are joined, and how a model is cut into them.

Facts from InternEvo's public sources (checkpoint/components.py, convert2hf_internlm2.py, revert_internlm2.py): files
are `model_tp{t}_pp{p}.pt`, layers are counted from 0 in each pipeline stage, names may begin with `model.`. Of a
model each rank has: wqkv (whole key groups), w1, w3 and the head by rows; wo and w2 by columns; the embedding by
columns where `embed_split_hidden`, else by rows; norms whole.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from tuner.convert.layout import ColumnRange, Columns, Rows, Shuffled, Source, all_rows, digest
from tuner.convert.llama_form import Heads
from tuner.convert.pickled import Kind, PickledTensor, check_bytes, read_pickle
from tuner.errors import UserError
from tuner.model.directory import inside

PART = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
OTHER_PARTS = re.compile(r"model_(wp\d+_pp\d+|tp\d+_pp\d+_(dp|zo)\d+|moe_layer.*)\.pt")
CONFIG = "model_config.pt"
LAYER = re.compile(r"layers\.(\d+)\.(.+)")
EMBEDDINGS = ("tok_embeddings.weight", "tok_embeddings.word_embeddings.weight", "embedding.word_embeddings.weight")
HEAD = "output.weight"
BY_ROWS = ("attention.wqkv.weight", "feed_forward.w1.weight", "feed_forward.w3.weight")
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
WHOLE = ("attention_norm.weight", "ffn_norm.weight")
NEEDED = ("num_attention_heads", "num_kv_attention_heads")


@dataclass(frozen=True)
class Joined:
    """A model put together from its parts, under the names and in the layout of the parts."""

    tensors: dict[str, Source]
    """names without what InternEvo puts before them; layers are counted through"""
    settings: dict[str, Any]
    """model_config.pt"""
    prefix: str
    """before all names in the parts: "model." or nothing"""
    embed_split_hidden: bool

    @property
    def heads(self) -> Heads:
        """How the rows of wqkv lie."""
        heads, keys = (self.settings[name] for name in NEEDED)
        hidden = self.tensors["norm.weight"].shape[0]
        return Heads(keys, heads // keys, hidden // heads)


def has_parts(directory: Path) -> bool:
    """Whether it is one of InternEvo's, whether or not they can be joined."""
    return directory.is_dir() and any(
        PART.fullmatch(p.name) or OTHER_PARTS.fullmatch(p.name) for p in directory.iterdir()
    )


def join(directory: Path) -> Joined:
    """The model whose parts lie in a directory; its values are read where they are asked for.

    Raises:
        UserError: a part is missing, damaged or refused, parts do not fit each other, or are of another architecture.
    """
    grid = grid_of(directory)
    settings = read_settings(directory)
    stages = [[read_part(path) for path in stage] for stage in grid]
    prefix = "model." if all(name.startswith("model.") for stage in stages for part in stage for name in part) else ""
    tensors: dict[str, list[PickledTensor]] = {}
    num_layers = 0
    for paths, stage in zip(grid, stages, strict=True):
        bare = [{name.removeprefix(prefix): tensor for name, tensor in part.items()} for part in stage]
        for part, path in zip(bare, paths, strict=True):
            if part.keys() != bare[0].keys():
                raise UserError(
                    f"{path} has other tensors than {paths[0].name}: {sorted(part.keys() ^ bare[0].keys())[:3]}."
                )
        shift, num_layers = shift_of(bare[0], num_layers, paths[0])
        tensors |= {shifted(name, shift): [part[name] for part in bare] for name in bare[0]}
    check_bytes([tensor for parts in tensors.values() for tensor in parts])
    return joined(directory, tensors, settings, prefix, num_layers)


def grid_of(directory: Path) -> list[list[Path]]:
    """The files by pipeline stage and tensor rank; UserError where one is missing, or they are of another kind."""
    other = sorted(path.name for path in directory.iterdir() if OTHER_PARTS.fullmatch(path.name))
    if other:
        raise UserError(
            f"{directory} has {other[0]}: weights of InternEvo's ISP mode (wp), of FSDP (dp, zo) or of experts (moe) "
            "are not known here; model_tp*_pp*.pt of the modes mtp, msp and fsp are."
        )
    found = {}
    for path in directory.iterdir():
        if match := PART.fullmatch(path.name):
            found[int(match[2]), int(match[1])] = inside(directory, path.name)
    if not found:
        raise UserError(f"{directory} has no model_tp*_pp*.pt. Give the directory that holds them.")
    num_stages, num_ranks = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    wanted = [(stage, rank) for stage in range(num_stages) for rank in range(num_ranks)]
    if missing := [f"model_tp{rank}_pp{stage}.pt" for stage, rank in wanted if (stage, rank) not in found]:
        raise UserError(
            f"{directory} lacks {', '.join(missing[:3])}: it has parts of {num_ranks} tensor ranks and {num_stages} "
            "pipeline stages. Copy the others, too."
        )
    return [[found[stage, rank] for rank in range(num_ranks)] for stage in range(num_stages)]


def read_settings(directory: Path) -> dict[str, Any]:
    """model_config.pt with what is a plain value or a dtype in it."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG}, which InternEvo writes beside the parts. Copy it, too.")
    content = read_pickle(inside(directory, CONFIG))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings.")
    settings = {key: value.dtype if isinstance(value, Kind) else value for key, value in content.items()}
    settings = {key: value for key, value in settings.items() if plain(value)}
    settings.setdefault("num_kv_attention_heads", settings.get("num_attention_heads"))
    if wrong := [name for name in NEEDED if type(settings.get(name)) is not int or settings[name] < 1]:
        raise UserError(f"{path} has no {wrong[0]}; it has {', '.join(map(str, settings))}.")
    if settings.get("no_bias") is False:
        raise UserError(f"{path} says no_bias=False. Only InternLM2's parts are known, whose projections have no bias.")
    return settings


def plain(value: Any) -> bool:
    """Whether it is a value that a model_config.pt may hold: no tensor and nothing that was left out in reading."""
    return value is None or isinstance(value, (str, int, float, bool, torch.dtype))


def read_part(path: Path) -> dict[str, PickledTensor]:
    """A part's tensors by name, without rotary frequencies."""
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, PickledTensor) for value in content.values()):
        raise UserError(f"{path} is no part of a model: it holds more than tensors by name.")
    return {str(name): tensor for name, tensor in content.items() if not str(name).endswith("inv_freq")}


def shift_of(part: Mapping[str, Any], num_before: int, path: Path) -> tuple[int, int]:
    """What to add to a stage's layer numbers, and how many layers there are with it."""
    numbers = {int(match[1]) for name in part if (match := LAYER.fullmatch(name))}
    if not numbers:
        return 0, num_before
    first = min(numbers)
    if first not in (0, num_before) or numbers != set(range(first, first + len(numbers))):
        raise UserError(f"{path} has the layers {sorted(numbers)}, behind {num_before} of the stages before it.")
    return num_before - first, num_before + len(numbers)


def shifted(name: str, shift: int) -> str:
    """The name with its layer counted through; the embedding under one name."""
    match = LAYER.fullmatch(name)
    if match:
        return f"layers.{int(match[1]) + shift}.{match[2]}"
    return EMBEDDINGS[0] if name in EMBEDDINGS else name


def joined(
    directory: Path,
    parts: Mapping[str, Sequence[PickledTensor]],
    settings: dict[str, Any],
    prefix: str,
    num_layers: int,
) -> Joined:
    """Check that all tensors of an InternLM2 are there, and join each."""
    kinds = (*BY_ROWS, *BY_COLUMNS, *WHOLE)
    expected = {f"layers.{place}.{kind}" for place in range(num_layers) for kind in kinds}
    expected |= {EMBEDDINGS[0], "norm.weight", HEAD}
    if unknown := sorted(parts.keys() - expected):
        raise UserError(
            f"The parts in {directory} are of no InternLM2: they have {', '.join(unknown[:4])}. An InternLM2's are "
            f"{EMBEDDINGS[0]}, layers.N.{{{', '.join(kinds)}}}, norm.weight and {HEAD}."
        )
    if missing := sorted(expected - parts.keys()):
        raise UserError(f"The parts in {directory} lack {', '.join(missing[:4])}.")
    table = parts[EMBEDDINGS[0]]
    hidden = parts["norm.weight"][0].shape[0]
    split_hidden = len(table[0].shape) == 2 and table[0].shape[1] * len(table) == hidden and len(table) > 1
    split_hidden |= len(table) == 1 and bool(settings.get("embed_split_hidden", True))
    tensors = {name: join_one(directory, name, of_ranks, split_hidden) for name, of_ranks in parts.items()}
    result = Joined(tensors, settings, prefix, split_hidden)
    check_shapes(directory, result, hidden)
    return result


def join_one(directory: Path, name: str, parts: Sequence[PickledTensor], split_hidden: bool) -> Source:
    """One tensor from all ranks' parts of it."""
    kind = name.split(".", 2)[-1] if LAYER.fullmatch(name) else name
    by_columns = kind in BY_COLUMNS or (name == EMBEDDINGS[0] and split_hidden)
    if kind in WHOLE or name == "norm.weight":
        if len({digest(part) for part in parts}) > 1:
            raise UserError(f"{name} should be the same on all ranks in {directory}, and is not. Are they of one step?")
        return parts[0]
    if (
        any(len(part.shape) != 2 for part in parts)
        or len({(part.dtype, part.shape[not by_columns]) for part in parts}) > 1
    ):
        raise UserError(
            f"The parts of {name} in {directory} do not fit: {', '.join(str(part.shape) for part in parts)}."
        )
    return Columns(tuple(parts)) if by_columns else all_rows(parts)


def check_shapes(directory: Path, model: Joined, hidden: int) -> None:
    """The joined tensors must have the shapes that model_config.pt and the norms say."""
    heads, keys = (model.settings[name] for name in NEEDED)
    if heads % keys or hidden % heads:
        raise UserError(f"{directory / CONFIG}: {heads} heads, {keys} key heads and a width of {hidden} do not fit.")
    fused = (heads + 2 * keys) * (hidden // heads)
    wide = model.tensors["layers.0.feed_forward.w1.weight"].shape[0]
    vocabulary = model.settings.get("vocab_size", model.tensors[HEAD].shape[0])
    shapes = {
        **dict.fromkeys(WHOLE, (hidden,)),
        "attention.wqkv.weight": (fused, hidden),
        "attention.wo.weight": (hidden, hidden),
        **dict.fromkeys(("feed_forward.w1.weight", "feed_forward.w3.weight"), (wide, hidden)),
        "feed_forward.w2.weight": (hidden, wide),
    }
    outside = {EMBEDDINGS[0]: (vocabulary, hidden), HEAD: (vocabulary, hidden), "norm.weight": (hidden,)}
    for name, source in model.tensors.items():
        match = LAYER.fullmatch(name)
        expected = shapes[match[2]] if match else outside[name]
        if source.shape != expected:
            raise UserError(f"Joined, {name} of {directory} is {source.shape}; by {CONFIG} it should be {expected}.")


@dataclass(frozen=True)
class Normalized:
    """Rows of length 1: a head that InternEvo normalises in every forward pass (`norm_head`)."""

    source: Source

    @property
    def dtype(self) -> torch.dtype:
        """That of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Divided by their lengths in fp32."""
        return normalize(self.source.rows(first, last).float(), dim=-1).to(self.dtype)


def is_interleaved(settings: Mapping[str, Any]) -> bool | None:
    """Whether rotary pairs are neighbours (0, 1), (2, 3) as in GPT-J, not (0, d/2) as in transformers; None: unsaid.

    InternEvo has called it adapt_hf, rot_embed_HF_impl and, the other way round, qk_interleaved.
    """
    for name in ("adapt_hf", "rot_embed_HF_impl"):
        if isinstance(settings.get(name), bool):
            return not settings[name]
    stated = settings.get("qk_interleaved")
    return stated if isinstance(stated, bool) else None


def apart(heads: Heads) -> tuple[int, ...]:
    """For a key group's rows of wqkv: where each row of transformers' order lies among interleaved ones."""
    size = heads.head_dim
    pairs = [*range(0, size, 2), *range(1, size, 2)]
    turned = [head * size + place for head in range(heads.groups + 1) for place in pairs]
    return (*turned, *range((heads.groups + 1) * size, (heads.groups + 2) * size))


def in_transformers_order(wqkv: Source, heads: Heads) -> Source:
    """Interleaved rotary rows as transformers has them; values have no rotary order."""
    return Shuffled(wqkv, apart(heads))


def part_of(name: str, source: Source, rank: int, num_ranks: int, split_hidden: bool) -> Source:
    """What rank `rank` of `num_ranks` has of a joined tensor."""
    match = LAYER.fullmatch(name)
    kind = match[2] if match else name
    if kind in WHOLE or name == "norm.weight":
        return source
    if kind in BY_COLUMNS or (name == EMBEDDINGS[0] and split_hidden):
        width = source.shape[1] // num_ranks
        return ColumnRange(source, rank * width, (rank + 1) * width)
    height = source.shape[0] // num_ranks
    return Rows(((source, rank * height, (rank + 1) * height),))


def check_divides(tensors: Mapping[str, Source], num_ranks: int, num_key_heads: int, split_hidden: bool) -> None:
    """UserError where some tensor cannot be cut into as many equal parts of whole heads."""
    table = tensors[EMBEDDINGS[0]].shape
    sizes = {
        "key heads": num_key_heads,
        "rows of w1": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "rows of the head": table[0],
        "columns of the embedding": table[1] if split_hidden else num_ranks,
    }
    common = math.gcd(*sizes.values())
    for name, size in sizes.items():
        if num_ranks < 1 or size % num_ranks:
            allowed = [str(count) for count in range(1, common + 1) if common % count == 0]
            raise UserError(f"--tp {num_ranks} does not divide the {size} {name}; {', '.join(allowed)} would do.")
