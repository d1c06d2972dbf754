"""`tuner evaluate needle`: whether a model finds sentences again, at each length and depth."""

import json
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tuner.chat.loading import find_source, load_llm, load_tokenizer
from tuner.dataset.needles import WORDINGS, Cell, Document, Haystack
from tuner.engine.heat_map import draw_maps, text_map
from tuner.errors import UserError
from tuner.method.recall import generated, packs, recall
from tuner.model.tokenizer import check_vocabulary


def parse_lengths(text: str) -> list[int]:
    """`"1k,4k,512"` -> [512, 1024, 4096]; k is 1,024."""
    try:
        found = {int(float(part[:-1]) * 1024) if part[-1] in "kK" else int(part) for part in text.split(",")}
    except (ValueError, IndexError, OverflowError):
        found = set()
    if not found or min(found) < 1:
        raise UserError(f"--lengths {text}: expected token counts such as 1k,4k,200k, where k is 1,024.")
    return sorted(found)


def parse_depths(text: str) -> list[float]:
    """`"0:100:10"` -> 0, 10, ... 100; `"0,50,100"` as it stands; percent of the haystack."""
    try:
        if ":" in text:
            begin, end, step = (float(part) for part in text.split(":"))
            found = [begin + i * step for i in range(int((end - begin) / step + 1e-9) + 1)]
        else:
            found = sorted({float(part) for part in text.split(",")})
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if not found or not all(0 <= depth <= 100 for depth in found):
        raise UserError(f"--depths {text}: expected FIRST:LAST:STEP or a list, in percent from 0 to 100.")
    return found


def parse_languages(text: str) -> list[str]:
    """`"en,zh"` -> ["en", "zh"]."""
    found = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in found if name not in WORDINGS]:
        raise UserError(f"--languages {text}: {unknown[0]!r} is not known. Known: {', '.join(WORDINGS)}.")
    return found


def evaluate_needle(
    model_dir: str,
    *,
    out: Path,
    lengths: str = "1k,4k",
    depths: str = "0:100:10",
    languages: str = "en,zh",
    adapter: Path | None = None,
    **options: Any,
) -> None:
    """Score every cell, and write needle.json and needle.png to `out`, which must not hold them yet.

    Args:
        model_dir: what `tuner chat` takes.
        options: num_needles, num_trials, haystack (files), mode ("logprob" or "generate"), seed, pack_tokens.

    Raises:
        UserError: what cannot be loaded or parsed, or needles longer than the haystack.
    """
    asked, places, spoken = parse_lengths(lengths), parse_depths(depths), parse_languages(languages)
    if taken := [name for name in ("needle.json", "needle.png") if (out / name).exists()]:
        raise UserError(f"{out / taken[0]} exists already, and nothing is overwritten. Choose another --out.")
    texts = [read_haystack(path) for path in options["haystack"]]
    source = find_source(model_dir, adapter)
    tokenizer = load_tokenizer(source)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    cells = [
        Cell(name, length, depth, trial)
        for length in asked
        for name in spoken
        for depth in places
        for trial in range(options["num_trials"])
    ]
    stacks = {
        name: Haystack(
            name,
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            seed=options["seed"],
            files=texts,
            prefix=prefix,
        )
        for name in spoken
    }
    for name in spoken:
        stacks[name].document(Cell(name, asked[0], 0.0), options["num_needles"])  # before the weights are loaded
    llm = load_llm(source)
    check_vocabulary(tokenizer, llm)
    warn_of_length(llm, asked[-1])
    rows = score(llm, stacks, cells, **{name: options[name] for name in ("num_needles", "mode", "pack_tokens")})
    report(rows, out)


def read_haystack(path: Path) -> str:
    """The text of a user's file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {path} cannot be read as UTF-8 text: {error}") from error


def warn_of_length(llm: PreTrainedModel, longest: int) -> None:
    """Say where the rotary embedding has never been trained."""
    positions = getattr(llm.config, "max_position_embeddings", None)
    if positions and longest > positions:
        warnings.warn(
            f"{longest:,} tokens are more than the {positions:,} positions of this model. Expect little beyond them; "
            "train at that length with a larger rope_theta, or with a scaling such as YaRN.",
            stacklevel=2,
        )


def score(
    llm: PreTrainedModel,
    stacks: dict[str, Haystack],
    cells: Sequence[Cell],
    *,
    num_needles: int,
    mode: str,
    pack_tokens: int,
) -> list[dict[str, Any]]:
    """A row for each cell; the rate and the time left are told while it runs."""
    rows: list[dict[str, Any]] = []
    began = told = time.monotonic()
    total = sum(cell.length for cell in cells)
    done = 0
    for pack in packs([cell.length for cell in cells], pack_tokens):
        chosen = [cells[index] for index in pack]
        documents = [stacks[cell.language].document(cell, num_needles) for cell in chosen]
        rows += scored_rows(llm, chosen, documents, mode)
        done += sum(cell.length for cell in chosen)
        now = time.monotonic()
        if now - told > 2 or done == total:
            rate = done / max(now - began, 1e-9)
            left = (total - done) / rate
            print(f"  {len(rows)} of {len(cells)} cells, {rate:,.0f} tokens/s, {left:.0f} s left", flush=True)
            told = now
    return rows


def scored_rows(
    llm: PreTrainedModel, cells: Sequence[Cell], documents: Sequence[Document], mode: str
) -> list[dict[str, Any]]:
    """What is kept of each cell of a pack."""
    rows = []
    for cell, document, found in zip(cells, documents, recall(llm, documents)):
        row = {**cell._asdict(), **found._asdict()}
        if mode == "generate":
            row["generated"] = generated(llm, document)
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The maps on the terminal and as needle.png, all cells in needle.json."""
    column = "generated" if "generated" in rows[0] else "accuracy"
    sums: dict[str, dict[tuple[int, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        sums[row["language"]][row["length"], row["depth"]].append(row[column])
    grids = {name: {key: sum(found) / len(found) for key, found in cells.items()} for name, cells in sums.items()}
    for name, grid in grids.items():
        print(f"\n{name}: answers that are {'generated' if column == 'generated' else 'the likeliest'}")
        print("\n".join(text_map(grid)))
    out.mkdir(parents=True, exist_ok=True)
    (out / "needle.json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    draw_maps(grids, out / "needle.png")
    print(f"\n{out / 'needle.png'}  {out / 'needle.json'}")
