"""A training step through `tuner train` beside transformers' Trainer and TRL's SFTTrainer on the same packed documents.

The peers train transformers' Llama of the same shape; one line more shows Trainer with tuner's model and attention.
Each runs in a process of its own with one thread. Counted are the tokens of the timed steps per CPU second of the
whole process (hooks, logging and data loading included, start-up and the first steps excluded), the peak memory, and
the share of the machine's fp32 matrix-product rate which the model's FLOPs make up. TRL is skipped where it is not
installed.

    python benchmarks/step.py [--pack-length 2048 8192] [--steps 12] [--rounds 3]
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

NUM_WARMUP_STEPS = 3
MODEL = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "bias": False,
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
Clock = list[float]  # CPU seconds of the process at the end of each step


def write_workspace(folder: Path, num_tokens: int) -> None:
    """A model directory without weights and about `num_tokens` tokens of short documents."""
    import shutil

    from tuner.demo.files import resolve

    source = Path(resolve("demo:model"))
    shutil.copytree(source, folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    lines = [json.loads(line)["text"] for line in Path(resolve("demo:text.jsonl")).read_text("utf-8").splitlines()]
    rng, written = random.Random(0), 0
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        while written < num_tokens:
            text = " ".join(rng.choices(lines, k=40))[: rng.randint(300, 700)]
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text) // 3


def load_documents(folder: Path, pack_length: int) -> list[list[Any]]:
    """The packs that `tuner train` sees, as lists of token-id arrays."""
    from tuner.dataset.build import PackedDataset, StepSampler, build_shards
    from tuner.model.tokenizer import build_tokenizer

    shards = build_shards(
        str(folder / "text.jsonl"),
        data_format="text",
        chat_template="internlm2",
        tokenizer=build_tokenizer(str(folder / "model")),
        max_length=pack_length,
        cache_dir=str(folder / "cache"),
    )
    dataset = PackedDataset(shards, max_length=pack_length, seed=0)
    plans = StepSampler(dataset, num_accumulation_steps=1)
    return [[shards.document(index).ids for index in plan.packs[0]] for plan in plans]


def build_model(folder: Path) -> Any:
    """The native InternLM2, whose attention is tuner's own and so helps a peer that trains it."""
    from tuner.model.build import build_llm

    return build_llm(str(folder / "model"), weights="random", attention="sdpa", seed=0)


def build_llama(folder: Path) -> Any:
    """transformers' own Llama of the same shape: what the peers would train, since transformers has no InternLM2."""
    import torch
    import transformers

    settings = {name: value for name, value in MODEL.items() if name not in ("architectures", "model_type", "bias")}
    theta = settings.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    config = transformers.LlamaConfig(**settings, rope_parameters=rope, attn_implementation="sdpa")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def as_packed_rows(packs: list[list[Any]]) -> list[dict[str, Any]]:
    """What Trainer gets: ids, labels and restarting positions, a pack a row."""
    import numpy as np
    import torch

    rows = []
    for pack in packs:
        ids = torch.from_numpy(np.concatenate(pack).astype(np.int64))[None]
        positions = torch.cat([torch.arange(len(document)) for document in pack])[None]
        rows.append({"input_ids": ids, "labels": ids.clone(), "position_ids": positions})
    return rows


def run_tuner(folder: Path, pack_length: int, num_steps: int) -> Clock:
    from tuner.config import render
    from tuner.train import train

    settings = {
        "model_path": str(folder / "model"),
        "weights": "random",
        "data_path": str(folder / "text.jsonl"),
        "cache_dir": str(folder / "cache"),
        "max_length": pack_length,
        "num_accumulation_steps": 1,
        "max_steps": num_steps,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "sample_interval": 0,
        "seed": 0,
    }
    source = render("internlm2_1_8b-pretrain", settings)
    clock = folder / "clock"
    source = source.replace("# assembly", "from benchmarks.step_clock import StepClock\n\n# assembly", 1)
    source += f"\ncustom_hooks = [*custom_hooks, dict(type=StepClock, path={str(clock)!r})]\n"
    train(source, work_dir=folder / f"run_{pack_length}_{time.time_ns()}")
    return [float(line) for line in clock.read_text().splitlines()]


def run_trainer(folder: Path, pack_length: int, num_steps: int, model: Callable[[Path], Any] = build_llama) -> Clock:
    import transformers

    rows = as_packed_rows(load_documents(folder, pack_length)[:num_steps])
    clock: Clock = []

    class Peer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return rows

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.process_time())

    arguments = transformers.TrainingArguments(**peer_arguments(folder, num_steps))
    Peer(model(folder), arguments, train_dataset=rows, callbacks=[Watch()]).train()
    return clock


