"""Paths that begin with `demo:`: files that are made once, from a seed, and kept in the user's cache."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tuner.errors import UserError

PREFIX = "demo:"
NAMES = ("model", "train.jsonl", "heldout.jsonl", "text.jsonl")
SEED = 0
NUM_TRAIN = 18000
NUM_HELDOUT = 220
NUM_PARAGRAPHS = 3000
NAME_WEIGHT = 5000  # how often the tokenizer sees each name by itself: enough to make it a piece of its own
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "model_type": "internlm2",
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
}


def resolve(path: str) -> str:
    """`demo:NAME` -> the real path of a file that is made at first use; any other path as it is."""
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in NAMES:
        allowed = ", ".join(PREFIX + known for known in NAMES)
        raise UserError(f"There is no {path!r}: the embedded demo has {allowed}.")
    directory = cache_root() / f"demo-{_fingerprint()}"
    try:
        if not directory.is_dir():
            _make(directory)
    except OSError as error:
        raise UserError(
            f"The demo's files cannot be kept in {directory} ({error.strerror}). Set TUNER_CACHE to another directory."
        ) from error
    return str(directory / name)


def cache_root() -> Path:
    """$TUNER_CACHE, or ~/.cache/tuner."""
    given = os.environ.get("TUNER_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "tuner"


def _fingerprint() -> str:
    """A hash of all that decides the content: this package's source and the tokenizer trainer."""
    import sentencepiece

    digest = hashlib.sha256(f"{sentencepiece.__version__} {SEED}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _make(directory: Path) -> None:
    """Write everything beside the directory, then rename: a half-made one is never seen."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".demo-", dir=directory.parent))
    try:
        _write_all(unfinished)
        unfinished.rename(directory)
    except OSError:
        if not directory.is_dir():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_all(directory: Path) -> None:
    from tuner.demo.dialogues import dialogues  # here, so that other paths resolve at no cost
    from tuner.demo.plain_text import paragraphs
    from tuner.demo.tokenizer import VOCAB_SIZE, write_tokenizer

    train = dialogues(NUM_TRAIN, "train", SEED)
    text = paragraphs(NUM_PARAGRAPHS, SEED)
    _write_rows(train, directory / "train.jsonl")
    _write_rows(dialogues(NUM_HELDOUT, "heldout", SEED), directory / "heldout.jsonl")
    _write_rows(text, directory / "text.jsonl")
    model = directory / "model"
    model.mkdir()
    config = {**MODEL_CONFIG, "vocab_size": VOCAB_SIZE}
    (model / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer(_tokenizer_lines(train, text), model)


def _write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _tokenizer_lines(train: list[dict[str, Any]], text: list[dict[str, str]]) -> Iterator[str]:
    """What the tokenizer learns from: schemas, turns and calls as a template writes them, paragraphs.

    The names of the world stand in lines of their own. A city in a question and the same city in a call then
    come out as the same pieces, whatever stands beside it, so that calling a tool is copying.
    """
    names = sorted(_names(), key=len, reverse=True)
    between_names = re.compile("(" + "|".join(map(re.escape, names)) + r"|\d\d?)")
    for row in train:
        functions = [tool["function"] for tool in row.get("tools", ()) if "function" in tool]
        yield json.dumps(functions, ensure_ascii=False)
        for message in row["messages"]:
            role = "environment name=" if message["role"] == "tool" else message["role"]
            yield f"{role}\n"
            yield from between_names.split(message["content"])
            for call in message.get("tool_calls", ()):
                yield from between_names.split(_call_text(call))
    for _ in range(NAME_WEIGHT):
        yield from names
        yield from (f"{number:02d}" for number in range(100))
    for row in text:
        yield from between_names.split(row["text"])


def _call_text(call: dict[str, Any]) -> str:
    if call["type"] == "code_interpreter":
        return f"```python\n{call['code_interpreter']['input']}\n```"
    function = call["function"]
    named = {"name": function["name"], "parameters": json.loads(function["arguments"])}
    return json.dumps(named, ensure_ascii=False)


def _names() -> set[str]:
    from tuner.demo.chinese import CHINESE
    from tuner.demo.dialogues import LANGUAGES
    from tuner.demo.english import ENGLISH
    from tuner.demo.world import WORDS

    names = set(WORDS)
    for wording in LANGUAGES:
        names.update(wording.cities, wording.days, wording.titles, wording.names, wording.foods, wording.hobbies)
        names.update(wording.conditions)
    names.update(ENGLISH.months, CHINESE.months)
    return names
