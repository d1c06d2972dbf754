"""InternLM2's tokenizer: built from `tokenizer.model`, with no network, no remote code and no protobuf."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from tuner.errors import UserError
from tuner.model.internlm2 import fast_form

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# What tokenizer_config.json names where no remote code lies beside it: the one class that every transformers has, and
# that takes tokenizer.json as it is.
PORTABLE_CLASS = "PreTrainedTokenizerFast"


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """Text -> ids as the published InternLM2 tokenizer gives them.

    `tokenizer(text)` puts `<s>` in front (`add_bos_token`), so pass `add_special_tokens=False` for text that a chat
    template has rendered. Batches are padded on the right, for training; set `padding_side = "left"` to generate.
    `tokenizer(text, split_special_tokens=True)` encodes the names of special tokens as the plain text they are.

    Two known differences from sentencepiece: a NUL character is piece 354 here as in sentencepiece up to 0.2.0
    (0.2.1 and later give the byte piece 3), and `[UNUSED_TOKEN_5]` written in a text is plain text here.
    A literal U+2581 in a text is decoded as a space, as sentencepiece does.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"

    def __init__(
        self,
        vocab_file: str | None = None,
        *,
        added_tokens_decoder: dict[int, tokenizers.AddedToken] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        auto_map: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read `vocab_file`, a tokenizer.model.

        Args:
            added_tokens_decoder: the tokens with a name of their own, by id; by default the six published chat tokens
                where the model has 92,544 pieces.
            auto_map: the remote code that lay beside `vocab_file`; it is copied on saving and never run.

        Raises:
            UserError: the file is missing, damaged or of another kind, or a special token has no id.
        """
        if vocab_file is None or not Path(vocab_file).is_file():
            where = kwargs.get("name_or_path") or vocab_file or "the given directory"
            raise UserError(f"There is no {MODEL_FILE} in {where}. Copy it from the model that this one comes from.")
        # Kept, so that saving works after the directory is gone, and gives the same bytes.
        self._model_bytes = Path(vocab_file).read_bytes()
        self._auto_map_found = auto_map
        # Set before the base class looks: it would deep-copy a tokenizer that it is handed, which takes a second.
        self._tokenizer = fast_form.load(self._model_bytes, _declared(added_tokens_decoder or {}))
        for name, default in zip(NAMED, ("<s>", "</s>", "</s>", "<unk>")):
            kwargs.setdefault(name, default)
        kwargs.setdefault("extra_special_tokens", kwargs.pop("additional_special_tokens", None) or self._chat_tokens())
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        self._check_special_tokens_have_ids(kwargs)
        super().__init__(vocab_file=vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    def _chat_tokens(self) -> list[str]:
        """The special tokens besides `<unk>`, `<s>` and `</s>`, last id first, as published."""
        found = self._tokenizer.get_added_tokens_decoder()
        return [found[i].content for i in sorted(found, reverse=True) if found[i].special and i > 2]

    def _check_special_tokens_have_ids(self, kwargs: dict[str, Any]) -> None:
        """The base class would give a new id, outside the embedding, to each special token that it does not find."""
        wanted = [kwargs[name] for name in NAMED if kwargs[name] is not None] + list(kwargs["extra_special_tokens"])
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        lost = [str(token) for token in wanted if str(token) not in known]
        if lost:
            raise UserError(
                f"{CONFIG_FILE} calls {', '.join(lost)} special but gives no id. Give one in its "
                f"added_tokens_decoder; there are {', '.join(sorted(known))}."
            )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Constructor arguments of `from_pretrained`: tokenizer.model alone decides, never a tokenizer.json beside it.

        transformers drops add_bos_token and add_eos_token where there is a tokenizer.json; they are read again here.
        """
        kwargs.pop("tokenizer_file", None)
        vocab_file = kwargs.get("vocab_file")
        if vocab_file is not None:
            config = read_config(Path(vocab_file).parent)
            for name in ("add_bos_token", "add_eos_token"):
                if name in config:
                    kwargs.setdefault(name, config[name])
        return kwargs

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write tokenizer.model, byte for byte as it was read."""
        path = Path(save_directory, f"{filename_prefix}-{MODEL_FILE}" if filename_prefix else MODEL_FILE)
        path.write_bytes(self._model_bytes)
        return (str(path),)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> tuple[str, ...]:
        """Write the files of a published model, and a tokenizer.json, all readable from transformers 4.38 on.

        Remote code that lay beside the model file is copied and `auto_map` kept; without it there is no `auto_map`.
        Gives the paths written. Saving what was saved gives the same bytes.
        """
        if kwargs.get("push_to_hub") or kwargs.get("filename_prefix"):
            raise UserError("save_pretrained writes plain files only. Save, then run: hf upload REPOSITORY DIRECTORY")
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        remote_code = self._remote_code()
        for source in remote_code:
            if source.parent.resolve() != directory.resolve():
                shutil.copyfile(source, directory / source.name)
        # transformers prefers this file of its own to tokenizer_config.json's entry: one from before must not win.
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        texts = {
            CONFIG_FILE: _pretty(self._published_config(self._auto_map_found if remote_code else None)),
            "special_tokens_map.json": _pretty(self._published_special_tokens()),
            "tokenizer.json": portable_json(self._tokenizer),
        }
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8", newline="\n")
        written = [*texts, *(source.name for source in remote_code)]
        return (*self.save_vocabulary(str(directory)), *(str(directory / name) for name in written))

    def _remote_code(self) -> list[Path]:
        """The published tokenizer's own .py files, where they lie beside the model file; [] unless all do."""
        directory = Path(self.vocab_file).parent
        references = (self._auto_map_found or {}).get("AutoTokenizer") or []
        modules = [str(reference).split(".")[0] for reference in references if reference]
        files = [directory / f"{module}.py" for module in modules if module.isidentifier()]
        return files if len(files) == len(modules) and all(file.is_file() for file in files) else []

    def _published_config(self, auto_map: dict[str, Any] | None) -> dict[str, Any]:
        """tokenizer_config.json with the published keys, out of the tokenizer as it is now."""
        config = {
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "added_tokens_decoder": {
                str(index): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
                for index, token in sorted(self.added_tokens_decoder.items())
            },
            "additional_special_tokens": [str(token) for token in self.extra_special_tokens],
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "decode_with_prefix_space": False,
            "model_max_length": self.model_max_length,
            "sp_model_kwargs": None,
            "tokenizer_class": type(self).__name__ if auto_map else PORTABLE_CLASS,
            **{name: getattr(self, name) for name in NAMED},
        }
        if auto_map:
            config["auto_map"] = auto_map
        if self.padding_side != type(self).padding_side:
            config["padding_side"] = self.padding_side
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [{"name": name, "template": text} for name, text in self.chat_template.items()]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    def _published_special_tokens(self) -> dict[str, Any]:
        """special_tokens_map.json."""
        plain = {flag: False for flag in FLAGS if flag != "special"}
        named = {name: {"content": getattr(self, name), **plain} for name in NAMED if getattr(self, name) is not None}
        return {"additional_special_tokens": [str(token) for token in self.extra_special_tokens], **named}


def _declared(decoder: dict[int, tokenizers.AddedToken]) -> dict[int, fast_form.AddedToken]:
    return {
        index: fast_form.AddedToken(
            id=index,
            content=token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
        for index, token in decoder.items()
    }


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json of `directory`; {} where there is none."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not the settings of a tokenizer. Download it again.")
    return config


def portable_json(tokenizer: tokenizers.Tokenizer) -> str:
    """tokenizer.json as tokenizers 0.15 (transformers 4.38) reads it: merges as strings, no newer keys."""
    document = json.loads(tokenizer.to_str())
    model = document["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    model.pop("ignore_merges", None)
    document["truncation"] = document["padding"] = None  # what the last call asked for is no part of the tokenizer
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"


def _pretty(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def register() -> None:
    """Let `AutoTokenizer.from_pretrained` take this class for InternLM2, whatever code a directory brings along.

    The class is entered by name in transformers' tables. `AutoTokenizer.register` would tie it to the configuration
    class, and a directory's remote code would then be run when the caller passes trust_remote_code=True; for a class
    that is known by name, remote code is never considered.
    """
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES[InternLM2Tokenizer.__name__] = InternLM2Tokenizer
    # transformers has "TokenizersBackend" here, its own conversion, which needs protobuf.
    tokenization_auto.TOKENIZER_MAPPING_NAMES["internlm2"] = InternLM2Tokenizer.__name__
