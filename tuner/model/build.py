"""From a path to a language model: any causal LM of transformers, in fp32, with our attention, never remote code."""

import copy
import os
import socket
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from tuner.demo.files import resolve
from tuner.errors import UserError
from tuner.model.adapter import LoRA, attach
from tuner.model.attention import BACKENDS, attention_name, resolve_backend
from tuner.model.directory import check_model_directory, check_weights, looks_local, nearest_directory
from tuner.model.fingerprint import Base
from tuner.model.hollow import BuiltWeights, Hold, StoredWeights, fill_computed_buffers, stored_names
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.memory import Memory
from tuner.nearest import did_you_mean

WEIGHTS = ("pretrained", "random")


def build_llm(
    path: str,
    *,
    weights: Literal["pretrained", "random"] = "pretrained",
    attention: str = "auto",
    memory: Memory | None = None,
    seed: int = 0,
    adapter: LoRA | None = None,
    hold: Hold | None = None,
) -> PreTrainedModel:
    """The causal LM of a model directory, in training mode, every parameter fp32 on the CPU.

    Args:
        path: a directory with config.json, a name on the hub, or "demo:model".
        weights: "pretrained" reads the safetensors; "random" draws them anew from config.json, the same for the same
            `seed` whatever was drawn before, and leaves the global random state as it was.
        attention: "auto", a key of `tuner.model.attention.BACKENDS`, or "eager", transformers' plain reference.
        memory: how it saves memory in training; None saves nothing.
        adapter: what trains in place of the weights, see `LoRA`; None trains all of them.
        hold: for a model too large for one process: gets it without weights, and the weights, and puts them in place.

    Raises:
        UserError: the place holds no model that can be loaded so; the message says what to do.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights!r}: choose {' or '.join(map(repr, WEIGHTS))}.")
    implementation = _implementation(attention)
    path = _locate(path)
    if weights == "pretrained" and Path(path).exists():
        check_weights(path)
    config = _read_config(path)
    if weights == "pretrained":
        build = partial(_load, path, config, implementation)
    else:
        build = partial(_draw, path, config, implementation, seed)
    if hold is None and adapter is None:
        llm = build()
    else:
        llm = _hollow(path, copy.deepcopy(config), implementation)
        tensors = _weights_of(path, llm, build, stored=weights == "pretrained")
        if adapter is not None:
            attach(llm, adapter, Base(path, weights, seed), weights=tensors, hold=hold)
        elif hold is not None:
            hold(llm, tensors)
    if memory is not None:
        memory.save(llm)
    return llm.train()


def read_config(path: str) -> PreTrainedConfig:
    """The config of the causal LM at a path that `build_llm` takes, with the place in its `name_or_path`.

    Raises:
        UserError: the place holds no such config; weights are not looked for.
    """
    return _read_config(_locate(path))


def _locate(path: str) -> str:
    """A directory that has a config, or a name on the hub."""
    path = os.path.expanduser(resolve(path))
    if Path(path).exists() or looks_local(path):
        check_model_directory(path)
    return path


def _implementation(attention: str) -> str:
    """The name under which transformers knows the attention asked for."""
    if attention == "eager":
        return attention
    if attention != "auto" and attention not in BACKENDS:
        raise UserError(f"attention={attention!r}: choose 'auto', 'eager', {', '.join(map(repr, BACKENDS))}.")
    return attention_name(resolve_backend(attention))


def _read_config(path: str) -> PreTrainedConfig:
    """The config of a causal LM, made for this one model: transformers writes the attention's name into it."""
    known = {"local_files_only": _is_offline(path)}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, **known)
        if not isinstance(raw, dict):
            raise UserError(f"it holds a {type(raw).__name__}, not settings. Take the file of the original model.")
        if _is_first_revision(raw):
            config = _first_revision(path, raw)
        else:
            _check_model_type(path, raw)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **known)
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"The config.json of {path!r} is not right: {error}") from error
    architectures = config.architectures or []
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or "InternLM2ForRewardModel" in architectures:
        raise UserError(
            f"{path!r} holds {' '.join(architectures) or config.model_type}, which is no causal language model. "
            "Give a model that predicts the next token (a reward model loads by AutoModelForSequenceClassification)."
        )
    return config


def _check_model_type(path: str, raw: dict[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type is None:
        raise UserError('it has no "model_type", by which the network is chosen. Take the file of the original model.')
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING.keys())
        remote = " The code that comes with the model is never run." if "auto_map" in raw else ""
        raise UserError(f"this transformers has no model type {model_type!r}.{near}{remote} A newer one may have it.")


def _is_first_revision(raw: dict[str, Any]) -> bool:
    """Whether this is a first InternLM2 release, which still said `internlm`, as the older architecture does."""
    return raw.get("model_type") == "internlm" and raw.get("architectures") == ["InternLM2ForCausalLM"]


def _first_revision(path: str, raw: dict[str, Any]) -> InternLM2Config:
    """The same config under the later name, without the auto_map to classes of the earlier one."""
    renamed = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    return InternLM2Config.from_dict(renamed, name_or_path=path)


def _is_offline(path: str) -> bool:
    """Whether the hub is not to be asked: the path is here, or there is no network and a try takes half a minute."""
    if hub.HF_HUB_OFFLINE or Path(path).is_dir():
        return True
    if urllib.request.getproxies():
        return False  # the proxy resolves names, we need not
    try:
        socket.getaddrinfo(urlparse(hub.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _unreadable(path: str, error: OSError) -> str:
    if Path(path).is_dir():
        return f"The config.json of {path!r} cannot be read: {error}"
    return (
        f"{path!r} is no directory here, and the hub did not give it ({str(error).splitlines()[0]}). Check the name "
        f"and the network, or download the model elsewhere and give its directory.{nearest_directory(Path(path))}"
    )


def _load(path: str, config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    try:
        llm, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation=implementation,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they come in the report, and are refused below
            output_loading_info=True,
            local_files_only=_is_offline(path),
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{path!r} cannot be loaded: {error}") from error
    except SafetensorError as error:
        raise UserError(f"The weights of {path!r} are damaged ({error}). Fetch them again.") from error
    wrong = [f"{name} is {tuple(found)}, not {tuple(meant)}" for name, found, meant in report["mismatched_keys"]]
    wrong += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    if wrong:
        raise UserError(
            f"The weights of {path!r} do not fit its config.json: {'; '.join(wrong[:5])}"
            f"{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Take both from the same model."
        )
    return llm


def _draw(path: str, config: PreTrainedConfig, implementation: str, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reach the GPUs' generators
        return _from_config(path, config, implementation)


def _from_config(path: str, config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=implementation, trust_remote_code=False
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"{path!r} cannot be built: {error}") from error


def _hollow(path: str, config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    """The model on the meta device, but for the buffers that no file has."""
    with torch.device("meta"):
        llm = _from_config(path, config, implementation)
    return fill_computed_buffers(llm)


def _weights_of(
    path: str, llm: PreTrainedModel, build: Callable[[], PreTrainedModel], *, stored: bool
) -> Mapping[str, torch.Tensor]:
    """From the files where they have the names that the model has; else from the model built whole."""
    names = stored_names(llm)
    if stored and (weights := StoredWeights(path, is_offline=_is_offline(path))).hold(names):
        return weights
    return BuiltWeights(build, names)
