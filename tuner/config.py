"""Names to configs: presets, the resolved source of a run, and dotted options on top of it."""

import ast
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tuner.configs import literals, long_context
from tuner.configs.models import MODELS, Model
from tuner.configs.options import find
from tuner.errors import UserError
from tuner.nearest import did_you_mean, did_you_mean_or_all

RECIPE_DIR = Path(__file__).parent / "configs" / "recipes"
RECIPES = {path.stem: path for path in sorted(RECIPE_DIR.glob("*.py"))}
NAMES_OF_CONFIGS = {"model", "strategy", "tokenizer", "train_dataloader"}
OPTIONS_HEADING = "# from --cfg-options"


class Preset(NamedTuple):
    """A recipe with the settings of a model filled in, and of a plan for long context where there is a `header`."""

    name: str
    recipe: str
    model: Model
    planned: Mapping[str, object] = MappingProxyType({})
    hardware: str = ""
    header: str = ""

    @property
    def settings(self) -> dict[str, object]:
        """What the model's row changes in the recipe."""
        return {**self.model.settings, **self.model.recipes.get(self.recipe, {}), **self.planned}

    @property
    def source(self) -> str:
        """The recipe's text with this model's literals."""
        source = literals.replace(RECIPES[self.recipe].read_text(encoding="utf-8"), self.settings, self.name)
        if not self.header:
            return source
        quotes = '"""'
        _, _, rest = source.split(quotes, 2)
        return quotes + self.header + "\n" + quotes + rest


class Description(NamedTuple):
    """What `tuner list-cfg` shows of a preset; `state` is the memory of weights, gradients and Adam."""

    name: str
    summary: str
    model: str
    context: str
    hardware: str
    state: str


PRESETS: dict[str, Preset] = {
    f"{model}-{recipe}": Preset(f"{model}-{recipe}", recipe, row) for model, row in MODELS.items() for recipe in RECIPES
}
PRESETS |= {
    name: Preset(
        name,
        long_context.RECIPE,
        MODELS[model],
        planned=long_context.default(model).settings,
        hardware=long_context.hardware(model),
        header=long_context.header(model),
    )
    for model in long_context.PLANS
    for name in [f"{model}-sft_long"]
}


def list_presets(pattern: str = "") -> list[Description]:
    """A description of each preset whose line contains `pattern`, in any case; `*` and `?` stand for any characters."""
    wanted = f"*{pattern.lower()}*"
    descriptions = [describe(preset) for preset in PRESETS.values()]
    return [row for row in descriptions if fnmatchcase("  ".join(row).lower(), wanted)]


def describe(preset: Preset) -> Description:
    """One line about a preset, from the recipe's docstring, the model's row and the filled-in settings."""
    summary, defaults = recipe_facts(preset.recipe)
    summary = preset.header.partition(":")[0] or summary
    model, settings = preset.model, {**defaults, **preset.settings}
    context, state = str(settings["max_length"]), f"{model.gigabytes(settings):.1f} GB"
    hardware = preset.hardware or model.meant_for(settings)
    return Description(preset.name, summary, model.about, context, hardware, state)


@cache
def recipe_facts(recipe: str) -> tuple[str, dict[str, object]]:
    """First words of a recipe's docstring, and its own settings."""
    source = RECIPES[recipe].read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return docstring.partition(":")[0], {name: setting.value for name, setting in literals.settings(source).items()}


