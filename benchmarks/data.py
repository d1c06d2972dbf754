"""Tokenise and pack: tokens per CPU second and peak memory, cold and warm.

    python benchmarks/data.py                                   # a generated corpus, the demo's tokenizer
    python benchmarks/data.py --data F.jsonl --format openai --tokenizer DIR --workers 2

Each measurement is a process of its own, so that a peak is of that work alone. The tokenizer is handed over as a
tokenizer.json: torch and transformers, which training needs and this does not, stay out of the figures.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOPICS = {
    "en": "the model reads a line of text and writes an answer with reasons about weather numbers travel music code",
    "zh": "模型 读取 一行 文字 然后 写出 带有 理由 的 回答 关于 天气 数字 旅行 音乐 代码 以及 每天 的 生活",
}


def main() -> None:
    """Measure cold, then warm, then packing alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a data file; without it, conversations are generated")
    parser.add_argument("--format", default="openai", help="data_format of the file")
    parser.add_argument("--rows", type=int, default=6000, help="conversations to generate")
    parser.add_argument("--tokenizer", default="demo:model", help="model directory")
    parser.add_argument("--template", default="internlm2", help="chat_template")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or str(generate(Path(folder) / "rows.jsonl", options.rows))
        time.sleep(2.5)  # the digest of a file younger than 2 s is not kept for the warm start
        settings = {
            "data": data,
            "data_format": options.format,
            "tokenizer_file": save_tokenizer(options.tokenizer, Path(folder)),
            "template": options.template,
            "max_length": options.max_length,
            "num_workers": options.workers,
            "cache_dir": folder,
        }
        for name in ("cold", "warm"):
            show(name, run(settings))
        for number, max_length in ((1_000_000, 4096), (1_000_000, 200_000), (10_000_000, 32_768)):
            show(f"pack {number:,}", run({"number": number, "max_length": max_length}))


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def show(name: str, result: dict[str, Any]) -> None:
    """One line of figures."""
    figures = [
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value:,}" for key, value in result.items()
    ]
    print(f"{name}: {', '.join(figures)}", flush=True)


def measure(**settings: Any) -> dict[str, Any]:
    """Run one piece of work and read the process's own accounts."""
    work = pack_lengths if "number" in settings else tokenise_and_pack
    result = work(**settings)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result["peak MB"] = int(status["VmHWM"].split()[0]) / 1024  # ru_maxrss would remember the parent's, before exec
    if settings.get("num_workers", 1) > 1:
        result["peak MB of a worker, at most"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return result


def tokenise_and_pack(
    data: str, data_format: str, tokenizer_file: str, template: str, max_length: int, num_workers: int, cache_dir: str
) -> dict[str, Any]:
    """What `build_shards` and an epoch's packing take."""
    from tokenizers import Tokenizer

    from tuner.dataset import prepare
    from tuner.dataset.packing import pack

    prepare.num_cores = lambda: num_workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is one core
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(tokenizer_file), name_or_path="")
    started, used = time.perf_counter(), cpu_seconds()
    shards = prepare.build_shards(
        data,
        data_format=data_format,
        chat_template=template,
        tokenizer=tokenizer,
        max_length=max_length,
        on_bad_row="skip",
        cache_dir=cache_dir,
    )
    opened, opened_cpu = time.perf_counter() - started, cpu_seconds() - used
    packs = pack(shards.lengths, max_length, (0, 0))
    seconds = cpu_seconds() - used
    kept = shards.ledger.kept.tokens
    return {
        "tokens": kept,
        "build_shards s": opened,
        "build_shards CPU s": opened_cpu,
        "tokens per CPU s, packing included": kept / seconds,
        "packs": len(packs),
        "full": kept / (len(packs) * max_length),
    }


def pack_lengths(number: int, max_length: int) -> dict[str, Any]:
    """Packing alone, over lengths like those of long conversations."""
    import numpy as np

    from tuner.dataset.packing import pack

    lengths = np.random.default_rng(0).lognormal(7, 1.2, number).clip(2, max_length).astype(np.int64)
    used = cpu_seconds()
    packs = pack(lengths, max_length, (0, 0))
    seconds = cpu_seconds() - used
    return {"max_length": max_length, "CPU s": seconds, "full": float(lengths.sum() / (len(packs) * max_length))}


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def generate(path: Path, number: int) -> Path:
    """Conversations of 1 to 8 exchanges, Chinese and English by turns; seeded."""
    choose = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(number):
            words = TOPICS["zh" if row % 2 else "en"].split()
            turns = [("user", 20), ("assistant", 80)] * choose.randint(1, 8)
            messages = [{"role": role, "content": speak(choose, words, longest)} for role, longest in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def speak(choose: random.Random, words: list[str], longest: int) -> str:
    """Up to `longest` words and a number."""
    return f"{' '.join(choose.choices(words, k=choose.randint(3, longest)))} {choose.randint(0, 10**6)}."


def save_tokenizer(path: str, folder: Path) -> str:
    """The fast tokenizer of a model directory as one file."""
    from tuner.model.tokenizer import build_tokenizer

    file = str(folder / "tokenizer.json")
    build_tokenizer(path).backend_tokenizer.save(file)
    return file


if __name__ == "__main__":
    main()
