"""Turns a sentencepiece BPE model into the JSON of the `tokenizers` library, and keeps it in the user's cache."""

import contextlib
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import tokenizers

from tuner.demo.files import cache_root
from tuner.errors import UserError
from tuner.model.internlm2.sentencepiece_model import Piece, SentencePieceModel, parse

FORMAT_VERSION = 1  # raise it whenever the same model file gives another JSON: old cache entries are then passed over
SPACE = "▁"
SPARE = re.compile(r"\[UNUSED_TOKEN_\d+\]")

# The published names of the six chat tokens, for a directory whose tokenizer_config.json does not tell them.
PUBLISHED_VOCAB_SIZE = 92544
PUBLISHED_NAMES = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}


class AddedToken(TypedDict):
    """An entry of `added_tokens` in a tokenizer.json."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


def special(token_id: int, content: str) -> AddedToken:
    """A special token that is matched exactly as it is written."""
    return AddedToken(
        id=token_id, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
    )


def load(model: bytes, declared: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """The fast tokenizer of `model` (the bytes of tokenizer.model), from the cache where it holds it.

    `declared`: the tokens that have a name of their own, by id; ids beyond the model's pieces are appended.
    A damaged cache entry is rebuilt; a cache that cannot be written costs time only.
    """
    path = cache_path(model, declared)
    text = _read(path)
    if text is None:
        text = build_json(parse(model), declared)
        _write(path, text)
    return tokenizers.Tokenizer.from_str(text)


def cache_path(model: bytes, declared: Mapping[int, AddedToken]) -> Path:
    """Where the fast form is kept: `$TUNER_CACHE` or `~/.cache/tuner`, named by all that decides its content."""
    decisive = [FORMAT_VERSION, tokenizers.__version__, sorted(declared.items()), hashlib.sha256(model).hexdigest()]
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return cache_root() / "tokenizers" / f"{key}.json"


def _read(path: Path) -> str | None:
    """The text kept at `path`, or None when there is none or its checksum, on the first line, does not fit."""
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return body.decode() if hashlib.sha256(body).hexdigest().encode() == checksum else None


def _write(path: Path, text: str) -> None:
    body = text.encode()
    unfinished = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(unfinished, path)  # two processes that start together never read half a file
    except OSError as error:
        with contextlib.suppress(OSError):  # the same trouble again is no news
            unfinished.unlink()
        logging.getLogger(__name__).warning(
            "The tokenizer could not be cached (%s) and is built anew in each process. Point TUNER_CACHE at a "
            "directory that can be written.",
            error,
        )


def build_json(model: SentencePieceModel, declared: Mapping[int, AddedToken]) -> str:
    """tokenizer.json of `model`, in the form that tokenizers 0.15 reads too (merges as strings).

    A token with a name of its own, a control piece and a spare piece can only come out of matching an added token,
    never out of merging characters: without `added_tokens` no text gives such an id.
    """
    check_supported(model)
    added = added_tokens(model.pieces, declared)
    names = {token["id"]: token["content"] for token in added}
    vocab = {names.get(i, piece.text): i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise UserError("Two tokens have the same text: a name in added_tokens_decoder is another piece's text.")
    unknown_id = next(i for i, piece in enumerate(model.pieces) if piece.kind == "unknown")
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": names[unknown_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": merges(model.pieces, set(names)),
    }
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": bpe,
    }
    return json.dumps(document, ensure_ascii=False)


def check_supported(model: SentencePieceModel) -> None:
    """UserError naming each property in which `model` is not one of InternLM2's kind."""
    kinds = [piece.kind for piece in model.pieces]
    problems = [
        text
        for broken, text in [
            (model.model_type != "bpe", f"model type {model.model_type} (bpe)"),
            (not model.byte_fallback or kinds.count("byte") != 256, "no byte fallback (256 byte pieces)"),
            (model.charsmap != b"", f"normalizer {model.normalizer} (identity)"),
            (model.add_dummy_prefix, "add_dummy_prefix (off)"),
            (model.remove_extra_whitespaces, "remove_extra_whitespaces (off)"),
            (not model.escape_whitespaces, "no escape_whitespaces (on)"),
            (model.whitespace_as_suffix, "treat_whitespace_as_suffix (off)"),
            (kinds.count("unknown") != 1, f"{kinds.count('unknown')} unknown pieces (1)"),
            ("unused" in kinds, "unused pieces (none)"),
        ]
        if broken
    ]
    if problems:
        raise UserError(
            "This tokenizer.model is not of InternLM2's kind. It has, with what is expected in brackets: "
            + "; ".join(problems)
        )


def added_tokens(pieces: list[Piece], declared: Mapping[int, AddedToken]) -> list[AddedToken]:
    """All tokens that text is searched for before anything is merged, by id."""
    if not declared and len(pieces) == PUBLISHED_VOCAB_SIZE:
        declared = {token_id: special(token_id, name) for token_id, name in PUBLISHED_NAMES.items()}
    nameless = {
        token_id: special(token_id, piece.text)
        for token_id, piece in enumerate(pieces)
        if piece.kind in ("unknown", "control") and token_id not in declared
    }
    added = sorted([*nameless.values(), *declared.values()], key=lambda token: token["id"])
    for token in added:
        if len(token["content"]) < 2:
            raise UserError(
                f"Token {token['id']} is named {token['content']!r} in added_tokens_decoder. A name needs two "
                "characters or more: a single character in a user's text would become that token."
            )
    appended = [token["id"] for token in added if token["id"] >= len(pieces)]
    if appended != list(range(len(pieces), len(pieces) + len(appended))):
        raise UserError(
            f"added_tokens_decoder has the ids {appended} beyond the {len(pieces):,} pieces of tokenizer.model. "
            f"Such ids must follow on from {len(pieces):,} without a gap."
        )
    return added


def merges(pieces: list[Piece], named: set[int]) -> list[str]:
    """The BPE merges that sentencepiece performs on `pieces`, first to last, each as "left right".

    sentencepiece joins the two neighbours whose union has the best score, so every way to cut a piece into two pieces
    is a merge of that piece's rank. User-defined pieces are cut out of the text before, and stay as they are: one of
    two characters is a merge ahead of all others, and none is ever a half. The spare ones stay out of reach.
    """
    normal = {piece.text: -piece.score for i, piece in enumerate(pieces) if piece.kind == "normal" and i not in named}
    first = []
    for i, (text, _, kind) in enumerate(pieces):
        if kind != "user_defined" or i in named or len(text) == 1 or SPARE.fullmatch(text):
            continue
        if len(text) != 2 or text[0] not in normal or text[1] not in normal:
            raise UserError(
                f"tokenizer.model has the user-defined piece {text!r}, which no merge can give. Name it in "
                f'added_tokens_decoder: "{i}": {{"content": {text!r}, "special": false}}'
            )
        first.append(f"{text[0]} {text[1]}")
    ranked = [
        (rank, -cut, text)  # of the cuts of one piece the longest left half first, as transformers ranks them
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    ranked.sort()
    return first + [f"{text[:-minus_cut]} {text[-minus_cut:]}" for _, minus_cut, text in ranked]
