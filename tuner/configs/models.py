"""A row for each model: what it is, what it takes, and the settings that it fills into the recipes."""

from collections.abc import Mapping
from typing import NamedTuple

BYTES_PER_PARAMETER = 16  # fp32 weight 4 + gradient 4 + Adam's two moments 8


class Model(NamedTuple):
    """`settings` go into every recipe, `recipes[name]` only into that one and win over them."""

    about: str
    parameters: float
    hardware: str
    settings: Mapping[str, object]
    recipes: Mapping[str, Mapping[str, object]] = {}

    @property
    def gigabytes(self) -> float:
        """Memory in GB of weights, gradients and Adam in full fine-tuning; activations come on top."""
        return self.parameters * BYTES_PER_PARAMETER / 1e9


def internlm2(model_path: str, max_length: int = 32768) -> dict[str, object]:
    """Settings that all released InternLM2 and InternLM2.5 share; they end their training at 32k tokens."""
    return {"model_path": model_path, "chat_template": "internlm2", "max_length": max_length}


# The hardware each is meant for, by arithmetic: under ZeRO-3 a GPU holds, beside activations, 18 bytes of a parameter
# (weight in bf16 and fp32, gradient, Adam's two moments) over the number of ranks.
ONE_80GB = "1 x 80 GB"
EIGHT_80GB = "8 x 80 GB, --deepspeed zero3"
SIXTEEN_80GB = "16 x 80 GB, --deepspeed zero3"

SFT = ("sft_full", "sft_lora", "sft_qlora")
WHOLE = ("pretrain", "sft_full")  # recipes in which every weight trains: the arithmetic above is theirs

MODELS: dict[str, Model] = {
    "internlm2_tiny": Model(
        about="InternLM2, a few M parameters, from scratch",
        parameters=5e6,
        hardware="2 CPU cores",
        settings={
            "model_path": "demo:model",
            "weights": "random",
            "chat_template": "internlm2",
            "max_length": 512,
            "precision": "fp32",
            "gradient_checkpointing": False,
            "num_accumulation_steps": 1,
            "num_epochs": 1,
            "lr": 1.5e-3,
            "warmup_ratio": 0.05,
            "log_interval": 100,
            "save_interval": 1000,
        },
        recipes={
            **{recipe: {"data_path": "demo:train.jsonl", "sample_interval": 500} for recipe in SFT},
            "pretrain": {"data_path": "demo:text.jsonl"},
        },
    ),
    "internlm2_1_8b": Model("InternLM2-1.8B, base", 1.889e9, ONE_80GB, internlm2("internlm/internlm2-1_8b")),
    "internlm2_7b": Model("InternLM2-7B, base", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2-7b")),
    "internlm2_20b": Model("InternLM2-20B, base", 19.861e9, SIXTEEN_80GB, internlm2("internlm/internlm2-20b")),
    "internlm2_chat_1_8b": Model("InternLM2-Chat-1.8B", 1.889e9, ONE_80GB, internlm2("internlm/internlm2-chat-1_8b")),
    "internlm2_chat_7b": Model("InternLM2-Chat-7B", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2-chat-7b")),
    "internlm2_chat_20b": Model("InternLM2-Chat-20B", 19.861e9, SIXTEEN_80GB, internlm2("internlm/internlm2-chat-20b")),
    "internlm2_5_7b": Model("InternLM2.5-7B, base", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2_5-7b")),
    "internlm2_5_chat_7b": Model("InternLM2.5-Chat-7B", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2_5-7b-chat")),
    "llama3_8b": Model(
        about="Llama-3-8B, base",
        parameters=8.030e9,
        hardware=EIGHT_80GB,
        settings={"model_path": "meta-llama/Meta-Llama-3-8B", "chat_template": "llama3", "max_length": 8192},
    ),
    "qwen2_5_7b": Model(
        about="Qwen2.5-7B, base",
        parameters=7.616e9,
        hardware=EIGHT_80GB,
        settings={"model_path": "Qwen/Qwen2.5-7B", "chat_template": "qwen2.5", "max_length": 32768},
    ),
}
