"""README.md of a converted model: recipe, data and loss as the run recorded them; no path or secret of its maker."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.engine.checkpoint import read_manifest

WIDE = 12  # losses in the table
NAMES = re.compile(r"[\w.\-]+(?:/[\w.\-]+)?")
CLOSED = (
    "precision", "attention", "weights", "chat_template", "loss_on", "parallel_tool_calls", "too_long", "on_bad_row",
    "data_format", "deepspeed", "fsdp", "optimizer", "lora_variant", "quantise", "on_nonfinite",
)  # fmt: skip
"""settings whose words are choices; the text of any other may be private and is not told"""


def write_card(checkpoint: Path, out: Path, name: str) -> None:
    """Write README.md from what lies in a checkpoint and, where it is still in one, in its work dir."""
    settings = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["settings"]
    manifest, work_dir = read_manifest(checkpoint), checkpoint.parent.parent
    losses = read_losses(work_dir, manifest["step"])
    (out / "README.md").write_text(card(name, settings, manifest, read_ledger(work_dir), losses), encoding="utf-8")


def card(
    name: str,
    settings: Mapping[str, Any],
    manifest: Mapping[str, Any],
    ledger: Mapping[str, Any] | None,
    losses: list[tuple[int, float]],
) -> str:
    """The text, in Markdown with the front matter of the hub."""
    base = model_name(str(settings.get("model_path", "")))
    began = "drawn at random" if settings.get("weights") == "random" else f"those of `{base}`"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- tuner\n---",
        f"# {name}",
        f"Trained with tuner for {manifest['step']:,} optimizer steps. The first weights were {began}.",
        "## Recipe",
        table(("setting", "value"), [(key, told(key, value)) for key, value in settings.items()]),
        "## Data",
        ledger_text(ledger),
        "## Loss",
        loss_text(losses),
        "## Versions",
        table(("package", "version"), list(manifest["versions"].items())),
        "`conversion.json` has the sha256 of each tensor and says what was checked when this directory was written.",
    ]
    return "\n\n".join(parts) + "\n"


def told(key: str, value: Any) -> str:
    """A setting's value as others may see it: numbers and choices; of a path its last part; of other text nothing."""
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if key == "model_path":
        return model_name(value)
    if key == "data_path":
        return ", ".join(source_name(source) for source in (value if isinstance(value, list) else [value]))
    if isinstance(value, str) and key in CLOSED:
        return Path(value).name
    if isinstance(value, list) and all(isinstance(entry, bool | int | float) for entry in value):
        return str(value)
    return "(text)" if value else str(value)


def model_name(path: str) -> str:
    """A name on the hub as it is, of a directory its last part."""
    return path if NAMES.fullmatch(path) and not Path(path).exists() else Path(path).name


def source_name(source: Any) -> str:
    """A file's name without its directory."""
    return Path(str(source["path"] if isinstance(source, Mapping) else source)).name


def read_ledger(work_dir: Path) -> dict[str, Any] | None:
    """What became of every token of the data; None where the checkpoint was taken out of its work dir."""
    path = work_dir / "ledger.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def ledger_text(ledger: Mapping[str, Any] | None) -> str:
    """Rows and tokens, and each source's part."""
    if ledger is None:
        return "Not recorded: the checkpoint was converted outside of its work dir."
    counts = [(key, f"{ledger[key]['documents']:,}", f"{ledger[key]['tokens']:,}")
              for key in ("read", "dropped", "untrained", "truncated", "kept")]  # fmt: skip
    counts += [(key, "", f"{ledger[key]:,}") for key in ("masked", "trained")]
    sources = [
        (source_name(entry["source"]), f"{entry['drawn_documents']:,}", f"{entry['drawn_tokens']:,}")
        for entry in ledger["sources"]
    ]
    said = f"{ledger['rows']:,} rows were read, {ledger['skipped']:,} of them skipped. What is masked is not trained."
    of_all = table(("of all sources", "documents", "tokens"), counts)
    return "\n\n".join([said, of_all, table(("source", "documents an epoch", "tokens an epoch"), sources)])


def read_losses(work_dir: Path, last_step: int) -> list[tuple[int, float]]:
    """(step, loss) of the steps up to the checkpoint; empty where nothing is recorded."""
    path = work_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in lines if line["step"] <= last_step]


def loss_text(losses: list[tuple[int, float]]) -> str:
    """About WIDE of the steps, first and last among them."""
    if not losses:
        return "Not recorded: the checkpoint was converted outside of its work dir."
    places = sorted({round(place * (len(losses) - 1) / (WIDE - 1)) for place in range(WIDE)})
    return table(
        ("step", "loss (nats per trained token)"), [(f"{losses[p][0]:,}", f"{losses[p][1]:.4f}") for p in places]
    )


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """In Markdown; whatever is in a cell stays in it."""
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
