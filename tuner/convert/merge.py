"""`tuner convert merge`: a base model and a LoRA adapter to the one model that they are together."""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuner.convert.adapter_files import Adapter, LowRank, read_adapter
from tuner.convert.config_fit import check_config_fits
from tuner.convert.low_rank import added, merged
from tuner.convert.model_files import copy_companions, model_tensors
from tuner.convert.output import check_absent, publishing
from tuner.convert.quantised import FourBitTensor, dequantised
from tuner.convert.record import Checks, write_record
from tuner.convert.reload import Origin, check_reload
from tuner.convert.requantised import Requantised, requantise_module
from tuner.convert.settings import write_json
from tuner.convert.sharding import DEFAULT_SHARD_SIZE, write_shards
from tuner.convert.tensors import Piece, Rows, StoredTensor, cast, total_bytes
from tuner.convert.to_hf import DTYPES, DtypeName, dtype_of
from tuner.errors import UserError
from tuner.model.base_note import check_base
from tuner.model.directory import inside
from tuner.model.peft_package import load_peft

TIED = ("tok_embeddings.weight", "embed_tokens.weight", "wte.weight", "output.weight", "lm_head.weight")
OWN = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json",
       "template.json", "generation_config.json")  # fmt: skip
"""files that an adapter may bring, which then go with the model: tokenizer, chat template, stop tokens"""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""of logits, relative to the largest: adding before or after a product rounds otherwise, and so does the dtype"""


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: DtypeName = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    verify: bool = True,
) -> Path:
    """Write `out`: the base with the adapter added to its weights, computed in float32, as a model directory.

    A 4-bit base is written in the dtype that it computes with: its weights are the numbers that the 4 bits stand for.

    Args:
        base: the model directory that the adapter was trained on.
        adapter: a directory with adapter_config.json and adapter_model.safetensors.
        out: a directory that does not exist yet, or is empty.
        dtype: of the written weights; "auto" keeps that of the base.
        max_shard_size: bytes of a file at most.
        verify: also load `out` in a fresh process and compare it with base and adapter as peft runs them.

    Raises:
        UserError: an adapter of another base, a damaged file, something in `out` already, or a disk that refuses.
        RuntimeError: what was written is not what it should be; it is not published.
    """
    check_absent(out)
    change = read_adapter(adapter)
    tensors = base_tensors(base, change)
    check_config_fits(tensors, base)
    check_fit(base, tensors, change)
    pieces = [piece_of(tensor, change, DTYPES[dtype]) for tensor in tensors.values()]
    checks = Checks()
    with publishing(out, num_bytes=total_bytes(pieces)) as draft:
        copy_companions(base, draft)
        copy_own(adapter, draft)
        write_config(draft, dtype_of(pieces))
        write_card(base, adapter, draft, out.name)
        with ThreadPoolExecutor(1) as pool:
            recognised = pool.submit(check_fingerprint, base, change)
            digests = write_shards(draft, pieces, max_shard_size=max_shard_size)
            recognised.result()
        note_base(tensors, change, checks)
        check_reload(origin_of(base, change, pieces), draft, digests, checks, verify=verify)
        write_record(draft, "merge", {"base": base.name, "adapter": adapter.name}, pieces, digests, checks)
    print(checks.summary(), flush=True)
    return out


def check_fit(base: Path, tensors: Mapping[str, Rows], change: Adapter) -> None:
    """Refuse an adapter of another base: each of its tensors must have one of the base, and fit it."""
    shapes: dict[str, tuple[int, ...]] = {name: low_rank.shape for name, low_rank in change.changes.items()}
    shapes |= {name: tensor.shape for name, tensor in change.successors.items()}
    shapes |= {name: tensor.shape for name, (_, tensor) in change.bias_changes.items()}
    wrong = [f"no {name}" for name in shapes if name not in tensors]
    wrong += [
        f"{name} is {tensors[name].shape}, the adapter's is {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(shape) != tuple(tensors[name].shape)
    ]
    if wrong or not shapes:
        named = change.config.get("base_model_name_or_path") or "a base that it does not name"
        raise UserError(
            f"{change.directory} is an adapter for another base than {base} ({'; '.join(wrong[:3]) or 'it is empty'}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}). It was trained on {named}."
        )
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tied = sorted(name for name in shapes if name.endswith(TIED))
    if config.get("tie_word_embeddings") and tied:
        raise UserError(
            f"{change.directory} changes {tied[0]}, which {base} uses as embedding and as head (tie_word_embeddings), "
            "so merged it would change both. Use the adapter beside its base: tuner chat BASE --adapter DIR"
        )


def base_tensors(base: Path, change: Adapter) -> dict[str, Rows]:
    """The base's tensors as the adapter was trained on: what was quantised then has the values of its 4 bits."""
    tensors = dequantised(model_tensors(base), base)
    if change.base.get("quantise"):
        compute_dtype = DTYPES[change.base["compute_dtype"]]
        for name in change.changes:
            if isinstance(tensor := tensors.get(name), StoredTensor):
                tensors[name] = Requantised(tensor, compute_dtype)
    return tensors


