"""What was written, loaded as others load it in a fresh process, beside what it was made from: tensors, ids, logits."""

import gc
import hashlib
import inspect
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

import tuner.model  # noqa: F401 - registers InternLM2
from tuner.convert.record import Checks
from tuner.dataset.jinja_process import limited_here
from tuner.dataset.rendering import Rendering
from tuner.dataset.sample_encoder import SampleEncoder
from tuner.errors import UserError
from tuner.model.tokenizer import build_tokenizer

SHORT = 16  # tokens
NUM_KEPT = 64  # last tokens of a long text whose logits are compared
MAX_FLOPS = {"cpu": 1e13, "cuda": 1e16}  # that a forward pass may cost: a minute or two
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
ROPE = ("rope_parameters", "max_position_embeddings")  # not every model has them
TEXTS = (
    "Hello, world! 1 + 1 = 2.\n\tdef f(x): return x ** 2",
    "你好，世界！今天天气怎么样？",
    "Ünïcödé — “quotes” 🙂 <|im_end|></s>",
)
SAMPLE: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "谢谢！"},
        {"role": "assistant", "content": "不客气。"},
    ]
}


def rounding(dtype: str) -> float:
    """How far logits of weights in `dtype` may be apart, relative to the largest, where sums have another order."""
    return {"float32": 1e-4, "float64": 1e-9}.get(dtype, 0.05)


@dataclass(frozen=True)
class Origin:
    """What a conversion was made from; it is pickled into the fresh process."""

    settings: Path
    """directory with the config.json that must still hold"""
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    """what must have been written, read in another way than by the writer; in any order"""
    model: Callable[[torch.dtype], PreTrainedModel]
    """the model to compare logits with"""
    max_length: int | None = None
    """tokens, as in training; None: as many as the config has positions"""
    words: Path | None = None
    """directory with the tokenizer and template.json that must still hold; None: that of `settings`"""
    computed: frozenset[str] = frozenset()
    """names of tensors that were computed, so that their last bits depend on the order of sums"""
    written: Callable[[Path], PreTrainedModel] | None = None
    """loads what was written, where it is not a model by itself"""
    tolerance: float = 0.0
    """of logits, relative to the largest; 0 means equal bits"""


