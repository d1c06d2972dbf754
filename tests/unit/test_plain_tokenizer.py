"""The plain part of a tokenizer: its tables build what the library reads from JSON, and take little memory."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from chat_samples import bytelevel
from tokenizers import AddedToken, Tokenizer, models, normalizers

from tuner.dataset.plain_tokenizer import PlainTokenizer
from tuner.model.tokenizer import build_tokenizer


def through_json(backend: Tokenizer) -> Tokenizer:
    """A tokenizer without its marks, by the library's own JSON."""
    source = json.loads(backend.to_str())
    bare = {"post_processor": None, "truncation": None, "padding": None, "added_tokens": []}
    return Tokenizer.from_str(json.dumps(source | bare))


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "internlm2", "chatml"])
def test_tables_build_what_the_library_reads_from_json(name: str):
    backend = bytelevel(name).backend_tokenizer
    built = PlainTokenizer.from_state(backend.__getstate__()).build()
    expected, found = json.loads(through_json(backend).to_str()), json.loads(built.to_str())
    marks = {token.content for token in backend.get_added_tokens_decoder().values()}
    vocab = expected["model"].pop("vocab")
    assert found["model"].pop("vocab") == {piece: index for piece, index in vocab.items() if piece not in marks}
    assert found == expected


def test_the_models_own_settings_and_added_white_space_survive():
    settings = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": True}
    model = models.BPE({"<unk>": 0, "a": 1, '"merges":[': 2, " ": 3, "aa": 4}, [("a", "a")], **settings)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("  ", normalized=True, special=False), AddedToken("<mark>", special=True)])
    built = PlainTokenizer.from_state(backend.__getstate__()).build()
    source = json.loads(built.to_str())
    assert {name: source["model"][name] for name in settings} == settings
    assert source["normalizer"] == {"type": "NFC"}
    assert [token["content"] for token in source["added_tokens"]] == ["  "]
    assert built.encode("aa  a").ids == backend.encode("aa  a").ids == [4, 5, 1]
    assert built.token_to_id("<mark>") is None


def test_a_tokenizer_without_merges_is_built_too():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert PlainTokenizer.from_state(backend.__getstate__()).build().encode("ab").ids == [0, 1]


BUILD = """
import pickle, sys
from pathlib import Path
tokenizer = pickle.loads(Path(sys.argv[1]).read_bytes()).build()
lines = Path("/proc/self/status").read_text().splitlines()
print(*(int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))))
"""


def test_a_vocabulary_of_92544_travels_in_3_mb_and_is_built_in_less_than_120(tmp_path: Path, shared_data: Path):
    """Read as JSON by the library, the same takes 170 MB for a moment."""
    backend = build_tokenizer(str(shared_data / "internlm2-7b-hub")).backend_tokenizer
    sent = pickle.dumps(PlainTokenizer.from_state(backend.__getstate__()))
    assert len(sent) < 3_000_000
    (tmp_path / "tables").write_bytes(sent)
    run = subprocess.run([sys.executable, "-c", BUILD, tmp_path / "tables"], capture_output=True, text=True, check=True)
    peak, resident = map(float, run.stdout.split())
    assert peak < 120
    assert resident < 90
