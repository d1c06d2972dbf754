"""Seconds and memory of `tuner convert` beside the whole-model way, and of `tuner convert merge` beside peft's merge.

"transformers" and "XTuner's" are two whole-model ways: weights loaded in bf16 and saved, or a .pth read into a loaded
base. A Llama of some 0.43 G weights: a checkpoint in fp32 becomes 0.87 GB in bf16; a LoRA is merged into a bf16 base of
that size. Every row is a process of its own, several times in turn; the median is shown. Seconds begin when everything
is imported and end when the files are written. Ours are then on the disk (fsync), the sha256 of the checkpoint's files
has been compared and that of each tensor noted, at a second or so a GB; "writing alone" leaves all that out, as the
others do, and transformers' list of renamed tensors, which takes the others about a CPU second once. Memory is the peak
of the whole process, imports included; allowed is 1.5 x the largest tensor + 500 MB. The check by loading is left out.

    python benchmarks/convert.py [--hidden 1024] [--layers 16] [--times 3] [--directory DIR]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tuner.convert.adapter_files import read_adapter
from tuner.convert.checkpoint_files import checkpoint_tensors
from tuner.convert.merge import merge, piece_of
from tuner.convert.model_files import model_tensors
from tuner.convert.sharding import header_of, one_thread, write_fully
from tuner.convert.tensors import Piece, cast
from tuner.convert.to_hf import convert
from tuner.dataset.cache import hash_file
from tuner.demo.files import resolve
from tuner.engine.checkpoint import Entry, write_manifest
from tuner.engine.snapshot import versions
from tuner.model.tokenizer import build_tokenizer

VOCABULARY = 92544
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_inputs(folder: Path, hidden: int, layers: int) -> None:
    """A checkpoint with fp32 weights, a base in bf16, and an adapter of rank 16."""
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=4, vocab_size=VOCABULARY)  # fmt: skip
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    make_checkpoint(folder / "step_00000001", llm)
    torch.save(llm.state_dict(), folder / "weights.pth")
    llm.to(torch.bfloat16).save_pretrained(folder / "base")
    lora = get_peft_model(llm, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=TARGETS))
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    lora.save_pretrained(folder / "adapter")


def make_checkpoint(checkpoint: Path, llm: torch.nn.Module) -> None:
    """What a run leaves, but for the optimizer."""
    hf = checkpoint / "hf"
    llm.config.save_pretrained(hf)
    build_tokenizer(resolve("demo:model")).save_pretrained(hf)
    (hf / "template.json").write_text(json.dumps({"chat_template": "internlm2"}))
    (checkpoint / "state.json").write_text(json.dumps({"settings": {"max_length": 2048}, "strategy": {"step": 1}}))
    save_file(dict(llm.named_parameters()), checkpoint / "model-00000-of-00001.safetensors", metadata={"format": "pt"})
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    entries = {
        path.relative_to(checkpoint).as_posix(): Entry(size=path.stat().st_size, sha256=hash_file(path))
        for path in paths
    }
    write_manifest(checkpoint, entries, {"step": 1, "versions": versions()})


def whole_model(folder: Path, out: Path) -> None:
    """Load everything, save everything."""
    weights = next((folder / "step_00000001").glob("model-*"))
    place = out.with_name("linked")
    shutil.copytree(folder / "step_00000001" / "hf", place)
    (place / "model.safetensors").symlink_to(weights)
    AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).save_pretrained(out)


def through_pickle(folder: Path, out: Path) -> None:
    """XTuner's steps (pth_to_hf): load the base, read a pickle of all weights into it, save everything."""
    llm = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    llm.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    llm.bfloat16().save_pretrained(out)


def streamed(folder: Path, out: Path) -> None:
    """Ours."""
    convert(folder / "step_00000001", out, dtype="bfloat16", verify=False)


def writing_alone(folder: Path, out: Path) -> None:
    """Ours, without sha256, fsync and the files beside the weights."""
    write_unhashed(
        out, [cast(tensor, torch.bfloat16) for tensor in checkpoint_tensors(folder / "step_00000001").values()]
    )


