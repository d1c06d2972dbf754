"""LoRA weights of old .pth files as an adapter in peft's own format."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.convert.layout import Source, piece_of
from tuner.convert.settings import write_json
from tuner.convert.tensors import Piece
from tuner.errors import UserError

LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
TRAINED = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.modules_to_save\.default\.(?P<kind>weight|bias)")
ALPHA = re.compile(r"\blora_alpha\s*=\s*(\d+(?:\.\d+)?)\b")
PEFT = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
MAX_TEXT = 1 << 20  # characters of a config in a checkpoint that are looked through


def is_adapter(weights: Mapping[str, Source]) -> bool:
    """Whether there are LoRA weights among them."""
    return any(LORA.fullmatch(name) for name in weights)


def adapter_pieces(weights: Mapping[str, Source]) -> tuple[list[Piece], dict[str, Any], int]:
    """LoRA weights and modules trained whole, by peft's names.

    Returns:
        pieces, what adapter_config.json says of them but lora_alpha, and how many other tensors were left out.

    Raises:
        UserError: one of a pair is missing, or two that do not fit each other.
    """
    pieces: list[Piece] = []
    sides: dict[str, dict[str, tuple[int, ...]]] = {"A": {}, "B": {}}
    whole = set()
    for name, source in weights.items():
        if match := LORA.fullmatch(name):
            sides[match["side"]][match["module"]] = source.shape
            pieces.append(piece_of(f"{PEFT}{match['module']}.lora_{match['side']}.weight", source))
        elif match := TRAINED.fullmatch(name):
            whole.add(match["module"].rpartition(".")[2])
            pieces.append(piece_of(f"{PEFT}{match['module']}.{match['kind']}", source))
    if alone := sorted(sides["A"].keys() ^ sides["B"].keys()):
        raise UserError(f"Of the LoRA weights of {alone[0]} one of lora_A and lora_B is missing. Copy the file again.")
    ranks = {module: shape[0] for module, shape in sides["A"].items()}
    for module, rank in ranks.items():
        if len(sides["A"][module]) != 2 or sides["B"][module][1:] != (rank,):
            raise UserError(f"lora_A and lora_B of {module} do not fit: {sides['A'][module]}, {sides['B'][module]}.")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != usual},
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return pieces, settings, len(weights) - len(pieces)


def changed_shapes(pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that an adapter's tensors change, or stand in the place of, by the base's names."""
    shapes = {piece.name.removeprefix(PEFT): piece.shape for piece in pieces}
    found = {name: shape for name, shape in shapes.items() if ".lora_" not in name}
    for name in shapes:
        module, mark, _ = name.partition(".lora_A.")
        if mark:
            found[f"{module}.weight"] = (shapes[f"{module}.lora_B.weight"][0], shapes[name][1])
    return found


def find_alpha(texts: list[str]) -> float:
    """The one lora_alpha that the configs in a checkpoint state; they are looked through, never executed.

    Raises:
        UserError: none does, or they state several.
    """
    found = {float(value) for text in texts for value in ALPHA.findall(text[:MAX_TEXT])}
    if len(found) != 1:
        said = f"states several: {sorted(found)}" if found else "does not state it"
        raise UserError(f"LoRA weights need their lora_alpha, and the file {said}. Give it: --lora-alpha 16")
    return found.pop()


def write_adapter_config(out: Path, settings: Mapping[str, Any], alpha: float, base: Path | None) -> None:
    """adapter_config.json as peft reads it."""
    whole = int(alpha) if alpha == int(alpha) else alpha
    write_json(out / CONFIG, {**settings, "lora_alpha": whole, "base_model_name_or_path": str(base or "")})
