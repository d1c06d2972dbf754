"""A model whose weights no process needs to hold whole: built without them, and they are read one by one by name."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.model.directory import weight_files

Hold = Callable[[PreTrainedModel, Mapping[str, Tensor]], None]
"""takes a hollow model, and its parameters and persistent buffers by name, and replaces each"""


def fill_computed_buffers(llm: PreTrainedModel) -> PreTrainedModel:
    """Of a model on the meta device, compute what no file has: rotary frequencies, say; all else stays there."""
    for tensor in (*llm.parameters(), *llm.buffers()):
        tensor._is_hf_initialized = True  # the mark by which transformers leaves it alone
    for name, buffer in list(llm.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        llm.get_submodule(parent).register_buffer(leaf, torch.empty_like(buffer, device="cpu"), persistent=False)
    llm.initialize_weights()
    return llm


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has left an empty one in its place, or 4 bits stand for a value."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape if state is None else state.shape)


def parameter_places(llm: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The modules and attributes where each parameter stands; a tied one has several and the name of the first."""
    names: dict[nn.Parameter, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, parameter in llm.named_parameters(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        places.setdefault(names.setdefault(parameter, name), []).append((llm.get_submodule(parent), leaf))
    return places


def stored_names(llm: PreTrainedModel) -> dict[str, torch.Size]:
    """Parameters, a tied one once, and persistent buffers of a model: names and shapes."""
    computed = {name for name, _ in llm.named_non_persistent_buffers()}
    buffers = {name: buffer.shape for name, buffer in llm.named_buffers() if name not in computed}
    return {name: parameter.shape for name, parameter in llm.named_parameters()} | buffers


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a model directory's safetensors by name; each is read, and its file closed, when it is asked for.

    Args:
        path: a directory, or a name on the hub, which is fetched.
    """

    def __init__(self, path: str, *, is_offline: bool) -> None:
        directory = Path(path)
        if not directory.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            directory = Path(snapshot_download(path, allow_patterns=patterns, local_files_only=is_offline))
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        for file in weight_files(str(directory)):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    self._places[name] = file
                    self.shapes[name] = torch.Size(opened.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def hold(self, expected: Mapping[str, torch.Size]) -> bool:
        """Whether all of `expected` are there by their names and shapes, so that nothing has to be converted."""
        return all(self.shapes.get(name) == shape for name, shape in expected.items())


class BuiltWeights(Mapping[str, Tensor]):
    """The tensors of a model that is built whole when the first of them is asked for: drawn, or converted from files.

    Args:
        build: makes the model.
        names: of its tensors.
    """

    def __init__(self, build: Callable[[], nn.Module], names: Mapping[str, torch.Size]) -> None:
        self._build, self._names = build, names

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        model = self._build()
        return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
