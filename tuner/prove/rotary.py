"""What the rotary embedding of a config's model gives in a forward pass, against the formula that its config names."""

from itertools import accumulate
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
from tuner.model.rope import own_rope, set_rope
from tuner.prove.rope import Floats, Rope, bare, dynamic_base, read_ropes, turns
from tuner.prove.small_model import NUM_TOKEN_IDS, Family, one_head, write_model

MOST_TOKENS = 1 << 17  # tried, where max_length is more
SHORT = 600  # tokens of the document that lies behind the longest one, or a third of that one's
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
    longest = min(max_length, MOST_TOKENS)
    lengths = [longest, max(1, min(SHORT, longest // 3))]
    heard = listen(family, lengths, directory)
    if not heard:
        is_plain = all(rope.kind == "default" for rope in ropes.values())
        found = f"{type(family.config).__name__}'s model has no rotary embedding that could be found"
        return Verdict([found if is_plain else f"{found}, but config.json scales one: it is IGNORED"], is_plain)
    verdicts = [_judge_layers(ropes, one, lengths) for one in heard]
    lines = [line for verdict in verdicts for line in verdict.lines]
    unheard = sorted(f"{layers}" for layers in set(ropes) - {one.layers for one in heard} if layers is not None)
    lines += [f"note: the model has no layers of type {layers}" for layers in unheard]
    if max_length > MOST_TOKENS:
        lines.append(f"note: tried to {MOST_TOKENS:,} tokens; max_length is {max_length:,}")
    return Verdict(list(dict.fromkeys(lines)), all(verdict.is_good for verdict in verdicts))


def _judge_layers(ropes: dict[str | None, Rope], heard: Heard, lengths: list[int]) -> Verdict:
    if heard.layers not in ropes and None not in ropes:
        raise UserError(f"The model turns layers of type {heard.layers!r}, of which its config.json says nothing.")
    verdict = judge(ropes.get(heard.layers) or ropes[None], heard, lengths)
    prefix = "" if heard.layers is None else f"{heard.layers}: "
    return Verdict([f"{prefix}{line}" for line in verdict.lines], verdict.is_good)


def listen(family: Family, lengths: list[int], directory: Path) -> list[Heard]:
    """The output of each rotary embedding in a forward pass over a pack; attention itself is left out."""
    came = family if family.came is None else family._replace(raw=family.came)
    llm = build_llm(str(write_model(one_head(came), directory)), weights="random", attention="sdpa").eval()
    if not family.rope.is_own:
        set_rope(llm, own_rope(llm.config), family.rope)  # as training does
    llm.set_attn_implementation(BLIND)
    heard: list[Heard] = []

    def note(module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        layers = next((value for value in (*arguments, *named.values()) if isinstance(value, str)), None)
        heard.append(Heard(layers, *(_by_frequency(module, part) for part in _pair(module, output))))

    rotary = [module for module in llm.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if not rotary:
        return []
    for module in rotary:
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


class Fit(NamedTuple):
    """Which formulas give what the model gave in a document of `length` tokens."""

    length: int
    meant: bool  # the config's
    unscaled: bool
    of_longest: bool  # the config's for a document as long as the longest of the pack


def judge(rope: Rope, heard: Heard, lengths: list[int]) -> Verdict:
    """Compare at some positions of each document, those that powers of 2 mark and the last."""
    fits = []
    for start, length in zip(accumulate(lengths, initial=0), lengths):
        positions = np.unique([0, *(2**power for power in range(length.bit_length() - 1)), length - 1])
        given = np.stack([heard.cosine[start + positions], heard.sine[start + positions]])
        if given.shape[-1] != rope.dims // 2:
            line = f"the model turns {2 * given.shape[-1]} dimensions of a head, its config.json says {rope.dims}"
            return Verdict([line], False)
        formulas = [turns(rope, positions, length), turns(bare(rope), positions, 0), turns(rope, positions, lengths[0])]
        fits.append(Fit(length, *(is_near(given, *formula) for formula in formulas)))
    lines = [f"config.json: {rope.describe()}"]
    if all(fit.meant for fit in fits):
        return Verdict([*lines, *remarks(rope, fits)], True)
    return Verdict(lines + [complaint(fit, lengths[0]) for fit in fits if not fit.meant], False)


def is_near(given: Floats, angles: Floats, scale: float) -> bool:
    """Whether cosines and sines (2, N, D / 2) are those of `angles` times `scale`, to what fp32 can hold."""
    meant = scale * np.stack([np.cos(angles), np.sin(angles)])
    return bool((abs(given - meant) <= scale * (ANGLE_ROUNDING * angles + VALUE_ROUNDING)).all())


def complaint(fit: Fit, longest: int) -> str:
    """What is wrong with a document."""
    if fit.unscaled:
        return f"a document of {fit.length:,} tokens is turned as if there were no scaling: it is IGNORED"
    if fit.of_longest:
        return (
            f"a document of {fit.length:,} tokens is turned as if it had the {longest:,} of the longest in its pack: "
            "it DEPENDS ON THE PACK. Choose a scaling that does not look at lengths, such as linear or yarn."
        )
    return f"a document of {fit.length:,} tokens is turned OTHERWISE"


def remarks(rope: Rope, fits: list[Fit]) -> list[str]:
    """What to know about a rotary embedding that does what its config says."""
    longest = fits[0].length
    documents = " and ".join(f"{fit.length:,}" for fit in fits)
    lines = [f"the model turns so, in documents of {documents} tokens, to the rounding of fp32"]
    if rope.kind != "default" and all(fit.unscaled for fit in fits):
        lines.append(f"note: in documents of up to {longest:,} tokens this scaling changes nothing")
    elif rope.kind == "dynamic":
        lines.append(f"effective base at {longest:,} tokens: {dynamic_base(rope, longest):,.0f}")
    elif longest > rope.reach:
        lines.append(f"note: documents may have {longest:,} tokens, more than the {rope.reach:,} this is meant for")
    return lines
