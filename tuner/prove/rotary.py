"""What the rotary embedding of a config's model gives in a forward pass, against the formula that its config names."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tuner.dataset.collate import collate
from tuner.dataset.tokenize import Document
from tuner.errors import UserError
from tuner.model.attention_cut import BLIND
from tuner.model.build import build_llm
from tuner.prove.rope import Floats, Rope, dynamic_base, plain, read_ropes, turns
from tuner.prove.small_model import NUM_TOKEN_IDS, Family, one_head, write_model

MOST_TOKENS = 1 << 17  # tried, where max_length is more
SHORT = 600  # tokens of the document that lies behind the longest one
ANGLE_ROUNDING, VALUE_ROUNDING = 2e-6, 4e-6  # of angles computed in fp32, relative; of their cosines


class Heard(NamedTuple):
    """What a rotary embedding gave for the tokens of a pack: (T, D / 2) each."""

    layers: str | None  # the type of layer it was asked for
    cosine: Floats
    sine: Floats


class Verdict(NamedTuple):
    """Lines for the user, and whether what was found is what the config says."""

    lines: list[str]
    is_good: bool


def check_rotary(family: Family, max_length: int, directory: Path) -> Verdict:
    """Compare cosines and sines of two packed documents, one as long as the config allows, with the formula.

    Raises:
        UserError: a rope whose formula is not known here, or an embedding of another form.
    """
    ropes = read_ropes(family.raw, family.head_size)
    lengths = [min(max_length, MOST_TOKENS), SHORT]
    heard = listen(family, lengths, directory)
    if not heard:
        return Verdict([f"{type(family.config).__name__}'s model has no rotary embedding; nothing to compare"], True)
    lines, is_good = [], True
    for one in heard:
        if one.layers not in ropes and None not in ropes:
            raise UserError(f"The model turns layers of type {one.layers!r}, of which its config.json says nothing.")
        rope = ropes.get(one.layers) or ropes[None]
        verdict = judge(rope, one, lengths)
        prefix = "" if one.layers is None else f"{one.layers} layers: "
        lines += [f"{prefix}{line}" for line in verdict.lines]
        is_good &= verdict.is_good
        if max_length > MOST_TOKENS:
            lines.append(f"tried to {MOST_TOKENS:,} tokens; max_length is {max_length:,}")
    return Verdict(lines, is_good)


def listen(family: Family, lengths: list[int], directory: Path) -> list[Heard]:
    """The output of each rotary embedding in a forward pass over a pack; attention itself is left out."""
    llm = build_llm(str(write_model(one_head(family), directory)), weights="random", attention="sdpa").eval()
    llm.set_attn_implementation(BLIND)
    heard: list[Heard] = []

    def note(module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        layers = next((value for value in (*arguments, *named.values()) if isinstance(value, str)), None)
        heard.append(Heard(layers, *(_by_frequency(module, part) for part in _pair(module, output))))

    for module in llm.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(note, with_kwargs=True)
    ids = [np.arange(length, dtype=np.uint32) % NUM_TOKEN_IDS for length in lengths]
    batch = collate([Document(one, np.zeros(len(one), bool)) for one in ids], 1)
    names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
    with torch.no_grad():
        llm.get_decoder()(**{name: batch[name] for name in names}, use_cache=False)  # type: ignore[literal-required]
    return heard


def _pair(module: nn.Module, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, torch.Tensor) for part in output)):
        raise UserError(f"{type(module).__name__} gives no pair of cosines and sines, so it cannot be compared here.")
    return output


def _by_frequency(module: nn.Module, values: torch.Tensor) -> Floats:
    """(1, T, D) or (1, T, D / 2) -> (T, D / 2): both halves of a head are alike, or each pair of neighbours."""
    own = values[0].double().numpy()
    half = own.shape[-1] // 2
    if half and np.array_equal(own[:, :half], own[:, half:]):
        return own[:, :half]
    if half and np.array_equal(own[:, ::2], own[:, 1::2]):
        return own[:, ::2]
    return own


def judge(rope: Rope, heard: Heard, lengths: list[int]) -> Verdict:
    """Compare at some positions of each document, those that powers of 2 mark and the last."""
    worst, unscaled, changes = 0.0, 0.0, False
    for (start, _), length in zip(pairwise([0, *np.cumsum(lengths).tolist()]), lengths):
        positions = np.unique([0, *(2**power for power in range(length.bit_length() - 1)), length - 1])
        rows = start + positions
        given = np.stack([heard.cosine[rows], heard.sine[rows]])
        if given.shape[-1] != rope.dims // 2:
            return Verdict([f"turns {2 * given.shape[-1]} dimensions of a head, the config says {rope.dims}"], False)
        angles, scale = turns(rope, positions.astype(np.float64), length)
        meant = scale * np.stack([np.cos(angles), np.sin(angles)])
        allowed = scale * (ANGLE_ROUNDING * angles + VALUE_ROUNDING)
        worst = max(worst, float((abs(given - meant) / allowed).max()))
        bare = positions[:, None] * plain(rope)[0]
        unmeant = np.stack([np.cos(bare), np.sin(bare)])
        unscaled = max(unscaled, float((abs(given - unmeant) / allowed).max()))
        changes |= bool((abs(meant - unmeant) > allowed).any())
    return _verdict(rope, lengths, is_good=worst <= 1, is_plain=unscaled <= 1, changes=changes)


def _verdict(rope: Rope, lengths: list[int], *, is_good: bool, is_plain: bool, changes: bool) -> Verdict:
    lines = [f"config.json: {rope.describe()}"]
    documents = " and ".join(f"{length:,}" for length in lengths)
    if not is_good:
        found = (
            "the model turns as if there were no scaling: it is IGNORED" if is_plain else "the model turns OTHERWISE"
        )
        return Verdict([*lines, f"{found} (documents of {documents} tokens)"], False)
    lines.append(f"the model turns so, in documents of {documents} tokens, to the rounding of fp32")
    if rope.kind != "default" and not changes:
        lines.append(f"note: in documents of up to {max(lengths):,} tokens this scaling changes nothing")
    elif rope.kind == "dynamic":
        lines.append(f"effective base at {lengths[0]:,} tokens: {dynamic_base(rope, lengths[0]):,.0f}")
    reach = rope.trained_length * (1 if rope.kind in ("default", "dynamic") else rope.factor)
    if rope.kind != "dynamic" and lengths[0] > reach:
        lines.append(f"note: documents may have {lengths[0]:,} tokens, more than the {round(reach):,} this reaches")
    return Verdict(lines, True)
