"""Model directories: what one must hold before anything is loaded, and what to do where it does not."""

import json
from pathlib import Path

from tuner.errors import UserError
from tuner.nearest import did_you_mean

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS_POINTER = b"version https://git-lfs"


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant for this machine, not for the hub's `name` or `owner/name`."""
    return path.startswith(("/", ".", "~")) or path.endswith("/") or path.count("/") > 1


def check_model_directory(path: str) -> None:
    """Refuse a place that holds no model.

    Raises:
        UserError: it is missing, a file, without config.json, or a LoRA adapter.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"There is no model directory {path!r}.{nearest_directory(place)}")
    if not place.is_dir():
        raise UserError(f"{path!r} is a file. Give the directory that holds {CONFIG} and the weights.")
    if (place / ADAPTER).exists():
        raise UserError(
            f"{path!r} holds an adapter ({ADAPTER}), which would be applied unasked. Give the directory of the base "
            "model, or merge the adapter into it first."
        )
    if not (place / CONFIG).exists():
        inside = sorted(str(found.parent) for found in place.glob(f"*/{CONFIG}"))
        hint = f" Did you mean {' or '.join(map(repr, inside[:3]))}?" if inside else ""
        raise UserError(f"{path!r} has no {CONFIG}, so it is no model directory.{hint}")


def check_weights(path: str) -> None:
    """Refuse a model directory whose weights cannot be read, or only by running the code in a pickle.

    Raises:
        UserError: no weights, only pickles, missing shards, git-lfs pointers in their place, or an index or links that
            lead out of the directory.
    """
    place = Path(path)
    if not (place / WEIGHTS).exists() and not (place / WEIGHTS_INDEX).exists():
        raise UserError(_without_safetensors(place))
    shards = _shards(place)
    for name in shards:
        check_inside(place, name)
    if absent := [name for name in shards if not (place / name).exists()]:
        raise UserError(
            f"{path!r} lacks {len(absent)} of its {len(shards)} weight files ({', '.join(absent[:3])}). "
            "The download is incomplete: fetch them again."
        )
    for name in shards:
        with open(inside(place, name), "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        if is_pointer:
            raise UserError(f"{str(place / name)!r} is a git-lfs pointer, not weights. Run `git lfs pull` in {path!r}.")


def weight_files(path: str) -> list[Path]:
    """The files of a model directory that hold its weights. Raises UserError as `check_weights` does."""
    check_weights(path)
    return [Path(path) / name for name in _shards(Path(path))]


def check_inside(directory: Path, name: str) -> None:
    """Refuse a name in an index by which a file elsewhere, or one of another kind, would be read."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(
            f"{str(directory / WEIGHTS_INDEX)!r} names {name!r}. Only safetensors files beside it are read, by their "
            "plain names."
        )


def inside(directory: Path, name: str) -> Path:
    """The path of a file of the directory; a link is followed only inside the hub's own cache.

    Raises:
        UserError: it is a link that leads anywhere else.
    """
    path = directory / name
    if not path.is_symlink():
        return path
    target, snapshot = path.resolve(), directory.resolve()
    blobs = snapshot.parent.parent / "blobs"  # models--OWNER--NAME/snapshots/COMMIT/FILE -> .../blobs/HASH
    if snapshot.parent.name == "snapshots" and target.parent == blobs:
        return path
    raise UserError(f"{path} is a link to {target}. Give a directory that holds the files themselves.")


def nearest_directory(missing: Path) -> str:
    """A sentence with the names beside `missing` that resemble it, or which part of the path exists; may be empty."""
    parent = missing.parent
    if not parent.is_dir():
        existing = next((above for above in parent.parents if above.is_dir()), None)
        return f" Of its path, {str(existing)!r} exists." if existing not in (None, Path("."), Path("/")) else ""
    return did_you_mean(missing, (entry for entry in parent.iterdir() if entry.is_dir()))


def _shards(place: Path) -> list[str]:
    if (place / WEIGHTS).exists():
        return [WEIGHTS]
    try:
        weight_map = json.loads(inside(place, WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(place / WEIGHTS_INDEX)!r} is no index of weights: {error!r}. Fetch it again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{str(place / WEIGHTS_INDEX)!r} names no file for each weight. Fetch it again.")
    return sorted(set(weight_map.values()))


def _without_safetensors(place: Path) -> str:
    pickles = sorted(found.name for pattern in PICKLES for found in place.glob(pattern))
    if not pickles:
        return (
            f"{str(place)!r} has no weights ({WEIGHTS} or {WEIGHTS_INDEX}). Use weights='random' to start from "
            "scratch, or fetch the weights."
        )
    return (
        f"{str(place)!r} has its weights only as pickles ({', '.join(pickles[:3])}), which run code when opened; only "
        f"safetensors are read. Fetch the safetensors, or convert the directory:\n"
        f"tuner convert legacy {place} OUT --base {place} --allow-legacy-pickle"
    )
