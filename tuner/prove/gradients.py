"""Two gradients of the same step, parameter by parameter: ratio, cosine, and how far they are apart."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

Gradients = Mapping[str, torch.Tensor]


class Tolerance(NamedTuple):
    """What arithmetic in a dtype may make of a gradient."""

    apart: float  # relative
    negligible: float
    """of the whole gradient's norm: what a parameter is measured by that has less, as a bias whose gradient vanishes"""

    def holds(self, apart: float) -> bool:
        """Whether a relative difference is no more than rounding; NaN is not."""
        return apart <= self.apart


EXACT = Tolerance(1e-9, 1e-6)  # float64
ROUNDED = Tolerance(3e-5, 1e-2)  # float32, which by itself makes 1e-6 to 4e-6 of it, by the family


class Difference(NamedTuple):
    """Of one parameter: |got| / |expected|, their cosine, and |got - expected| / |expected|."""

    name: str
    ratio: float
    cosine: float
    apart: float


def compare(got: Gradients, expected: Gradients, tolerance: Tolerance = EXACT) -> list[Difference]:
    """One for each parameter that either has a gradient for; both are in float64."""
    least = tolerance.negligible * norm(torch.stack([norm(gradient) for gradient in expected.values()])).item()
    found = []
    for name in dict.fromkeys([*expected, *got]):
        own, meant = got.get(name), expected.get(name)
        zero = torch.zeros_like(own if meant is None else meant)
        found.append(_difference(name, zero if own is None else own, zero if meant is None else meant, least))
    return found


def _difference(name: str, own: torch.Tensor, meant: torch.Tensor, least: float) -> Difference:
    own_norm, meant_norm = norm(own).item(), norm(meant).item()
    apart = norm(own - meant).item() / max(meant_norm, least)
    if own_norm == meant_norm == 0:
        return Difference(name, 1.0, 1.0, apart)
    ratio = own_norm / meant_norm if meant_norm else math.inf
    cosine = (own.flatten() @ meant.flatten()).item() / (own_norm * meant_norm) if own_norm * meant_norm else 0.0
    return Difference(name, ratio, cosine, apart)


def norm(gradient: torch.Tensor) -> torch.Tensor:
    """() L2 norm, in float64."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64)


def worst(found: Iterable[Iterable[Difference]]) -> list[Difference]:
    """Of what several ranks found: for each parameter the one that is farthest off, those first that are farthest."""
    by_name: dict[str, Difference] = {}
    for difference in (difference for ranks in found for difference in ranks):
        known = by_name.get(difference.name)
        if known is None or not difference.apart <= known.apart:
            by_name[difference.name] = difference
    return sorted(by_name.values(), key=lambda difference: (not math.isnan(difference.apart), -difference.apart))


def table(differences: list[Difference], num_rows: int) -> list[str]:
    """The first ones as lines, and one about the others."""
    shown, others = differences[:num_rows], differences[num_rows:]
    width = max(len(difference.name) for difference in shown)
    lines = [f"  {'':{width}}  {'ratio':>15}  {'cosine':>15}  {'apart':>8}"]
    lines += [
        f"  {name:{width}}  {ratio:15.12f}  {cosine:15.12f}  {apart:8.1e}" for name, ratio, cosine, apart in shown
    ]
    if others:
        lines.append(f"  {f'{len(others)} more, at most':{width}}  {'':15}  {'':15}  {others[0].apart:8.1e}")
    return lines
