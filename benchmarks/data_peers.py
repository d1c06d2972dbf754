"""The same conversations tokenised, masked and packed by other tools, as their users would, for benchmarks/data.py.

Each function takes the settings of data.py, whose `folder` holds a tokenizer that transformers can load, with the
template as Jinja. It imports what it needs and reads the tokenizer before the clock starts, as tuner does.
"""

import json
import os
from bisect import insort
from collections.abc import Callable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Packed = tuple[int, int, int]  # tokens, trained tokens, packs
Work = Callable[[], Packed]
TRAINED = "{% generation %}", "{% endgeneration %}"  # transformers marks the tokens between as the assistant's


def trl(settings: Settings) -> Work:
    """SFTTrainer's own preparation: one row at a time, the mask by the template, best-fit decreasing."""
    import pyarrow.compute as compute
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(settings)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))

    def work() -> Packed:
        arguments = SFTConfig(
            output_dir=settings["folder"],
            max_length=settings["max_length"],
            packing=True,
            packing_strategy="bfd",
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            dataset_num_proc=None,
        )
        rows = load_dataset("json", data_files=settings["data"], split="train")
        packs = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
        trained = compute.sum(compute.not_equal(flat(packs, "labels"), -100)).as_py()
        return len(flat(packs, "input_ids")), trained, len(packs)

    return work


def torchtune(settings: Settings) -> Work:
    """SFTDataset and PackedDataset: one row at a time, each pack closed when the next row does not fit."""
    from torchtune.data import OpenAIToMessages
    from torchtune.datasets import PackedDataset, SFTDataset
    from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

    folder, marks = Path(settings["folder"]), settings["marks"]
    tokenizer = HuggingFaceBaseTokenizer(
        str(folder / "tokenizer.json"), tokenizer_config_json_path=str(folder / "tokenizer_config.json")
    )

    def to_tokens(sample: dict[str, Any]) -> dict[str, Any]:
        tokens, mask = tokenizer.encode(marks["begin"], add_bos=False, add_eos=False), [True]
        for message in sample.pop("messages"):
            text = f"{marks['before']}{message.role}{marks['after']}{message.text_content}{marks['end']}"
            ids = tokenizer.encode(text + marks["separator"], add_bos=False, add_eos=False)
            tokens += ids
            mask += [message.masked] * len(ids)
        return {"tokens": tokens, "mask": mask}

    def work() -> Packed:
        rows = SFTDataset(
            source="json",
            data_files=settings["data"],
            split="train",
            message_transform=OpenAIToMessages(),
            model_transform=to_tokens,
        )
        packs = PackedDataset(rows, max_seq_len=settings["max_length"]).packs
        padding = sum(int((pack["tokens"] == 0).sum()) for pack in packs)  # id 0 is <unk>, which no row holds
        trained = sum(int((pack["labels"] != -100).sum()) for pack in packs)
        return len(packs) * settings["max_length"] - padding, trained, len(packs)

    return work


def first_fit(settings: Settings) -> Work:
    """`datasets.map` in batches with the template's mask, then first-fit decreasing over the lengths."""
    import pyarrow.compute as compute
    from datasets import load_dataset

    tokenizer = load_tokenizer(settings)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": encoded["input_ids"], "trained": encoded["assistant_masks"]}

    def work() -> Packed:
        rows = load_dataset("json", data_files=settings["data"], split="train")
        rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
        lengths = [len(ids) for ids in rows.with_format("numpy")["input_ids"]]
        rooms: list[int] = []
        for length in sorted(lengths, reverse=True):
            place = next((place for place, room in enumerate(rooms) if room >= length), None)
            insort(rooms, (settings["max_length"] if place is None else rooms.pop(place)) - length)
        return sum(lengths), compute.sum(flat(rows, "trained")).as_py(), len(rooms)

    return work


PEERS = {"TRL": trl, "torchtune": torchtune, "datasets.map + first-fit": first_fit}
NEEDS = {"TRL": "trl", "torchtune": "torchtune", "datasets.map + first-fit": "datasets"}


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer in `folder`, in the class that every transformers has."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(settings["folder"])


def flat(rows: Any, column: str) -> Any:
    """A column of lists, end to end."""
    import pyarrow.compute as compute

    return compute.list_flatten(rows.data.column(column))


def save_tokenizer(path: str, folder: Path, marks: dict[str, str]) -> str:
    """A model's fast tokenizer as every tool reads it; the template, not the tokenizer, begins a text."""
    from tokenizers import Tokenizer

    from tuner.model.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(path)
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    file = folder / "tokenizer.json"
    Tokenizer.from_str(json.dumps({**source, "post_processor": None})).save(str(file), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": as_jinja(marks)}
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **names}), encoding="utf-8")
    return str(file)


def as_jinja(marks: dict[str, str]) -> str:
    """Plain turns with the assistant's words and the mark that ends them as what is trained."""
    quoted = {name: json.dumps(mark) for name, mark in marks.items()}
    header = "{{ " + f"{quoted['before']} + message['role'] + {quoted['after']}" + " }}"
    words = "{{ message['content'] + " + quoted["end"] + " }}"
    separator = "{{ " + quoted["separator"] + " }}"
    trained = TRAINED[0] + words + TRAINED[1]
    body = "{% if message['role'] == 'assistant' %}" + trained + "{% else %}" + words + "{% endif %}"
    return "{{ " + quoted["begin"] + " }}{% for message in messages %}" + header + body + separator + "{% endfor %}"


def environment(folder: str) -> dict[str, str]:
    """One thread, nothing from the network, and the caches of `datasets` where they are removed."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    caches = {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/datasets"}
    threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    return {**os.environ, **quiet, **caches, **threads, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