def write_unhashed(out: Path, pieces: Sequence[Piece]) -> None:
    """The same file, of blocks that are only written."""
    with one_thread(), out.open("xb", buffering=0) as file:
        write_fully(file, memoryview(header_of(pieces)))
        for piece in pieces:
            for block in piece.blocks():
                write_fully(file, memoryview(block.view(-1).view(torch.uint8).numpy()))


def peft_merge(folder: Path, out: Path) -> None:
    """As peft's documentation does it."""
    from peft import PeftModel

    llm = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(llm, folder / "adapter").merge_and_unload().save_pretrained(out)


def streamed_merge(folder: Path, out: Path) -> None:
    """Ours, with the sums in float32."""
    merge(folder / "base", folder / "adapter", out, verify=False)


def merging_alone(folder: Path, out: Path) -> None:
    """Ours, without sha256, fsync and the files beside the weights."""
    change = read_adapter(folder / "adapter")
    write_unhashed(out, [piece_of(tensor, change, None) for tensor in model_tensors(folder / "base").values()])


PAIRS: dict[str, dict[str, Callable[[Path, Path], None]]] = {
    "checkpoint": {
        "transformers": whole_model,
        "XTuner's": through_pickle,
        "tuner": streamed,
        "writing alone": writing_alone,
    },
    "merge": {"peft": peft_merge, "tuner": streamed_merge, "writing alone": merging_alone},
}


def measure(pair: str, way: str, folder: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak bytes of one way, in this process."""
    import peft  # noqa: F401 - before the clock starts, for both

    with tempfile.TemporaryDirectory(dir=folder) as name:
        started, cpu = time.perf_counter(), time.process_time()
        PAIRS[pair][way](folder, Path(name) / "out")
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return seconds, cpu, peak_bytes()


def peak_bytes() -> int:
    """Most bytes that this process has held; getrusage would tell the parent's where that held more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(kilobytes) * 1024


def measure_apart(pair: str, way: str, folder: Path) -> tuple[float, ...]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--pair", pair, "--way", way, "--directory", str(folder)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return tuple(map(float, lines.splitlines()[-1].split()))


def main() -> None:
    """Print the table; with --way, measure one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="On the disk that is to be measured.  [default: temporary]")
    parser.add_argument("--pair", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(*measure(arguments.pair, arguments.way, arguments.directory))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        make_inputs(Path(name), arguments.hidden, arguments.layers)
        size = sum(path.stat().st_size for path in (Path(name) / "base").glob("*.safetensors"))
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, {size / 1e9:.2f} GB written in bf16")
        show(Path(name), arguments.times, {"checkpoint": VOCABULARY * arguments.hidden * 4,
                                           "merge": VOCABULARY * arguments.hidden * 2})  # fmt: skip


def show(folder: Path, times: int, largest: dict[str, int]) -> None:
    """The table; `largest` is the bytes of the largest tensor that is read."""
    print(f"\n{'':12}{'way':14}{'s':>8}{'times':>8}{'CPU s':>8}{'times':>8}{'peak MB':>9}{'allowed':>9}")
    for pair, ways in PAIRS.items():
        runs = [{way: measure_apart(pair, way, folder) for way in ways} for _ in range(times)]
        median = {way: [statistics.median(run[way][place] for run in runs) for place in range(3)] for way in ways}
        base = next(iter(median.values()))
        for way, (seconds, cpu, peak) in median.items():
            allowed = f"{1.5 * largest[pair] / 1e6 + 500:9.0f}" if way == "tuner" else ""
            figures = f"{seconds:8.2f}{base[0] / seconds:8.1f}{cpu:8.2f}{base[1] / cpu:8.1f}"
            print(f"{pair:12}{way:14}{figures}{peak / 1e6:9.0f}{allowed}", flush=True)


if __name__ == "__main__":
    main()
