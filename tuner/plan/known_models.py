"""Shapes of the models that presets name, for where the hub cannot be reached: their published config.json."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from tuner.model.internlm2.configuration import InternLM2Config


def shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """A row in transformers' names."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


INTERNLM2 = {
    "1_8b": shape(2048, 8192, 24, 16, 8, 92544),
    "7b": shape(4096, 14336, 32, 32, 8, 92544),
    "20b": shape(6144, 16384, 48, 48, 8, 92544),
}
OTHERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "meta-llama/Meta-Llama-3-8B": (LlamaConfig, shape(4096, 14336, 32, 32, 8, 128256)),
    "Qwen/Qwen2.5-7B": (Qwen2Config, shape(3584, 18944, 28, 28, 4, 152064)),
}


def known_model(path: str) -> PreTrainedConfig | None:
    """The config of a model by its name on the hub; None for one that is not known."""
    if path in OTHERS:
        kind, row = OTHERS[path]
        return kind(**row, tie_word_embeddings=False)
    owner, _, name = path.partition("/")
    size = name.removeprefix("internlm2_5-").removeprefix("internlm2-").removeprefix("chat-").removesuffix("-chat")
    if owner != "internlm" or size not in INTERNLM2:
        return None
    return InternLM2Config(**INTERNLM2[size])
