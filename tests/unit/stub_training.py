"""A run small enough to reason about: random documents, a two-layer Llama, each document seen alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tuner.constants import IGNORE_INDEX
from tuner.engine.hooks import CheckpointHook, MetricsHook
from tuner.engine.loop import TrainLoop
from tuner.engine.randomness import seed_everything
from tuner.engine.replicated import Replicated
from tuner.engine.runner import Parts, Runner, RunRecord
from tuner.engine.schedule import WarmupCosine

VOCABULARY = 64


class Plan(NamedTuple):
    step: int
    epoch: int
    packs: list[list[int]]
    num_loss_tokens: int


class Documents(Dataset):
    """`count` documents of 3 to 12 random tokens; every second token is trained."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
        self.tokens = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]
        self.shards = SimpleNamespace(fingerprint=f"stub of {seed}")
        self.num_loss_tokens = [len(range(0, length - 1, 2)) for length in lengths]

    def __getitem__(self, plan: Plan) -> list[dict[str, Any]]:
        return [self.batch(pack, plan.num_loss_tokens) for pack in plan.packs]

    def batch(self, pack: list[int], num_loss_tokens: int) -> dict[str, Any]:
        documents = [self.tokens[index] for index in pack]
        labels = []
        for tokens in documents:
            label = torch.cat([tokens[1:], torch.tensor([IGNORE_INDEX])])
            label[1::2] = IGNORE_INDEX
            labels.append(label)
        lengths = torch.tensor([len(tokens) for tokens in documents])
        return {
            "input_ids": torch.cat(documents)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32),
            "max_seqlen": int(lengths.max()),
            "num_loss_tokens": num_loss_tokens,
        }

    def fingerprint(self, plan: Plan) -> str:
        return self.shards.fingerprint

    def document_ids(self, plan: Plan) -> list[str]:
        return [f"stub.jsonl:{index}" for pack in plan.packs for index in pack]


class Steps(Sampler):
    """Steps of `num_accumulation_steps` packs of two documents each, shuffled anew in every epoch."""

    def __init__(self, dataset: Documents, num_accumulation_steps: int, num_epochs: int) -> None:
        self.dataset, self.num_epochs, self.start = dataset, num_epochs, 0
        self.per_step = 2 * num_accumulation_steps
        self.packs_per_step = num_accumulation_steps
        self.per_epoch = len(dataset.tokens) // self.per_step

    def __len__(self) -> int:
        return self.per_epoch * self.num_epochs

    def seek(self, step: int) -> None:
        self.start = step

    def plan(self, step: int) -> Plan:
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.dataset.tokens), generator=torch.Generator().manual_seed(epoch)).tolist()
        chosen = order[position * self.per_step : (position + 1) * self.per_step]
        packs = [chosen[at : at + 2] for at in range(0, self.per_step, 2)]
        return Plan(step, epoch, packs, sum(self.dataset.num_loss_tokens[index] for index in chosen))

    def of_all_ranks(self, step: int) -> Plan:
        return self.plan(step)

    def __iter__(self) -> Iterator[Plan]:
        return (self.plan(step) for step in range(self.start, len(self)))


class SeparateSFT(nn.Module):
    """The loss by definition: each document through the model alone, all logits kept."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, input_ids, labels, position_ids, cu_seqlens, max_seqlen, num_loss_tokens):
        total = input_ids.new_zeros((), dtype=torch.float32)
        for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            logits = self.llm(input_ids[:, start:end], use_cache=False).logits[0]
            loss = nn.functional.cross_entropy(logits, labels[0, start:end], ignore_index=IGNORE_INDEX, reduction="sum")
            total = total + loss
        return {"loss": total / num_loss_tokens}


def tiny_llm(seed: int = 0, attention_dropout: float = 0.0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, attention_dropout=attention_dropout,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    text = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)), eos_token="w2")


def make_runner(
    work_dir: Path,
    *,
    hooks: list | None = None,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
    num_epochs: int = 2,
    attention_dropout: float = 0.0,
    strategy: Replicated | None = None,
    llm: nn.Module | None = None,
    loop: dict[str, Any] | None = None,
) -> Runner:
    """6 steps of 3 micro-batches over two epochs, all objects new, unless told otherwise."""
    seed_everything(0)
    dataset = Documents(18)
    sampler = Steps(dataset, 3, num_epochs)
    from torch.optim import AdamW

    parts = Parts(
        model=SeparateSFT(llm or tiny_llm(attention_dropout=attention_dropout)),
        dataloader=DataLoader(dataset, sampler=sampler, batch_size=None),
        optim_wrapper={"optimizer": {"type": AdamW, "lr": 1e-2}, "clip_grad": {"max_norm": 1.0}},
        schedule=WarmupCosine(warmup_ratio=0.3, min_lr_ratio=0.1),
        strategy=strategy or Replicated(precision="fp32"),
        train_cfg={"type": TrainLoop, **(loop or {})},
        hooks=[MetricsHook(interval=1), CheckpointHook(interval=3)] if hooks is None else hooks,
    )
    record = RunRecord("seed = 0\n", settings or {"seed": 0}, tiny_tokenizer(), "internlm2")
    return Runner(parts, record, work_dir=work_dir, checkpoints=[checkpoint] if checkpoint else [])
