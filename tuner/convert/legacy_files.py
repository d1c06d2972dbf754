"""Weights by name in old files: of torch.save, mmengine and XTuner, in directories of .bin files and DeepSpeed's."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.convert.config_fit import hollow_model, listed, other_shapes
from tuner.convert.layout import Source
from tuner.convert.pickled import PickledTensor, read_pickle
from tuner.convert.zero_files import MODEL_FILE, read_zero
from tuner.errors import UserError
from tuner.model.directory import inside
from tuner.model.hollow import stored_names

INSIDE = ("state_dict", "module", "model")
"""where a file of mmengine, DeepSpeed or others has its weights, unless it is nothing but weights"""
WRAPPERS = ("module.", "llm.")
"""before all names: torch's class around a model, XTuner's method inside it"""
PARTS = ("pytorch_model*.bin", "pytorch_model*.pt")
LATEST = "latest"
MAX_NESTING = 6  # dicts and lists in which texts of a config are looked for


def read_weights(source: Path) -> tuple[dict[str, Source], list[str]]:
    """Weights by the language model's own names, and all texts that stand beside them; no value is read.

    Raises:
        UserError: a file is damaged or refused, holds no weights by name, or more than a language model.
    """
    weights, texts = read_named(source)
    return unwrapped(weights, source), texts


def read_named(source: Path) -> tuple[dict[str, Source], list[str]]:
    """Weights by the names in the file or directory, and all texts that stand beside them."""
    if source.is_dir():
        return read_directory(source)
    content = read_pickle(source)
    if not isinstance(content, dict):
        raise UserError(f"{source} holds a {type(content).__name__}, no weights by name.")
    inside = next((content[key] for key in INSIDE if isinstance(content.get(key), dict)), content)
    weights = {name: tensor for name, tensor in inside.items() if isinstance(tensor, PickledTensor)}
    if not weights or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f"{source} holds no weights by name; it has {', '.join(str(key)[:40] for key in list(content)[:8])}. "
            f"Known are files of weights alone, and those with {' or '.join(INSIDE[:2])}. For a file of DeepSpeed give "
            "its directory."
        )
    return named(weights), list(texts_in(content))


def read_directory(source: Path) -> tuple[dict[str, Source], list[str]]:
    """A checkpoint of DeepSpeed, a directory that has one, or one of pytorch_model.bin files."""
    if any(MODEL_FILE.fullmatch(path.name) for path in source.iterdir()):
        weights, states = read_zero(source)
        return weights, list(texts_in({key: states[key] for key in ("meta",) if key in states}))
    latest = source / LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or not (source / name).is_dir() or (source / name).is_symlink():
            raise UserError(f"{latest} names {name[:80]!r}, no directory beside it. Give the directory itself.")
        return read_directory(source / name)
    files = sorted({path for pattern in PARTS for path in source.glob(pattern)})
    if not files:
        raise UserError(
            f"{source} has no *_model_states.pt of DeepSpeed, no {LATEST} and no pytorch_model*.bin. Give the "
            "directory that has them, or a file."
        )
    found: dict[str, Source] = {}
    for path in files:
        weights, _ = read_named(inside(source, path.name))
        if twice := sorted(found.keys() & weights.keys()):
            raise UserError(f"{path} has {twice[0]} a second time. Leave only the files of one model in {source}.")
        found |= weights
    check_index(source, found, files)
    return found, []


def check_index(source: Path, found: Mapping[str, Source], files: list[Path]) -> None:
    """All that an index beside the files names must be there; it opens no file."""
    for path in source.glob("pytorch_model*.bin.index.json"):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted(set(index) - set(found))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no index of weights: {error!r}. Copy it again.") from error
        if missing:
            raise UserError(f"{path} names {missing[0]}, which none of the {len(files)} files has. Copy them again.")


def named(weights: Mapping[str, PickledTensor]) -> dict[str, Source]:
    """Tensors that know their names, for messages."""
    return {name: replace(tensor, name=name) for name, tensor in weights.items()}


def texts_in(content: Any, depth: int = 0) -> Iterator[str]:
    """All texts in dicts and lists of a file; among them the config that trained it."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)) and depth < MAX_NESTING:
        for value in content.values() if isinstance(content, dict) else content:
            yield from texts_in(value, depth + 1)


def unwrapped(weights: Mapping[str, Source], source: Path) -> dict[str, Source]:
    """Names without what stands before all of them; UserError where there is more than a language model."""
    for prefix in WRAPPERS:
        if any(name.startswith(prefix) for name in weights):
            others = [name for name in weights if not name.startswith(prefix)]
            if others:
                raise UserError(
                    f"{source} holds more than a language model: {', '.join(sorted(others)[:3])} beside {prefix}*. "
                    "Only language models are converted."
                )
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def fitted(weights: Mapping[str, Source], base: Path, source: Path) -> dict[str, Source]:
    """The weights that the base's architecture has; UserError listing what is missing, unknown or of another shape."""
    llm = hollow_model(base)
    expected, repeated = stored_names(llm), set(llm.state_dict())
    computed = {name for name in weights if name.endswith("inv_freq")}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in repeated | set(expected) | computed]
    problems += other_shapes({name: weight.shape for name, weight in weights.items()}, expected)
    if problems:
        raise UserError(f"The weights of {source} do not fit {base / 'config.json'}: {listed(problems)}.")
    return {name: weights[name] for name in expected}


def check_changes(shapes: Mapping[str, tuple[int, ...]], base: Path, source: Path) -> None:
    """Refuse LoRA weights of another model than `base`; `shapes` are those of the weights that they change."""
    expected = stored_names(hollow_model(base))
    problems = [f"no {name}" for name in shapes if name not in expected] + other_shapes(shapes, expected)
    if problems:
        raise UserError(f"{source} has an adapter for another base than {base}: {listed(problems)}.")
