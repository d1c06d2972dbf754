"""A small sentencepiece model like InternLM2's, trained on the spot on text that is made here."""

import io
import json
import random
from pathlib import Path

import sentencepiece

SPECIALS = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
NUM_SPARE = 10  # the last six carry the names above
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHINESE = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以"
CHINESE += "生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手"
AUTO_MAP = {
    "AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", "tokenization_internlm2_fast.InternLM2TokenizerFast"]
}


def made_text(seed: int, num_lines: int) -> list[str]:
    """Lines of invented words, Chinese characters, numbers and something like code."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choice(["ba", "ne", "shi", "th", "or", "ing", "k", "e", "st"]) for _ in range(rng.randint(1, 4)))
    ]
    words += ["".join(rng.choice("aeiounrstlkm") for _ in range(rng.randint(1, 6))) for _ in range(300)]
    phrases = ["".join(rng.choices(CHINESE, k=rng.randint(1, 4))) for _ in range(300)]
    forms = [
        lambda: " ".join(rng.choices(words, k=rng.randint(1, 12))) + rng.choice([".", "!", "?\n", "\n\n", ""]),
        lambda: "".join(rng.choices(phrases, k=rng.randint(1, 9))) + rng.choice(["。", "——", "……", "—", "…", "，"]),
        lambda: f"def {rng.choice(words)}(x):\n    return x ** {rng.randint(0, 9999)} - 3.14\n\treturn\r\n",
        lambda: json.dumps({rng.choice(words): rng.random(), "name": rng.choice(phrases)}, ensure_ascii=False),
        lambda: " " * rng.randint(1, 9) + rng.choice("=-*_#") * rng.randint(1, 20) + "\t" * rng.randint(0, 3),
    ]
    return [rng.choice(forms)() for _ in range(num_lines)]


def train_model(**settings: object) -> bytes:
    """The bytes of a tokenizer.model; `settings` go to sentencepiece's trainer."""
    model = io.BytesIO()
    ours = {
        "model_type": "bpe",
        "vocab_size": 1000,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "user_defined_symbols": ["——", "……", "Ａ", "ｂ"],  # InternLM2 has such pieces too
        "num_threads": 1,
        "minloglevel": 2,
    }
    lines = iter(made_text(0, 3000))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**ours, **settings})
    return model.getvalue()


def spare_piece(text: str) -> bytes:
    """A user-defined piece that may be appended to a model: field 1 {1: text, 2: score 0, 3: kind 4}."""
    body = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15\0\0\0\0" + b"\x18\x04"
    return b"\x0a" + bytes([len(body)]) + body


def write_directory(directory: Path, **settings: object) -> Path:
    """A model directory as on the hub: tokenizer files, config.json, and an auto_map that names remote code."""
    directory.mkdir(parents=True, exist_ok=True)
    model = train_model(**settings)
    spare = b"".join(spare_piece(f"[UNUSED_TOKEN_{i}]") for i in range(NUM_SPARE))
    (directory / "tokenizer.model").write_bytes(model + spare)
    size = 1000 + NUM_SPARE
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {0: "<unk>", 1: "<s>", 2: "</s>"} | dict(enumerate(SPECIALS, start=size - len(SPECIALS)))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {"content": name, **flags} for index, name in named.items()},
        "additional_special_tokens": SPECIALS[::-1],
        "auto_map": AUTO_MAP,
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 4096,
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    llm = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "vocab_size": size}
    llm["auto_map"] = {"AutoConfig": "configuration_internlm2.InternLM2Config"}
    (directory / "config.json").write_text(json.dumps(llm))
    return directory