def check_reload(origin: Origin, draft: Path, digests: Mapping[str, str], checks: Checks, *, verify: bool) -> None:
    """Compare in a fresh process, and note what was compared; without `verify`, note that nothing was.

    Raises:
        UserError: the process was ended from outside, as where memory is short, or a chat template is not to be used.
        RuntimeError: something differs.
    """
    if not verify:
        checks.not_checked.append("the reload in a fresh process (tensors, ids, RoPE, logits), by --no-verify")
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(writer, origin, draft, dict(digests)))
    process.start()
    writer.close()
    try:
        problem, found = reader.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGPROF:
            raise UserError("The chat template was stopped, for it may run for ever; nothing was kept. "
                            "Take it out of the tokenizer's files.") from None  # fmt: skip
        raise UserError(
            "The check of what was written ended without a word, so nothing was kept; was memory short? "
            "--no-verify writes without loading the model."
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(problem, UserError):
        raise UserError(f"{problem} Nothing was kept.") from None
    if problem:
        raise RuntimeError(f"{problem}; nothing was kept")
    checks.checked += found.checked
    checks.not_checked += found.not_checked


def _answer(writer: Connection, origin: Origin, draft: Path, digests: dict[str, str]) -> None:
    try:
        writer.send(("", compare(origin, draft, digests)))
    except UserError as error:
        writer.send((error, None))
    except Exception as error:
        writer.send((f"{type(error).__name__}: {error}" if not isinstance(error, MismatchError) else str(error), None))


class MismatchError(RuntimeError):
    """What was written is not what it was made from."""


def compare(origin: Origin, draft: Path, digests: Mapping[str, str]) -> Checks:
    """Everything; MismatchError at the first difference."""
    disable_progress_bar()
    checks = Checks()
    checks.checked.append(compare_tensors(origin, draft, digests))
    if (draft / "config.json").exists():
        checks.checked.append(compare_rope(origin.settings, draft))
    compare_ids(origin.words or origin.settings, draft, checks)
    compare_logits(origin, draft, checks)
    return checks


def compare_tensors(origin: Origin, draft: Path, digests: Mapping[str, str]) -> str:
    """Each tensor of the files has the bytes of what it was made from, and the sha256 noted while it was written."""
    files = {name: path for path in sorted(draft.glob("*.safetensors")) for name in names_in(path)}
    missing = set(digests) ^ set(files)
    expected = dict.fromkeys(files, "")
    for name, tensor in origin.tensors():
        if name not in files:
            raise MismatchError(f"{name} was not written")
        with safe_open(files[name], framework="pt") as file:
            written = file.get_tensor(name)
        expected[name] = sha256(written)
        is_same = (is_near if name in origin.computed else has_bytes)(written, tensor)
        if not is_same or expected[name] != digests[name] or written.shape != tensor.shape:
            raise MismatchError(f"{name} differs from what it was made from")
    missing |= {name for name, digest in expected.items() if not digest}
    if missing:
        raise MismatchError(f"{sorted(missing)[0]} was not written, or should not have been")
    said = f"; {len(origin.computed)} of them were computed, and are within rounding" if origin.computed else ""
    return f"bytes and sha256 of all {len(files)} tensors against those they were made from{said}"


def has_bytes(written: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the bits are those of the values in the written dtype; in a tenth of the time of a sha256 of each."""
    if written.shape != expected.shape:
        return False
    both = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (written, expected.to(written.dtype))]
    return torch.equal(*both)


def is_near(written: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the rounding of the written dtype, and 1e-6 of the largest value for sums in float32."""
    if written.shape != expected.shape:
        return False
    exact, rounding = expected.double(), torch.finfo(written.dtype).eps
    bound = rounding * exact.abs() + 1e-6 * exact.abs().max()
    return bool(((written.double() - exact).abs() <= bound).all())


def names_in(path: Path) -> list[str]:
    """Of the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def sha256(tensor: torch.Tensor) -> str:
    """Of the bytes of its values."""
    return hashlib.sha256(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())).hexdigest()


def compare_rope(settings: Path, draft: Path) -> str:
    """Both configs give the same rotary embedding and context length."""
    before, after = (AutoConfig.from_pretrained(path, trust_remote_code=False) for path in (settings, draft))
    facts = [{key: getattr(config, key, None) for key in ROPE} for config in (before, after)]
    if facts[0] != facts[1]:
        raise MismatchError(f"The RoPE settings were {facts[0]} and are {facts[1]}")
    return f"RoPE settings ({facts[1]['rope_parameters'] or 'none'})"


def compare_ids(settings: Path, draft: Path, checks: Checks) -> None:
    """The written tokenizer gives the ids of training, by itself and through its chat template."""
    if not any((settings / name).exists() for name in TOKENIZER_FILES):
        checks.not_checked.append("tokenizer ids: there is no tokenizer")
        return
    before, after = build_tokenizer(str(settings)), AutoTokenizer.from_pretrained(draft, trust_remote_code=False)
    for text in TEXTS:
        if before(text)["input_ids"] != after(text)["input_ids"]:
            raise MismatchError(f"The written tokenizer gives other ids for {text!r}")
    checks.checked.append(f"tokenizer ids of {len(TEXTS)} texts")
    note = settings / "template.json"
    chosen = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if chosen.get("chat_template"):
        calls = chosen.get("parallel_tool_calls", "template")
        encoder = SampleEncoder.from_tokenizer(before, Rendering(chosen["chat_template"], parallel_tool_calls=calls))
        [document] = encoder.encode([encoder.segments(SAMPLE)])
        expected, of = document.ids.tolist(), "training"
    elif before.chat_template:
        expected, of = rendered_ids(before), "the source"
    else:
        checks.not_checked.append("ids of a conversation: there is no chat template")
        return
    if rendered_ids(after) != expected:
        raise MismatchError(f"The written chat template gives other ids than those of {of}")
    checks.checked.append(f"ids of a conversation by the chat template, against those of {of}")


def rendered_ids(tokenizer: Any) -> list[int]:
    """The conversation by the tokenizer's own chat template; UserError where that cannot be rendered within limits."""
    try:
        with limited_here():  # it may be another's template, and may run for ever
            return tokenizer.apply_chat_template(SAMPLE["messages"], tokenize=True, return_dict=False)
    except (TemplateError, MemoryError, ValueError, TypeError) as error:
        told = f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")
        raise UserError(f"The chat template cannot be rendered ({told}). Mend it in the tokenizer's files.") from error


def compare_logits(origin: Origin, draft: Path, checks: Checks) -> None:
    """Of a short text and of one of trained length, as far as memory and patience go."""
    place = draft if (draft / "config.json").exists() else origin.settings
    if not (place / "config.json").exists():
        checks.not_checked.append("logits: there is no config.json, so these are weights without a model")
        return
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    dtype = torch.float32 if origin.written else config.dtype
    num_values = count_values(config)
    device, room = best_device(num_values * dtype.itemsize)
    if room < 1.2 * num_values * dtype.itemsize + 1e9:
        needed = num_values * dtype.itemsize / 1e9
        checks.not_checked.append(f"logits: the model takes {needed:.1f} GB, {room / 1e9:.1f} GB of memory are free")
        return
    text = config.get_text_config()
    lengths = affordable(origin.max_length or text.max_position_embeddings, text, num_values, device, checks)
    inputs = [made_ids(length, text.vocab_size) for length in lengths]
    try:
        before = logits_of(origin.model(dtype), inputs, device)
    except UserError as error:
        checks.not_checked.append(f"logits: what to compare with cannot be loaded ({error})")
        return
    after = logits_of(origin.written(draft) if origin.written else load_written(draft, checks), inputs, device)
    for length, old, new in zip(lengths, before, after, strict=True):
        difference = (old.float() - new.float()).abs().max().item()
        if not difference <= origin.tolerance * old.float().abs().max().item():
            raise MismatchError(f"The logits of a text of {length} tokens differ by up to {difference:.3g}")
        checks.checked.append(f"logits of a text of {length:,} tokens: they differ by at most {difference:.1e}")


def count_values(config: PreTrainedConfig) -> int:
    """Of all weights of a model; none is made."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(weight.numel() for weight in llm.parameters())


def load_written(draft: Path, checks: Checks) -> PreTrainedModel:
    """The model as transformers loads it, which must find all that it needs."""
    llm, report = AutoModelForCausalLM.from_pretrained(
        draft, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if unused := sorted(report.pop("unexpected_keys")):
        checks.not_checked.append(f"{len(unused)} tensors that the model does not use, such as {unused[0]}")
    if wrong := [f"{kind}: {sorted(map(str, names))[0]}" for kind, names in report.items() if names]:
        raise MismatchError(f"transformers loads it with {'; '.join(wrong)}")
    return llm


def model_of(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of a config with these tensors by the names of its files, in `dtype`; all must find their place."""
    llm, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
    )
    if wrong := [f"{kind}: {sorted(map(str, names))[0]}" for kind, names in report.items() if names]:
        raise MismatchError(f"What it was made from makes no model: {'; '.join(wrong)}")
    return llm


def best_device(num_bytes: int) -> tuple[torch.device, float]:
    """The GPU where the model fits into it, else the CPU; and the bytes that are free there."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        if free > 1.2 * num_bytes + 1e9:
            return torch.device("cuda"), free
    meminfo = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    [available] = [line.split()[1] for line in meminfo if line.startswith("MemAvailable:")]
    return torch.device("cpu"), int(available) * 1024


def affordable(max_length: int, config: Any, num_values: int, device: torch.device, checks: Checks) -> list[int]:
    """A short length and the trained one, or the longest of its halves that a forward pass has the time for."""
    longest = max_length
    while longest > SHORT and flops(longest, config, num_values) > MAX_FLOPS[device.type]:
        longest //= 2
    if flops(longest, config, num_values) > MAX_FLOPS[device.type]:
        checks.not_checked.append(f"logits: a text of {longest} tokens would take too long on {device.type}")
        return []
    if longest < max_length:
        checks.not_checked.append(f"logits of a text of {max_length:,} tokens: it would take too long on {device.type}")
    return sorted({min(SHORT, longest), longest})


def flops(length: int, config: Any, num_values: int) -> float:
    """Of a forward pass: 2 for each weight and token, 4 for each pair of tokens, layer and hidden unit."""
    return 2 * num_values * length + 4 * config.num_hidden_layers * config.hidden_size * length**2


def made_ids(length: int, vocab_size: int) -> torch.Tensor:
    """(1, length) ids, the same in every process."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def logits_of(llm: PreTrainedModel, inputs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """(1, <=NUM_KEPT, V) of the last tokens of each text, on the CPU; the model is gone afterwards."""
    llm = llm.eval().to(device)
    keep = {"logits_to_keep": NUM_KEPT} if "logits_to_keep" in inspect.signature(llm.forward).parameters else {}
    with torch.inference_mode():
        logits = [llm(ids.to(device), **keep).logits[:, -NUM_KEPT:].cpu() for ids in inputs]
    del llm
    gc.collect()
    return logits
