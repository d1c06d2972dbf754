"""A row for each model: what it is, what it takes, and the settings that it fills into the recipes."""

from collections.abc import Mapping
from typing import NamedTuple

BYTES_PER_PARAMETER = 16  # fp32 weight 4 + gradient 4 + Adam's two moments 8
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a value, its share of an 8-bit scale, and of that one's
GPU_SIZES = (24, 48, 80)
TWO_80GB = "2 x 80 GB, sequence_parallel_size=2"


class Sizes(NamedTuple):
    """Of a decoder of Llama's kind."""

    layers: int
    hidden: int
    intermediate: int
    key_value: int  # heads of keys x their size
    vocabulary: int
    is_fused: bool = False  # query, key and value are one layer
    is_tied: bool = False

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices."""
        attention = 2 * self.hidden * (self.hidden + self.key_value)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def adapter(self, rank: int) -> int:
        """Weights of A and B of a rank in all linear layers but the head: rank x (inputs + outputs) of each."""
        hidden = self.hidden
        attention = (1 if self.is_fused else 3) * hidden + hidden + 2 * self.key_value + 2 * hidden
        return rank * self.layers * (attention + 3 * (hidden + self.intermediate))


class Model(NamedTuple):
    """`settings` go into every recipe, `recipes[name]` only into that one and win over them."""

    about: str
    parameters: float
    hardware: str
    settings: Mapping[str, object]
    sizes: Sizes
    recipes: Mapping[str, Mapping[str, object]] = {}

    def gigabytes(self, settings: Mapping[str, object]) -> float:
        """Memory in GB of weights, gradients and Adam on one process; activations come on top.

        Under an adapter the linear layers are kept in what they compute in, or in 4 bits; embedding and norms in fp32.

        Args:
            settings: of a preset, all of them.
        """
        rank = settings.get("lora_rank")
        if not isinstance(rank, int):
            return self.parameters * BYTES_PER_PARAMETER / 1e9
        half = 4 if settings["precision"] == "fp32" else 2
        sizes, head = self.sizes, 0 if self.sizes.is_tied else self.sizes.vocabulary * self.sizes.hidden
        frozen = sizes.linear * (NF4_BYTES if settings.get("quantise") else half)
        rest = (self.parameters - sizes.linear - head) * 4 + head * half
        return (frozen + rest + sizes.adapter(rank) * BYTES_PER_PARAMETER) / 1e9

    def meant_for(self, settings: Mapping[str, object]) -> str:
        """The hardware, by arithmetic: of an adapter, state and activations under gradient checkpointing."""
        if "lora_rank" not in settings or not settings["gradient_checkpointing"]:
            return self.hardware
        max_length = settings["max_length"]
        assert isinstance(max_length, int)
        kept = max_length * self.sizes.hidden * self.sizes.layers * 4 / 1e9  # the fp32 stream before each layer
        layer = max_length * (4 * self.sizes.intermediate + 8 * self.sizes.hidden) * 2 / 1e9  # computed again
        need = self.gigabytes(settings) + kept + layer
        return next((f"1 x {size} GB" for size in GPU_SIZES if need < 0.9 * size), TWO_80GB)


def internlm2(model_path: str, max_length: int = 32768) -> dict[str, object]:
    """Settings that all released InternLM2 and InternLM2.5 share; they end their training at 32k tokens."""
    return {"model_path": model_path, "chat_template": "internlm2", "max_length": max_length}


# The hardware each is meant for, by arithmetic: under ZeRO-3 a GPU holds, beside activations, 18 bytes of a parameter
# (weight in bf16 and fp32, gradient, Adam's two moments) over the number of ranks.
ONE_80GB = "1 x 80 GB"
EIGHT_80GB = "8 x 80 GB, --deepspeed zero3"
SIXTEEN_80GB = "16 x 80 GB, --deepspeed zero3"

SFT = ("sft_full", "sft_lora", "sft_qlora")
OF_1_8B = Sizes(24, 2048, 8192, 1024, 92544, is_fused=True)
OF_7B = Sizes(32, 4096, 14336, 1024, 92544, is_fused=True)
OF_20B = Sizes(48, 6144, 16384, 1024, 92544, is_fused=True)

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
        sizes=Sizes(2, 256, 384, 128, 2560, is_fused=True, is_tied=True),
        recipes={
            **{recipe: {"data_path": "demo:train.jsonl", "sample_interval": 500} for recipe in SFT},
            "pretrain": {"data_path": "demo:text.jsonl"},
        },
    ),
    "internlm2_1_8b": Model("InternLM2-1.8B, base", 1.889e9, ONE_80GB, internlm2("internlm/internlm2-1_8b"), OF_1_8B),
    "internlm2_7b": Model("InternLM2-7B, base", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2-7b"), OF_7B),
    "internlm2_20b": Model("InternLM2-20B, base", 19.861e9, SIXTEEN_80GB, internlm2("internlm/internlm2-20b"), OF_20B),
    "internlm2_chat_1_8b": Model(
        "InternLM2-Chat-1.8B", 1.889e9, ONE_80GB, internlm2("internlm/internlm2-chat-1_8b"), OF_1_8B
    ),
    "internlm2_chat_7b": Model(
        "InternLM2-Chat-7B", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2-chat-7b"), OF_7B
    ),
    "internlm2_chat_20b": Model(
        "InternLM2-Chat-20B", 19.861e9, SIXTEEN_80GB, internlm2("internlm/internlm2-chat-20b"), OF_20B
    ),
    "internlm2_5_7b": Model("InternLM2.5-7B, base", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2_5-7b"), OF_7B),
    "internlm2_5_chat_7b": Model(
        "InternLM2.5-Chat-7B", 7.738e9, EIGHT_80GB, internlm2("internlm/internlm2_5-7b-chat"), OF_7B
    ),
    "llama3_8b": Model(
        about="Llama-3-8B, base",
        parameters=8.030e9,
        hardware=EIGHT_80GB,
        settings={"model_path": "meta-llama/Meta-Llama-3-8B", "chat_template": "llama3", "max_length": 8192},
        sizes=Sizes(32, 4096, 14336, 1024, 128256),
    ),
    "qwen2_5_7b": Model(
        about="Qwen2.5-7B, base",
        parameters=7.616e9,
        hardware=EIGHT_80GB,
        settings={"model_path": "Qwen/Qwen2.5-7B", "chat_template": "qwen2.5", "max_length": 32768},
        sizes=Sizes(28, 3584, 18944, 512, 152064),
    ),
}
