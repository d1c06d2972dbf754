"""What each source contributes to an epoch: its documents and tokens, and how often it is gone through."""

from typing import Any

import numpy as np

from tuner.dataset.ordering import pieces
from tuner.dataset.packing import Packs
from tuner.dataset.shards import Shards
from tuner.errors import UserError


def share_starts(shards: Shards) -> list[int]:
    """The first document of each weighted source, and the end. Raises UserError for a source without documents."""
    files = np.cumsum([0, *(share.num_files for share in shards.shares)])
    starts: list[int] = shards.starts[files].tolist()
    empty = [share.name for share, start, end in zip(shards.shares, starts, starts[1:]) if start == end]
    if empty:
        raise UserError(
            f"No document is left of {', '.join(empty)}, which has a weight: see the token ledger. "
            "Mend the source, or leave it out."
        )
    return starts


def contributions(shards: Shards, packs: Packs) -> list[dict[str, Any]]:
    """A dict for each weighted source, or each file where none has a weight; JSON values, for the ledger of a run.

    `documents` and `tokens` are what the source holds, `drawn_*` what an epoch (of these packs) takes of it, `share`
    its part of the epoch's tokens, `passes` how often it is gone through, `weight` what it was given.
    """
    names = [share.name for share in shards.shares] or [str(file) for file in shards.sources]
    weights: list[float | None] = [share.weight for share in shards.shares]
    weights = weights or [None] * len(names)
    starts = share_starts(shards) if shards.shares else shards.starts.tolist()
    drawn, drawn_tokens = np.zeros((2, len(names)), np.int64)
    for piece in pieces(len(packs.documents)):
        lengths = shards.lengths[packs.documents[piece]]
        sources = np.searchsorted(starts, packs.documents[piece], side="right") - 1
        drawn += np.bincount(sources, minlength=len(names))
        drawn_tokens += np.bincount(sources, weights=lengths, minlength=len(names)).astype(np.int64)
    total = int(drawn_tokens.sum())
    rows = []
    for place, (name, weight) in enumerate(zip(names, weights)):
        start, end = starts[place : place + 2]
        tokens = int(shards.lengths[start:end].sum())
        rows.append({
            "source": name, "weight": weight, "documents": end - start, "tokens": tokens,
            "drawn_documents": int(drawn[place]), "drawn_tokens": int(drawn_tokens[place]),
            "share": int(drawn_tokens[place]) / total,
            "passes": int(drawn_tokens[place]) / tokens if tokens else 0.0,
        })  # fmt: skip
    return rows


def contributions_table(rows: list[dict[str, Any]]) -> str:
    """For a person: a line for each source."""
    head = f"{'source':<40}{'weight':>10}{'tokens':>16}{'an epoch':>16}{'share':>9}{'passes':>9}"
    lines = [
        f"{row['source'][-39:]:<40}{row['weight']:>10g}{row['tokens']:>16,}{row['drawn_tokens']:>16,}"
        f"{row['share']:>9.2%}{row['passes']:>9.2f}"
        for row in rows
    ]
    return "\n".join([head, *lines])
