"""Documents in groups by source and length, for a mixture to give each its share of the tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tuner.dataset.packing import IntArray
from tuner.errors import UserError


class Groups(NamedTuple):
    """Documents group by group: group g is order[starts[g]:starts[g + 1]], and weighs weights[g]."""

    order: IntArray  # (documents,) numbers of documents
    starts: list[int]
    weights: list[float]
    names: list[str]


def group(
    lengths: IntArray, starts: Sequence[int], weights: Sequence[float], names: Sequence[str],
    buckets: Mapping[int, float],
) -> Groups:  # fmt: skip
    """Documents starts[s] to starts[s + 1] are of source s; buckets: most tokens of a document -> share of the tokens.

    Each bucket has its share; inside it sources have theirs by weight, those that have such documents.

    Raises:
        UserError: a bucket without documents.
    """
    limits = sorted(buckets)
    source = np.searchsorted(starts, np.arange(len(lengths)), side="right") - 1
    bucket = np.searchsorted(limits, lengths)
    number = bucket * len(weights) + source
    order = np.argsort(number, kind="stable")
    counts = np.bincount(number, minlength=len(limits) * len(weights)).reshape(len(limits), len(weights))
    empty = [place for place, found in enumerate(counts.sum(1)) if not found]
    if empty:
        low = limits[empty[0] - 1] + 1 if empty[0] else 1
        raise UserError(
            f"No document has {low:,} to {limits[empty[0]]:,} tokens, but a bucket asks for "
            f"{buckets[limits[empty[0]]]:g} of the tokens from such. Leave it out, or add a source that has some."
        )
    present = counts > 0
    by_weight = present * np.array(weights, np.float64)
    shares = np.array([buckets[limit] for limit in limits])[:, None] * by_weight / by_weight.sum(1, keepdims=True)
    told = [f"{name} to {limit:,}" for limit in limits for name in names]
    kept = np.flatnonzero(present.ravel())
    sizes = counts.ravel()[kept]
    return Groups(
        order,
        [0, *np.cumsum(sizes).tolist()],
        shares.ravel()[kept].tolist(),
        [told[place] for place in kept],
    )
