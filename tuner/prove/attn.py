"""`tuner check attn`: documents of a pack are isolated, attention is causal, and rotary scaling took effect."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tuner.check import DATA_PARTS, check
from tuner.config import loads
from tuner.engine.strategy import PRECISIONS
from tuner.engine.world import own_device, read_world
from tuner.model.attention import resolve_backend
from tuner.prove.documents import build_data, short_documents
from tuner.prove.isolation import Place, check_isolation
from tuner.prove.rotary import check_rotary
from tuner.prove.small_model import Family, build_small, narrow, read_family, write_model
from tuner.prove.sp import EXIT_DIFFERS, describe

NUM_DOCUMENTS = 5
LENGTH = 48  # tokens that they are shortened to, more or less


def check_attn(source: str, *, name: str = "config.py") -> int:
    """Print what was found; returns 0 where all claims hold, 2 where one does not.

    Args:
        source: the text of a config with all settings filled in; weights of its model are not needed.
        name: what error messages call the config.

    Raises:
        UserError: whatever the user can mend; a model that takes no packs at all.
    """
    started = time.monotonic()
    config = loads(source, name)
    check(config, DATA_PARTS)
    family = read_family(config)
    place, backend = where(config, family)
    print(f"{name}: does each document of a pack see itself alone, and turn as its config.json says?")
    print(f"  model   {describe(family)}")
    print(f"  runs    attention {backend} ({family.attention!r} in the config) on {place.device}, {place.dtype}")
    dataloader = build_data(config)
    documents = short_documents(dataloader, 10**9, length=LENGTH, most=NUM_DOCUMENTS)
    lengths = ", ".join(str(len(document.ids)) for document in documents)
    print(f"  data    a pack of the first {len(documents)} documents of training, of {lengths} tokens", flush=True)
    with tempfile.TemporaryDirectory(prefix="tuner-prove-") as directory:
        model = write_model(narrow(family), Path(directory) / "narrow")
        weights = torch.float64 if place.dtype == torch.float64 else torch.float32
        method = build_small(config, model, attention=backend, dtype=weights).to(place.device)
        claims = check_isolation(method, documents, place)
        print("\npacks")
        for claim in claims:
            mark = "ok" if claim.holds else "NO"
            print(f"  {mark}  {claim.text:58} {claim.found:8.1e}   allowed {claim.allowed:g}", flush=True)
        rotary = check_rotary(family, dataloader.dataset.max_length, Path(directory) / "one_head")
    print("\nrotary embedding")
    print(f"  {'ok' if rotary.is_good else 'NO'}  " + "\n      ".join(rotary.lines))
    is_good = rotary.is_good and all(claim.holds for claim in claims)
    seconds = f"{time.monotonic() - started:.0f} s"
    print(f"\n{'All of it holds.' if is_good else 'NOT all of it holds: see NO above.'} {seconds}")
    return 0 if is_good else EXIT_DIFFERS


def where(config: Any, family: Family) -> tuple[Place, str]:
    """The device of training with the attention that the config chooses there; float64 where that computes in it."""
    backend = family.attention if family.attention == "eager" else resolve_backend(family.attention)
    device = own_device(read_world())
    if device.type == "cpu" or backend in ("sdpa", "eager"):
        return Place(device, torch.float64), backend
    dtype = PRECISIONS[config.strategy.get("precision", "bf16")]
    return Place(device, torch.bfloat16 if dtype == torch.float32 else dtype), backend