def read_source(name_or_path: str | Path) -> str:
    """The text of a preset or of a config file; an unknown name is a UserError with the nearest presets."""
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name].source
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{name} is a directory; give a config file in it, such as {path / 'config.py'}.")
    if path.suffix != ".py":
        raise UserError(f"Unknown preset {name}.{did_you_mean_or_all(name, PRESETS)} A config file ends in .py.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"There is no config file {name}.{nearest_file(path)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error


def nearest_file(path: Path) -> str:
    """The files beside a missing one that are named like it."""
    beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
    if beside:
        return did_you_mean(path, beside) or f" Beside it: {', '.join(sorted(beside))}."
    return " `tuner copy-cfg PRESET DIR` writes one to begin with."


def render(name_or_path: str | Path, settings: Mapping[str, object]) -> str:
    """The runnable text of a preset or file with its literal settings replaced.

    Raises:
        UserError: unknown preset or setting (with the nearest names), syntax error, value of a wrong type.
    """
    source = read_source(name_or_path)
    literals.parse(source, str(name_or_path))
    return literals.replace(source, settings, str(name_or_path))


def load(path: str | Path) -> Any:
    """A config file as mmengine's Config; types are imported when they are looked at, not before.

    Raises:
        UserError: with file and line, for whatever goes wrong in the file.
    """
    from mmengine.config import Config

    source = read_source(path)
    refuse_inheritance(source, str(path))
    assigned = {name for name, _, _ in literals.assignments(literals.parse(source, str(path)))}
    try:
        return Config.fromfile(str(path), lazy_import=True, format_python_code=False)
    except Exception as error:
        if not assigned & NAMES_OF_CONFIGS:
            raise UserError(
                f"{path} is no config: it assigns none of {', '.join(sorted(NAMES_OF_CONFIGS))}. "
                "`tuner copy-cfg PRESET DIR` writes one to begin with."
            ) from error
        raise UserError(f"{path}{line_of(error, str(path))}: {type(error).__name__}: {error}") from error


def loads(source: str, filename: str = "config.py") -> Any:
    """`load` for a text that is not in a file yet; `filename` is what error messages call it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.py"
        path.write_text(source, encoding="utf-8")
        try:
            config = load(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), filename)) from error
    rename(config._cfg_dict, str(path), filename)
    return config


def rename(node: Any, old: str, new: str) -> None:
    """Say `new` for the file `old` where a type that is not imported yet notes where it was named."""
    from mmengine.config.lazy import LazyAttr, LazyObject

    for part in dict.values(node) if isinstance(node, dict) else node:  # ConfigDict's own values() would import
        if isinstance(part, (dict, list, tuple)):
            rename(part, old, new)
        elif isinstance(part, (LazyObject, LazyAttr)) and part.location is not None:
            part.location = part.location.replace(old, new)


def refuse_inheritance(source: str, filename: str) -> None:
    """A base file would put what is derived from a setting out of the setting's reach."""
    nodes = list(ast.walk(literals.parse(source, filename)))
    lines = [node.lineno for node in nodes if isinstance(node, ast.Name) and node.id in ("_base_", "read_base")]
    lines += [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    if lines:
        raise UserError(
            f"{filename}:{min(lines)}: a config of tuner is one self-contained file, without base files or relative "
            "imports. `tuner copy-cfg PRESET DIR` writes a complete one."
        )


def line_of(error: BaseException, filename: str) -> str:
    """`:12` where the traceback passes line 12 of the file, else nothing."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def add_options(source: str, options: Mapping[str, object], filename: str = "config") -> str:
    """The text with options such as `optim_wrapper.optimizer.lr` written into it.

    A setting's name replaces the literal, so that what is derived follows; a dotted path becomes an assignment at the
    end of the file. There, what several parts of the assembly share is still one object, and changes in all of them.

    Raises:
        UserError: a path that leads nowhere (with the nearest names) or a value of another type than the present one.
    """
    known = literals.settings(source, filename)
    source = literals.replace(source, {key: value for key, value in options.items() if key in known}, filename)
    dotted = {path: value for path, value in options.items() if path not in known}
    if not dotted:
        return source
    config = loads(source, filename)
    lines = [] if OPTIONS_HEADING in source else ["", OPTIONS_HEADING]
    for path, given in dotted.items():
        if "." not in path:
            raise UserError(literals.explain_unknown(path, source, filename, known))
        target = find(config, path)
        lines.append(f"{target.expression} = {literals.write(target.fit(given))}")
    return source.rstrip("\n") + "\n" + "\n".join(lines) + "\n"