def check_fingerprint(base: Path, change: Adapter) -> None:
    """Refuse a base whose tensors are not those that the adapter was trained on, where that is known."""
    if change.base.get("weights") == "pretrained":
        check_base(change.directory, str(base), change.base, change.config["base_model_name_or_path"])


def piece_of(tensor: Rows, change: Adapter, dtype: torch.dtype | None) -> Piece:
    """A tensor of the base, changed, replaced or as it is, in the dtype of the base's or the one asked for."""
    name, target = tensor.name, dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
    if name in change.changes:
        return merged(change.successors.get(name, tensor), change.changes[name], target, name)
    if name in change.bias_changes:
        return added(tensor, *change.bias_changes[name], target)
    return cast(change.successors.get(name, tensor), target, name)


def copy_own(adapter: Path, out: Path) -> None:
    """The adapter's tokenizer, chat template and stop tokens in the place of the base's."""
    for path in sorted(path for pattern in OWN for path in adapter.glob(pattern)):
        shutil.copyfile(inside(adapter, path.name), out / path.name)


def write_config(out: Path, dtype: torch.dtype) -> None:
    """The base's config.json with the written dtype, and no longer quantised."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    write_json(out / "config.json", config)


def write_card(base: Path, adapter: Path, out: Path, name: str) -> None:
    """README.md: what was merged, and what the adapter's own card says of its training."""
    path = adapter / "README.md"
    told = path.read_text(encoding="utf-8").partition("## Recipe") if path.is_file() else ("", "", "")
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- tuner\n---"
    (out / "README.md").write_text(
        f"{front}\n\n# {name}\n\nThe LoRA adapter `{adapter.name}` merged into its base `{base.name}`. "
        f"`conversion.json` says what was checked.\n\n{told[1]}{told[2]}",
        encoding="utf-8",
    )


def note_base(tensors: Mapping[str, Rows], change: Adapter, checks: Checks) -> None:
    """Say how the base was recognised, and whether its weights are those of 4 bits."""
    checks.checked.append(f"names and shapes of all {len(change.names)} tensors of the adapter against the base's")
    if change.base.get("weights") == "pretrained":
        checks.checked.append("the base's fingerprint: its tensors are those that the adapter was trained on")
    else:
        checks.not_checked.append("that the base is the one of training: the adapter has no fingerprint of its files")
    if num := sum(isinstance(tensor, FourBitTensor) for tensor in tensors.values()):
        checks.checked.append(f"{num} tensors of the base are 4-bit: the numbers they stand for were merged into")
    if num := sum(isinstance(tensor, Requantised) for tensor in tensors.values()):
        checks.checked.append(f"{num} tensors were NF4 in training: merged into those values, not the base's own")


def origin_of(base: Path, change: Adapter, pieces: list[Piece]) -> Origin:
    """What the fresh process compares with: float64 sums of whole tensors, and peft's own forward pass."""
    return Origin(
        settings=base,
        words=change.directory if list(change.directory.glob("tokenizer*")) else base,
        tensors=partial(expected_tensors, base, change.directory),
        model=partial(load_with_adapter, base, change.directory),
        tolerance=max(TOLERANCE.get(dtype, 5e-2) for dtype in (dtype_of(pieces), dtype_of_products(base, pieces))),
        computed=frozenset({*change.changes, *change.bias_changes}),
    )


def dtype_of_products(base: Path, pieces: list[Piece]) -> torch.dtype:
    """In which peft multiplies: on CPUs bitsandbytes turns 4-bit weights and what they meet into bf16, whatever is set.

    That concerns logits alone; tensors are compared with sums in float64.
    """
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return torch.bfloat16 if "quantization_config" in settings else dtype_of(pieces)


def expected_tensors(base: Path, adapter: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of each tensor, the changed ones in float64 and whole."""
    change = read_adapter(adapter)
    for name, tensor in base_tensors(base, change).items():
        weight = whole(change.successors.get(name, tensor))
        if name in change.changes:
            weight = expected_sum(weight.double(), change.changes[name])
        elif name in change.bias_changes:
            scale, bias = change.bias_changes[name]
            weight = weight.double() + scale * bias.whole().double()
        yield name, weight


def whole(tensor: Rows) -> torch.Tensor:
    """All of it in memory."""
    return torch.cat([block.flatten() for block in tensor.blocks()]).view(tensor.shape)


def expected_sum(weight: torch.Tensor, change: LowRank) -> torch.Tensor:
    """The definition, without blocks: W + scale * up @ down, rows of the length of the magnitude."""
    delta = change.scale * change.up.whole().double() @ change.down.whole().double()
    total = (weight.T if change.is_turned else weight) + delta
    if change.magnitude is not None:
        total = total / total.norm(dim=1, keepdim=True) * change.magnitude.whole().double().view(-1, 1)
    return total.T if change.is_turned else total


def load_with_adapter(base: Path, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Base and adapter as peft runs them, not merged."""
    peft = load_peft()

    llm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    change = read_adapter(adapter)
    if change.base.get("quantise"):
        for name in change.changes:
            requantise_module(llm, name, DTYPES[change.base["compute_dtype"]])
    return peft.PeftModel.from_pretrained(llm, adapter).eval()
