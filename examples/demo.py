"""The embedded demo behind `make demo`: train a small InternLM2 from scratch, count its tool calls, convert, chat.

    python examples/demo.py                  everything, into a new directory below work_dirs/
    python examples/demo.py --work-dir DIR   the same into DIR

Ends with exit code 1 where fewer than 90 % of the held-out tool calls are exactly right, or where the converted
model's logits are not those of the checkpoint.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tuner.chat.session import ChatSession, generation
from tuner.convert.checkpoint_files import load_trained
from tuner.dataset.chat_template import CHAT_TEMPLATES, render
from tuner.dataset.tokenize import Encoder
from tuner.demo import world
from tuner.demo.chinese import CHINESE
from tuner.demo.english import ENGLISH
from tuner.demo.files import resolve
from tuner.engine.checkpoint import find_checkpoint
from tuner.evaluate.tool_calls import ToolCallReport, evaluate_tool_calls
from tuner.model.build import build_llm
from tuner.model.tokenizer import build_tokenizer

PRESET = "internlm2_tiny-sft_full"
TEMPLATE = CHAT_TEMPLATES["internlm2"]
NEEDED_ACCURACY = 0.90
LOGIT_TOLERANCE = 1e-6
NUM_COMPARED = 8  # conversations whose logits are compared
REQUESTS = ("What is 34 times 18?", "请问，北京周五天气怎么样？")


def main() -> int:
    """Run the demo, or (called by itself, in a fresh process) compare logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("work_dirs") / time.strftime("demo-%Y%m%d-%H%M%S")
    parser.add_argument("--work-dir", type=Path, default=default, help="where everything is written")
    parser.add_argument("--compare", nargs=2, metavar=("MODEL_DIR", "LOGITS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compare:
        return compare_logits(*arguments.compare)
    return demo(arguments.work_dir)


def demo(work_dir: Path) -> int:
    """All of it, in the order in which one would do it by hand; 0 where it holds what it promises."""
    started = time.perf_counter()
    held_out = read_rows("demo:heldout.jsonl")
    say(f"The data: {len(read_rows('demo:train.jsonl'))} dialogues to learn from, {len(held_out)} held out,")
    print(f"made from a seed, with a tokenizer of their own, in {Path(resolve('demo:model')).parent}")

    say("Before: an untrained InternLM2 on the held-out tool calls")
    llm = build_llm("demo:model", weights="random")
    print(f"{sum(weight.numel() for weight in llm.parameters()) / 1e6:.2f} M parameters")
    before = count_tool_calls(llm, held_out)

    run_tuner("train", PRESET, "--work-dir", str(work_dir))

    say("After: the trained InternLM2 on the same calls")
    checkpoint = find_checkpoint(work_dir)
    llm = load_trained(checkpoint).eval()
    after = count_tool_calls(llm, held_out)
    print(after.show_failures(5))

    converted = work_dir / "hf"
    run_tuner("convert", str(work_dir), str(converted))
    logits = work_dir / "logits.safetensors"
    save_file(logits_of(llm, held_out[:NUM_COMPARED]), logits)
    same = subprocess.run([sys.executable, __file__, "--compare", str(converted), str(logits)]).returncode == 0

    say("A chat with the converted model")
    show_chat(converted)

    seconds = time.perf_counter() - started
    say(f"Held-out tool calls exactly right: {before.accuracy:.1%} before, {after.accuracy:.1%} after")
    print(f"model    {converted}\ncurves   {work_dir / 'curves.png'}\ntalk     tuner chat {converted}")
    print(f"{seconds:.0f} s in all, with {torch.get_num_threads()} threads")
    return 0 if same and after.accuracy >= NEEDED_ACCURACY else 1


def say(headline: str) -> None:
    """A headline between the parts."""
    print(f"\n== {headline}", flush=True)


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of the demo."""
    lines = Path(resolve(path)).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run_tuner(*arguments: str) -> None:
    """The command line as a user has it, with its output shown; stops the demo where it fails."""
    say(f"tuner {' '.join(arguments)}")
    command = [str(Path(sys.executable).with_name("tuner")), *arguments]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"`tuner {arguments[0]}` ended with exit code {code}; the demo stops here.")


def count_tool_calls(llm: PreTrainedModel, conversations: list[dict[str, Any]]) -> ToolCallReport:
    """Evaluate and print the table."""
    tokenizer = build_tokenizer("demo:model")
    report = evaluate_tool_calls(llm, tokenizer, conversations, chat_template=TEMPLATE, batch_size=64)
    print(report.table(), flush=True)
    return report


def logits_of(llm: PreTrainedModel, conversations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Logits (1, T, V) of each conversation and its ids (1, T), by name."""
    encoder = Encoder.from_tokenizer(build_tokenizer("demo:model"), TEMPLATE)
    documents = encoder.encode([render(conversation, TEMPLATE) for conversation in conversations])
    tensors = {}
    for number, document in enumerate(documents):
        ids = torch.from_numpy(document.ids.astype("int64"))[None]
        with torch.inference_mode():
            tensors[f"logits.{number}"] = llm(ids).logits.clone()
        tensors[f"ids.{number}"] = ids
    return tensors


def compare_logits(model_dir: str, logits_path: str) -> int:
    """In a fresh process: does the converted model give the logits of the checkpoint?"""
    from transformers import AutoModelForCausalLM

    import tuner.model  # noqa: F401  registers InternLM2 with transformers' Auto classes

    llm = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    saved = load_file(logits_path)
    largest = 0.0
    for number in range(NUM_COMPARED):
        with torch.inference_mode():
            logits = llm(saved[f"ids.{number}"]).logits
        largest = max(largest, (logits - saved[f"logits.{number}"]).abs().max().item())
    print(f"fresh process: the converted model's logits differ by at most {largest:.1e} from the checkpoint's")
    return 0 if largest <= LOGIT_TOLERANCE else 1


def show_chat(model_dir: Path) -> None:
    """Two requests, their calls, what the tools of the demo's world answer, and what the model makes of it."""
    llm, tokenizer = build_llm(str(model_dir)).eval(), build_tokenizer(str(model_dir))
    session = ChatSession(llm, tokenizer, template=TEMPLATE, generation=generation(96, 0.0))
    tools = [world.SCHEMAS["calculator"], world.SCHEMAS["get_weather"]]
    for request in REQUESTS:
        messages: list[dict[str, Any]] = [{"role": "user", "content": request}]
        print(f"user       {request}")
        reply = session.reply(messages, tools, write=lambda text: None)
        if reply.tool_calls:
            call = {"id": "call_1", **reply.tool_calls[0]}
            result = use_tool(call)
            print(f"calls      {call['function']['name']}({call['function']['arguments']})\ntool       {result}")
            messages.append({"role": "assistant", "content": reply.content, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "call_1", "content": result})
            reply = session.reply(messages, tools, write=lambda text: None)
        print(f"assistant  {reply.content}")


def use_tool(call: dict[str, Any]) -> str:
    """What the demo's calculator or weather answers; a model may write anything, so only plain sums are worked out."""
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    try:
        if name == "calculator" and re.fullmatch(r"\d+([+*/-]\d+)+", arguments["expression"]):
            return world.calculate(arguments["expression"])
        if name == "get_weather":
            wording = CHINESE if arguments["city"] in CHINESE.cities else ENGLISH
            city, day = wording.cities.index(arguments["city"]), wording.days.index(arguments["day"])
            condition, low, high = world.weather(city, day, len(wording.conditions))
            found = {"condition": wording.conditions[condition], "low": low, "high": high}
            return json.dumps(found, ensure_ascii=False)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return f"error: {error}"
    return "error: no such tool or sum"


if __name__ == "__main__":
    sys.exit(main())