def run_trl(folder: Path, pack_length: int, num_steps: int) -> Clock:
    import transformers
    import trl
    from datasets import Dataset

    from tuner.model.tokenizer import build_tokenizer

    packs = [[{"input_ids": ids.tolist()} for ids in pack] for pack in load_documents(folder, pack_length)[:num_steps]]
    clock: Clock = []

    class Peer(trl.SFTTrainer):
        def get_train_dataloader(self) -> Any:
            return [self.data_collator(pack) for pack in packs]

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.process_time())

    arguments = trl.SFTConfig(padding_free=True, max_length=None, **peer_arguments(folder, num_steps))
    peer = Peer(
        build_llama(folder),
        args=arguments,
        train_dataset=Dataset.from_list([row for pack in packs for row in pack]),
        processing_class=build_tokenizer(str(folder / "model")),
        callbacks=[Watch()],
    )
    peer.train()
    return clock


def peer_arguments(folder: Path, num_steps: int) -> dict[str, Any]:
    """The same recipe for the peers: AdamW, clipping, logging every step, no checkpoints."""
    return {
        "output_dir": str(folder / "peer"),
        "max_steps": num_steps,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


RUNS = {
    "tuner train": run_tuner,
    "Trainer, packed positions": run_trainer,
    "Trainer, tuner's model": partial(run_trainer, model=build_model),
    "TRL, padding free": run_trl,
}


def tokens_of_steps(folder: Path, pack_length: int, num_steps: int) -> tuple[int, float]:
    """Tokens and model FLOPs (forward and backward) of the timed steps."""
    from tuner.model.flops import count_matmuls, model_flops

    packs = load_documents(folder, pack_length)[NUM_WARMUP_STEPS:num_steps]
    lengths = [len(document) for pack in packs for document in pack]
    matmuls = count_matmuls(build_model(folder))
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    return tokens, model_flops(matmuls, tokens, squares, tokens - len(lengths))


def matrix_rate() -> float:
    """fp32 FLOP/s of one thread in a large matrix product, best of several."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    times = []
    for _ in range(8):
        start = time.process_time()
        torch.mm(a, b)
        times.append(time.process_time() - start)
    return 2 * 1536**3 / min(times)


def work(name: str, folder: Path, pack_length: int, num_steps: int) -> None:
    """What a worker process does: train, then print its figures as the last line."""
    import torch

    torch.set_num_threads(1)
    clock = RUNS[name](folder, pack_length, num_steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cpu_seconds": clock[-1] - clock[NUM_WARMUP_STEPS - 1], "peak": peak, "num_steps": len(clock)}))


def measure(name: str, folder: Path, pack_length: int, num_steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    command += ["--pack-length", str(pack_length), "--steps", str(num_steps)]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(folder: Path, pack_length: int, num_steps: int, num_rounds: int) -> None:
    """Interleave the peers, so that a change of the machine's speed meets all of them, and print medians."""
    tokens, flops = tokens_of_steps(folder, pack_length, num_steps)
    names = [name for name in RUNS if not name.startswith("TRL") or importlib.util.find_spec("trl")]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    rates = []
    for _ in range(num_rounds):
        rates.append(matrix_rate())
        for name in names:
            figures[name].append(measure(name, folder, pack_length, num_steps))
    num_timed = num_steps - NUM_WARMUP_STEPS
    print(f"\npacks of {pack_length}, {tokens} tokens in {num_timed} timed steps, {num_rounds} rounds, one thread")
    print(f"fp32 matrix product: {statistics.median(rates) / 1e9:.1f} GFLOP/s")
    print(f"{'':28}{'tokens/CPU s':>14}{'min-max':>14}{'ratio':>8}{'of matrix rate':>16}{'peak GB':>10}")
    own = statistics.median(f["cpu_seconds"] for f in figures["tuner train"])
    for name, runs in figures.items():
        seconds = [run["cpu_seconds"] for run in runs]
        middle, spread = statistics.median(seconds), f"{tokens / max(seconds):.0f}-{tokens / min(seconds):.0f}"
        share = flops / middle / statistics.median(rates)
        peak = max(run["peak"] for run in runs) / 1e9
        print(f"{name:28}{tokens / middle:14.0f}{spread:>14}{middle / own:8.2f}{share:16.2f}{peak:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack-length", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.folder, arguments.pack_length[0], arguments.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workspace(folder, num_tokens=max(arguments.pack_length) * (arguments.steps + 2))
        for pack_length in arguments.pack_length:
            compare(folder, pack_length, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
