"""Seconds to load the tokenizer with an empty and a filled cache, and tokens per CPU second beside sentencepiece.

    python benchmarks/tokenizer.py MODEL_DIRECTORY [TEXT_FILE ...]

One thread; CPU seconds of this process, imports excluded. The texts are cut into pieces of 3,000 characters.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sentencepiece

from tuner.model.tokenizer import build_tokenizer


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time that `work` takes in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def count_tokens(encode: Callable[[str], list[int]], texts: list[str]) -> int:
    """Tokens of all texts together."""
    return sum(len(encode(text)) for text in texts)


def main(directory: str, files: list[str]) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TUNER_CACHE"] = cache
        print(f"cold load {cpu_seconds(partial(build_tokenizer, directory)):.2f} s, reading tokenizer.model")
        print(f"warm load {min(cpu_seconds(partial(build_tokenizer, directory)) for _ in range(5)):.2f} s")
        backend = build_tokenizer(directory).backend_tokenizer
    reference = sentencepiece.SentencePieceProcessor(model_file=str(Path(directory, "tokenizer.model")))
    encoders = {
        "tuner": lambda text: backend.encode(text, add_special_tokens=False).ids,
        "sentencepiece": reference.encode,
    }
    for file in files:
        text = Path(file).read_text(encoding="utf-8")[:600_000]
        texts = [text[start : start + 3000] for start in range(0, len(text), 3000)]
        for name, encode in encoders.items():
            num_tokens = count_tokens(encode, texts)
            seconds = min(cpu_seconds(partial(count_tokens, encode, texts)) for _ in range(3))
            rate = num_tokens / seconds
            print(f"{Path(file).name:24} {name:14} {num_tokens:>8,} tokens {rate:>12,.0f} per CPU second")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
