"""InternEvo's parts joined once more, by other code than that which writes: what a fresh process compares with."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from tuner.convert.internevo_parts import EMBEDDINGS, HEAD, LAYER, grid_of, read_part, read_settings
from tuner.convert.reload import Origin, model_of, rounding
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM


def origin_of(parts: Path, base: Path, expected: Path, *, is_turned: bool) -> Origin:
    """Parts, to compare the model directory that was made of them with.

    Args:
        parts: directory of model_tp*_pp*.pt.
        base: whose tokenizer and chat template the model has.
        expected: directory for the config.json that it must have; it is written.
        is_turned: whether rotary pairs are neighbours in the parts.
    """
    is_normal = bool(read_settings(parts).get("norm_head"))
    config = expected_config(parts, base)
    config.save_pretrained(expected)
    return Origin(
        settings=expected,
        words=base,
        tensors=partial(joined_tensors, parts, expected, is_turned),
        model=partial(load_joined, parts, expected, is_turned),
        computed=frozenset({HEAD} if is_normal else ()),
        tolerance=rounding(str(config.dtype).removeprefix("torch.")) if is_normal else 0.0,
    )


def expected_config(parts: Path, base: Path) -> InternLM2Config:
    """The base's, with what the parts themselves say or show."""
    said = read_settings(parts)
    stages = [read_part(paths[0]) for paths in grid_of(parts)]
    first = {name.removeprefix("model."): tensor for name, tensor in stages[0].items()}
    table = next(first[name] for name in EMBEDDINGS if name in first)
    whole = len(grid_of(parts)[0])
    config = InternLM2Config.from_pretrained(base)
    config.hidden_size = first["layers.0.attention_norm.weight"].shape[0]
    config.vocab_size = said.get("vocab_size", table.shape[0] * table.shape[1] * whole // config.hidden_size)
    config.intermediate_size = first["layers.0.feed_forward.w1.weight"].shape[0] * whole
    config.num_hidden_layers = sum(name.endswith("attention_norm.weight") for stage in stages for name in stage)
    config.num_attention_heads = said["num_attention_heads"]
    config.num_key_value_heads = said["num_kv_attention_heads"]
    config.bias = config.tie_word_embeddings = False
    config.dtype = table.dtype
    if isinstance(said.get("rope_base"), (int, float)):
        rope = {**(config.rope_parameters or {}), "rope_theta": said["rope_base"]}
        config.rope_theta, config.rope_parameters = said["rope_base"], rope
    if isinstance(said.get("layer_norm_epsilon"), (int, float)):
        config.rms_norm_eps = said["layer_norm_epsilon"]
    return config


def joined_tensors(parts: Path, expected: Path, is_turned: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by transformers' names: of each rank read whole, and put together as the model's shapes ask for."""
    config = InternLM2Config.from_pretrained(expected)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in InternLM2ForCausalLM(config).state_dict().items()}
    num_layers = 0
    for paths in grid_of(parts):
        stage = [{name.removeprefix("model."): tensor for name, tensor in read_part(path).items()} for path in paths]
        numbers = sorted({int(match[1]) for name in stage[0] if (match := LAYER.fullmatch(name))})
        for name in stage[0]:
            match = LAYER.fullmatch(name)
            bare = f"layers.{num_layers + numbers.index(int(match[1]))}.{match[2]}" if match else name
            bare = EMBEDDINGS[0] if bare in EMBEDDINGS else bare
            full = bare if bare == HEAD else f"model.{bare}"
            tensor = put_together([part[name].whole() for part in stage], shapes[full])
            yield full, changed(tensor, full, parts, config, is_turned)
        num_layers += len(numbers)


def put_together(tensors: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Of the first, of all one below the other, and of all side by side, that which has the shape."""
    ways = [tensors[0], *(torch.cat(tensors, axis) for axis in range(tensors[0].dim()))]
    return next(way for way in ways if way.shape == shape)


def changed(tensor: torch.Tensor, name: str, parts: Path, config: InternLM2Config, is_turned: bool) -> torch.Tensor:
    """What transformers' form has in the place of a joined tensor."""
    if name == HEAD and read_settings(parts).get("norm_head"):
        return tensor.double() / tensor.double().norm(dim=1, keepdim=True)
    if not name.endswith("wqkv.weight") or not is_turned:
        return tensor
    by_head = tensor.view(config.num_key_value_heads, -1, config.head_dim // 2, 2, tensor.shape[1])
    rotated = by_head[:, :-1].transpose(2, 3)  # (0, 1), (2, 3) -> (0, d/2), (1, d/2 + 1)
    return torch.cat([rotated.flatten(2, 3), by_head[:, -1:].flatten(2, 3)], dim=1).view(tensor.shape)


def load_joined(parts: Path, expected: Path, is_turned: bool, dtype: torch.dtype) -> PreTrainedModel:
    """The model of the parts, in `dtype`."""
    config = AutoConfig.from_pretrained(expected, trust_remote_code=False)
    return model_of(config, dict(joined_tensors(parts, expected, is_turned)), dtype)
