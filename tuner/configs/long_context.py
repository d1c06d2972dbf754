"""Full fine-tuning at long context: for each model what to set for a length on some GPUs, and what it then needs."""

from typing import NamedTuple

RECIPE = "sft_full"
SUMMARY = "Full fine-tuning at long context"
DEFAULT = ("200k", 8)
STRATEGY = "zero3"
NEEDLE_INTERVAL = 200


class Length(NamedTuple):
    """A context's tokens, and the settings that follow from them alone."""

    max_length: int
    rope_theta: (
        float | None
    )  # beyond the 32k that InternLM2 is trained for: dynamic NTK's formula (rope.remedy), rounded
    needle_lengths: str


LENGTHS = {
    "8k": Length(8192, None, "4k,8k"),
    "32k": Length(32768, None, "4k,32k"),
    "200k": Length(204800, 1.2e7, "4k,32k,200k"),
    "1M": Length(1048576, 7e7, "32k,200k,1024k"),
}


class Plan(NamedTuple):
    """A length on so many GPUs of 80 GB, eight of them a node: the fastest that `tuner plan` finds with 5 GiB spare."""

    context: str
    gpus: int
    gibibytes: float  # of a GPU's memory at its peak
    seconds: float  # of a step on H100
    sequence_parallel_size: int
    gradient_checkpointing: bool | str
    offload_activations: bool
    num_accumulation_steps: int

    @property
    def settings(self) -> dict[str, object]:
        """What the recipe is given."""
        return {
            **LENGTHS[self.context]._asdict(),
            "sequence_parallel_size": self.sequence_parallel_size,
            "deepspeed": STRATEGY if self.gpus > 1 else None,
            "gradient_checkpointing": self.gradient_checkpointing,
            "offload_activations": self.offload_activations,
            "num_accumulation_steps": self.num_accumulation_steps,
            "needle_interval": NEEDLE_INTERVAL,
        }

    def line(self, other: "Plan") -> str:
        """What to set, as a command takes it, where `other` is set."""
        changed = [item for item in self.settings.items() if item not in other.settings.items()]
        return (
            " ".join(f"{name}={f'{value:g}' if isinstance(value, float) else value}" for name, value in changed)
            or "(as it stands)"
        )


PLANS: dict[str, tuple[Plan, ...]] = {
    "internlm2_1_8b": (
        Plan("8k", 8, 29.8, 3.1, 1, False, False, 16),
        Plan("8k", 16, 27.8, 2.3, 1, False, False, 8),
        Plan("8k", 32, 26.8, 1.2, 1, False, False, 4),
        Plan("32k", 8, 30.9, 5.2, 1, False, False, 4),
        Plan("32k", 16, 28.9, 2.6, 1, False, False, 2),
        Plan("32k", 32, 27.9, 1.3, 1, False, False, 1),
        Plan("200k", 1, 47.0, 195.4, 1, True, True, 5),
        Plan("200k", 8, 54.0, 31.5, 1, "attention", False, 1),
        Plan("200k", 16, 52.0, 31.5, 1, "attention", False, 1),
        Plan("200k", 32, 28.5, 15.8, 2, "attention", False, 1),
        Plan("1M", 8, 38.0, 90.1, 8, "attention", False, 1),
        Plan("1M", 16, 36.0, 90.1, 8, "attention", False, 1),
        Plan("1M", 32, 35.0, 90.1, 8, "attention", False, 1),
    ),
    "internlm2_7b": (
        Plan("8k", 8, 73.2, 12.5, 1, False, False, 16),
        Plan("8k", 16, 65.0, 9.3, 1, False, False, 8),
        Plan("8k", 32, 60.9, 4.8, 1, False, False, 4),
        Plan("32k", 8, 40.8, 21.3, 1, "attention", False, 4),
        Plan("32k", 16, 68.7, 8.9, 1, False, False, 2),
        Plan("32k", 32, 64.6, 4.5, 1, False, False, 1),
        Plan("200k", 4, 68.1, 115.8, 4, "attention", False, 5),
        Plan("200k", 8, 55.0, 56.4, 2, True, False, 1),
        Plan("200k", 16, 73.2, 46.3, 2, "attention", False, 1),
        Plan("200k", 32, 69.1, 46.3, 2, "attention", False, 1),
        Plan("1M", 8, 64.2, 312.1, 8, True, False, 1),
        Plan("1M", 16, 56.0, 312.1, 8, True, False, 1),
        Plan("1M", 32, 52.0, 312.1, 8, True, False, 1),
    ),
    "internlm2_20b": (
        Plan("8k", 8, 58.6, 41.0, 1, "attention", False, 16),
        Plan("8k", 16, 37.6, 23.8, 1, "attention", False, 8),
        Plan("8k", 32, 27.1, 12.3, 1, "attention", False, 4),
        Plan("32k", 8, 70.4, 57.9, 1, True, False, 4),
        Plan("32k", 16, 68.5, 26.6, 1, "attention", False, 2),
        Plan("32k", 32, 58.0, 13.3, 1, "attention", False, 1),
        Plan("200k", 8, 65.6, 164.0, 8, True, False, 5),
        Plan("200k", 16, 62.2, 65.6, 4, True, False, 1),
        Plan("200k", 32, 51.7, 65.6, 4, True, False, 1),
        Plan("1M", 8, 65.1, 707.6, 8, True, True, 1),
        Plan("1M", 16, 44.1, 707.6, 8, True, True, 1),
        Plan("1M", 32, 33.6, 707.6, 8, True, True, 1),
    ),
}
"""by model; a test asks `tuner plan` for each of them again"""


def default(model: str) -> Plan:
    """What the preset of a model is set to."""
    return next(plan for plan in PLANS[model] if (plan.context, plan.gpus) == DEFAULT)


def hardware(model: str) -> str:
    """What the preset as it stands is meant for."""
    plan = default(model)
    return f"{plan.gpus} x 80 GB for {plan.context}; 8k to 1M in its header"


def header(model: str) -> str:
    """The docstring of a model's preset."""
    context, gpus = DEFAULT
    rows = [
        f"{plan.context:>7} {plan.gpus:>5} {plan.gibibytes:>6.1f} {plan.seconds:>7.1f}  {plan.line(default(model))}"
        for plan in PLANS[model]
    ]
    return f"""{SUMMARY}: every weight trains, and only the assistant's turns carry loss.

It is set for {context} tokens on {gpus} GPUs. For others, put a line's settings in place of those below, or behind
`tuner train THIS_FILE`. GiB is the peak that `tuner plan` predicts for each GPU (80 GB, of which an H100 has 79.1 GiB),
s the time of a step: of a million tokens, or of a pack for each group of ranks if that is more; each pack is taken as
one document, the most it can cost. `tuner plan THIS_FILE --gpus 8 --nodes 2 --solve` finds more, also for other GPUs.

context  GPUs    GiB  s/step  settings
{chr(10).join(rows)}

The settings come first; the assembly below uses each of them, so what is derived from a setting follows it."""
