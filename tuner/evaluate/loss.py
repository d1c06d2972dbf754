"""`tuner evaluate loss`: held-out loss by position in the document, and by the document's length."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.chat.loading import TEMPLATE_NOTE, Source, find_source, load_tokenizer, read_note
from tuner.dataset.documents import UNCUT
from tuner.dataset.needle_grid import parse_lengths
from tuner.dataset.prepare import build_shards
from tuner.dataset.rendering import Rendering
from tuner.dataset.shards import Shards
from tuner.engine.aside import aside
from tuner.engine.scoring import alone, score_documents
from tuner.errors import UserError
from tuner.evaluate.buckets import Buckets, Row, as_values
from tuner.evaluate.loaded import load_method, refuse_overwriting, told, warn_of_length
from tuner.method.sft import SFT
from tuner.new_files import write_new

FILES = ("loss.json", "loss.png")


def evaluate_loss(
    model_dir: str,
    data: Sequence[str],
    *,
    out: Path,
    adapter: Path | None = None,
    template: str | None = None,
    pack_tokens: int = 16384,
    **asked: Any,
) -> None:
    """Score held-out documents, and write loss.json and loss.png to `out`, which must not hold them yet.

    Args:
        model_dir: what `tuner chat` takes.
        data: files as training takes them; scored is what training would train, each token with the weight 1.
        adapter: a LoRA on top of the model.
        template: chat template; None is the one that was trained, or fits the tokenizer.
        pack_tokens: in one pass; longer documents stand alone.
        asked: data_format, loss_on; max_length ("32k": documents are cut there) and bucket ("1k", the first one).

    Raises:
        UserError: what cannot be loaded or read.
    """
    refuse_overwriting(out, FILES)
    buckets = Buckets(one_number(asked["bucket"], "--bucket"))
    max_length = UNCUT if asked["max_length"] is None else one_number(asked["max_length"], "--max-length")
    if max_length < 2:
        raise UserError(
            f"--max-length {max_length}: a document needs at least 2 tokens, for nothing foretells the first."
        )
    source = find_source(model_dir, adapter)
    tokenizer = load_tokenizer(source)
    rendering = Rendering(template or noted_template(source), loss_on=asked["loss_on"])
    shards = build_shards(
        list(data),
        data_format=asked["data_format"],
        chat_template=rendering,
        tokenizer=tokenizer,
        max_length=max_length,
    )
    method = load_method(source, tokenizer)
    warn_of_length(method.llm, int(shards.lengths.max()), "The longest document")
    measure(method, shards, buckets, pack_tokens=pack_tokens)
    facts = {"model": model_dir, "adapter": str(adapter) if adapter else None, "data": list(data)}
    report(buckets, facts | {"max_length": None if max_length == UNCUT else max_length}, out)


def one_number(text: str, name: str) -> int:
    """`"32k"` -> 32768."""
    found = parse_lengths(text, name)
    if len(found) > 1:
        raise UserError(f"{name} {text}: expected one number of tokens, such as 32k.")
    return found[0]


def noted_template(source: Source) -> str:
    """What training noted beside the model or the adapter; else "auto"."""
    notes = [Path(place) / TEMPLATE_NOTE for place in source.places]
    found = [read_note(note)["chat_template"] for note in notes if note.is_file()]
    return next(filter(None, found), "auto")


def measure(method: SFT, shards: Shards, buckets: Buckets, *, pack_tokens: int) -> None:
    """Put every document into its buckets; the rate and the time left are told while it runs.

    Raises:
        UserError: a loss is not finite.
    """
    lengths = shards.lengths.tolist()
    with aside(method):
        found = score_documents(alone(method), lengths, shards.document, pack_tokens)
        for number, scores in told(found, lengths, "documents"):
            if not math.isfinite(float(scores.losses.sum())):
                raise UserError(
                    f"The loss of {shards.source(number)} is not finite: the model's weights are broken, or its "
                    "numbers too large for their precision. Nothing was written."
                )
            buckets.add(lengths[number], scores)


def report(buckets: Buckets, facts: Mapping[str, Any], out: Path) -> None:
    """The tables on the terminal, all numbers in loss.json, the curves in loss.png."""
    print("\n".join(table("tokens before", buckets.positions(), lambda low, high: f"{low:,} to {high - 1:,}")))
    print("\n".join(table("document length", buckets.lengths(), lambda low, high: f"{low + 1:,} to {high:,}")))
    print("\n".join(table("all", {(0, 0): buckets.all.row()}, lambda low, high: "")))
    nested = [
        {"above": edges[0], "to": edges[1], **as_values(row), "by_position": as_rows(buckets.of_length(edges), "from")}
        for edges, row in buckets.lengths().items()
    ]
    values = {**facts, "unit": "nats per token", **as_values(buckets.all.row())}
    values |= {"by_position": as_rows(buckets.positions(), "from"), "by_length": nested}
    data, picture = (out / name for name in FILES)
    write_new(data, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    draw(buckets, picture)
    print(f"\n{picture}  {data}")


def as_rows(rows: Mapping[tuple[int, int], Row], first: str) -> list[dict[str, Any]]:
    """Buckets for JSON."""
    return [{first: low, "to": high, **as_values(row)} for (low, high), row in rows.items()]


def table(title: str, rows: Mapping[tuple[int, int], Row], name: Callable[[int, int], str]) -> list[str]:
    """A line for each bucket."""
    lines = [
        "",
        f"{title:<22}{'tokens':>12}{'documents':>11}{'loss':>10}{'± error':>10}{'perplexity':>12}{'likeliest':>11}",
    ]
    for edges, row in rows.items():
        error = "-" if row.standard_error is None else f"{row.standard_error:.4f}"
        counts = f"{row.tokens:>12,}{row.documents:>11,}"
        lines.append(
            f"{name(*edges):<22}{counts}{row.loss:>10.4f}{error:>10}{row.perplexity:>12.4g}{row.accuracy:>11.1%}"
        )
    return lines


def draw(buckets: Buckets, path: Path) -> None:
    """Loss against position, of all documents and of those of each length; bars are two standard errors each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of start-up that only pictures need
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    positions, lengths = buckets.positions(), buckets.lengths()
    for edges in lengths:
        curve(
            left, buckets.width, buckets.of_length(edges), label=f"{edges[0] + 1:,} to {edges[1]:,} tokens", alpha=0.6
        )
    curve(left, buckets.width, positions, label="all documents", color="black", linewidth=2)
    curve(right, buckets.width, lengths, color="black")
    left.legend(fontsize="small")
    for axes, rows, name in ((left, positions, "tokens before"), (right, lengths, "tokens of the document")):
        axes.set_xticks(places(buckets.width, rows), [f"to {high:,}" for _, high in rows], rotation=45)
        axes.set_xlabel(name)
        axes.set_ylabel("loss, nats per token")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def places(width: int, rows: Mapping[tuple[int, int], Row]) -> list[int]:
    """The number of each bucket."""
    return [(low // width).bit_length() for low, _ in rows]


def curve(axes: Any, width: int, rows: Mapping[tuple[int, int], Row], **look: Any) -> None:
    """A point for each bucket."""
    losses = [row.loss for row in rows.values()]
    errors = [2 * (row.standard_error or 0.0) for row in rows.values()]
    axes.errorbar(places(width, rows), losses, yerr=errors, marker="o", markersize=3, capsize=2, **look)
