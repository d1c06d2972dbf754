"""Tokenise and pack beside TRL, torchtune and `datasets.map`: tokens per CPU second, peak memory, and the second start.

    python benchmarks/data.py                                   # a generated corpus, the demo's tokenizer
    python benchmarks/data.py --data F.jsonl --format openai --tokenizer DIR --workers 2

Each measurement is a process of its own on one thread, so that a peak is of that work alone; the clock starts when the
modules are imported and the tokenizer is read. tuner is given a tokenizer.json: torch and transformers, which training
needs and this does not, stay out of its memory; the peers cannot do without. Peers that are not installed are left out.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_peers import NEEDS, PEERS, environment, save_tokenizer

TOPICS = {
    "en": "the model reads a line of text and writes an answer with reasons about weather numbers travel music code",
    "zh": "模型 读取 一行 文字 然后 写出 带有 理由 的 回答 关于 天气 数字 旅行 音乐 代码 以及 每天 的 生活",
}
OWN = "tuner"
WATCH_SECONDS = 0.02


def main() -> None:
    """Measure every tool twice, then packing alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a data file; without it, conversations are generated")
    parser.add_argument("--format", default="openai", help="data_format of the file; peers read openai alone")
    parser.add_argument("--rows", type=int, default=6000, help="conversations to generate")
    parser.add_argument("--tokenizer", default="demo:model", help="model directory")
    parser.add_argument("--template", default="internlm2", help="chat_template")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=1, help="processes of tuner; the peers have one")
    parser.add_argument("--rounds", type=int, default=1, help="first starts of each tool; the best counts")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    compare(options)
    for number, max_length in ((1_000_000, 4096), (1_000_000, 200_000), (10_000_000, 32_768)):
        result = run({"name": "packing", "number": number, "max_length": max_length}, tempfile.gettempdir())
        print(f"packing {number:,} lengths into {max_length:,}: {result['CPU s']:.1f} CPU s, {result['full']:.5f} full")


def compare(options: argparse.Namespace) -> None:
    """A line of figures for each tool, and the ratio to the best of the others."""
    names = [name for name in PEERS if options.format == "openai" and importlib.util.find_spec(NEEDS[name])]
    print(f"{'':26}{'tokens':>12}{'trained':>12}{'per CPU s':>11}{'peak MB':>9}{'full':>9}{'2nd start s':>13}")
    best: dict[str, float] = {}
    for name in [OWN, *names]:
        first, second = first_and_second(name, options)
        best[name] = first["tokens"] / first["CPU s"]
        full = first["tokens"] / (first["packs"] * options.max_length)
        line = f"{name:26}{first['tokens']:12,}{first['trained']:12,}{best[name]:11,.0f}{first['peak MB']:9.0f}"
        print(f"{line}{full:9.4f}{second['s']:13.2f}", flush=True)
        if first["peak MB of a worker"]:
            print(f"{'  a worker, at most':26}{first['peak MB of a worker']:44.0f}")
    if names:
        ratio = best[OWN] / max(best[name] for name in names)
        print(f"{OWN} makes {ratio:.2f} x the tokens per CPU second of the best of the others")


def first_and_second(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best of some first starts, each in an empty directory, and a second start after the last."""
    from tuner.dataset.templates import CHAT_TEMPLATES

    template = CHAT_TEMPLATES[options.template]
    marks = {"begin": template.begin, "before": template.before_role, "after": template.after_role}
    marks |= {"end": template.turn_end, "separator": template.separator}
    firsts = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "name": name,
                "data": options.data or str(generate(Path(folder) / "rows.jsonl", options.rows)),
                "data_format": options.format,
                "template": options.template,
                "marks": marks,
                "max_length": options.max_length,
                "num_workers": options.workers,
                "folder": folder,
            }
            save_tokenizer(options.tokenizer, Path(folder), marks)
            time.sleep(2.5)  # the digest of a file younger than 2 s is not kept for the second start
            firsts.append(run(settings, folder))
            second = run(settings, folder)
    return min(firsts, key=lambda first: first["CPU s"]), second


def run(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder))
    if done.returncode:
        raise SystemExit(f"{settings['name']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(**settings: Any) -> dict[str, Any]:
    """Run one piece of work and read the process's own accounts."""
    if settings["name"] == "packing":
        return pack_lengths(settings["number"], settings["max_length"])
    work = {**PEERS, OWN: tokenise_and_pack}[settings["name"]](settings)
    watch = Watch()
    started, used = time.perf_counter(), cpu_seconds()
    tokens, trained, packs = work()
    elapsed, seconds = time.perf_counter() - started, cpu_seconds() - used
    return {
        "tokens": tokens,
        "trained": trained,
        "packs": packs,
        "s": elapsed,
        "CPU s": seconds,
        "peak MB": peak_megabytes("self"),  # ru_maxrss would remember the parent's, before exec
        "peak MB of a worker": watch.end(),
    }


class Watch:
    """Looks again and again at the peak memory of this process's children: it cannot be asked for after their end."""

    def __init__(self) -> None:
        self._peak, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _look(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self._peak = max([self._peak, *map(peak_megabytes, children)])


def peak_megabytes(process: str) -> float:
    """The largest memory that a process has had; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM"].split()[0]) / 1024 if "VmHWM" in status else 0.0


def tokenise_and_pack(settings: dict[str, Any]) -> Any:
    """What `build_shards` and an epoch's packing take."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(settings["folder"]) / "tokenizer.json"))
    from tuner.dataset import prepare
    from tuner.dataset.packing import pack

    prepare.num_cores = lambda: settings["num_workers"]

    def work() -> tuple[int, int, int]:
        shards = prepare.build_shards(
            settings["data"],
            data_format=settings["data_format"],
            chat_template=settings["template"],
            tokenizer=SimpleNamespace(backend_tokenizer=tokenizer, name_or_path=""),
            max_length=settings["max_length"],
            on_bad_row="skip",
            cache_dir=settings["folder"],
        )
        packs = pack(shards.lengths, settings["max_length"], (0, 0))
        return shards.ledger.kept.tokens, shards.ledger.trained, len(packs)

    return work


def pack_lengths(number: int, max_length: int) -> dict[str, Any]:
    """Packing alone, over lengths like those of long conversations."""
    import numpy as np

    from tuner.dataset.packing import pack

    lengths = np.random.default_rng(0).lognormal(7, 1.2, number).clip(2, max_length).astype(np.int64)
    used = cpu_seconds()
    packs = pack(lengths, max_length, (0, 0))
    seconds = cpu_seconds() - used
    return {"CPU s": seconds, "full": float(lengths.sum() / (len(packs) * max_length))}


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
            turns = [("user", 20), ("assistant", 100)] * choose.randint(1, 8)
            messages = [{"role": role, "content": speak(choose, words, longest)} for role, longest in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def speak(choose: random.Random, words: list[str], longest: int) -> str:
    """Up to `longest` words and a number."""
    return f"{' '.join(choose.choices(words, k=choose.randint(3, longest)))} {choose.randint(0, 10**6)}."


if __name__ == "__main__":
    main()
