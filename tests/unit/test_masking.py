"""Tokens and passwords reach nothing that is kept or shown: configs, settings, messages, traces, scripts."""

import ast
import re

import pytest

from tuner.config import PRESETS
from tuner.errors import UserError
from tuner.failures import note, read_failure, tell
from tuner.launch.options import Options
from tuner.launch.slurm import script
from tuner.masking import MASK, mask, mask_source, secret_values

HF = "hf_" + "aBcDeFgH" * 4 + "xy"
SECRETS = {
    f"token {HF} was refused": HF,
    "key sk-proj-Ab12Cd34Ef56Gh78Ij90": "Ab12Cd34Ef56",
    "https://anna:pa55word@host.example/data": "pa55word",
    "s3://:pa55word@host/bucket": "pa55word",
    "Authorization: Bearer abcdef0123456789": "abcdef0123456789",
    "password=opensesame": "opensesame",
    '{"api_key": "opensesame"}': "opensesame",
    "WANDB_API_KEY=opensesame tuner train": "opensesame",
    "aws AKIA" + "ABCDEFGH12345678": "ABCDEFGH12345678",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----": "MIIEow",
    "hubToken: opensesame": "opensesame",
    "token=Zm9vYmFyQmF6UXV4MTIz": "Zm9vYmFyQmF6UXV4MTIz",
}
HARMLESS = [
    "num_loss_tokens=1234 max_new_tokens: 512",
    'eos_token = "</s>", pad_token="<pad>", stop_token: <|im_end|>',
    "sort_key=length, text_key=content",
    "http://host.example:8080/path@2",
    "sk-learn-is-no-key-at-all-here",
    "key and token are words: secretary",
    "/home/anna/internlm2-chat-7b/model-00001-of-00002.safetensors",
    'tokenizer_path="/models/internlm2"',
]


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_secrets_are_masked(text, secret):
    assert secret not in mask(text, {})
    assert MASK in mask(text, {})


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert mask(text, {}) == text


def test_values_of_the_environment_are_masked_wherever_they_stand():
    environment = {"HF_TOKEN": "plainwords", "MY_KEY": "otherwords", "KEY_FILE": "/etc/key", "SHORT_KEY": "abc"}
    assert secret_values({**environment, "HOME": "/root/home", "TOKENIZERS_PARALLELISM": "false000"}) == {
        "plainwords", "otherwords",
    }  # fmt: skip
    assert mask("a plainwords b otherwords", environment) == f"a {MASK} b {MASK}"


def test_a_config_loses_its_secrets_and_nothing_else():
    source = (
        '"""A config: 中文."""\n'
        "import os\n\n"
        'lr = 2e-5  # not hf_' + "b" * 34 + " but\n"
        'hub_token: str = "opensesame"  # 中文\n'
        'from_outside = os.environ["HF_TOKEN"]\n'
        'access_token = os.environ["HF_TOKEN"]\n'
        'data_path = ["中文", "https://anna:pa55word@host/data"]\n'
        'model = dict(type=print, password="opensesame", eos_token="</s>", path=f"{lr} https://a:b12345@c")\n'
        'other = {"api_key": "opensesame", "nested": {"secret": ["opensesame"]}}\n'
        'model["auth_token"] = "opensesame"\n'
    )  # fmt: skip
    kept = mask_source(source, {})
    assert kept.text == (
        source.replace("hf_" + "b" * 34, MASK)
        .replace('"opensesame"', f"'{MASK}'")
        .replace('"https://anna:pa55word@host/data"', f"'https://{MASK}@host/data'")
        .replace('f"{lr} https://a:b12345@c"', f"'f\"{{lr}} https://{MASK}@c\"'")
    )
    ast.parse(kept.text)
    assert len(kept.places) == 8
    assert "line 5: hub_token" in kept.places
    assert mask_source(kept.text, {}) == (kept.text, [])  # what was dumped is dumped the same when it is resumed


def test_recipes_have_nothing_to_mask():
    for preset in list(PRESETS.values())[:: max(1, len(PRESETS) // 12)]:
        assert mask_source(preset.source, {}) == (preset.source, [])


def test_failures_of_processes_are_told_and_noted_without_secrets(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "plainwords")
    for error in (UserError("plainwords at https://a:b123@host"), RuntimeError("plainwords at https://a:b123@host")):
        for debug in (False, True):
            tell(error, debug=debug)
    shown = capsys.readouterr().err
    assert len(re.findall(r"\*\*\* at https://\*\*\*@host", shown)) == 4
    assert "plainwords" not in shown
    note(RuntimeError("plainwords"), {"TUNER_LAUNCH_DIR": str(tmp_path), "RANK": "0"})
    written = next(tmp_path.glob("failure_*.json")).read_text()
    assert "plainwords" not in written
    assert MASK in read_failure(written).trace


def test_a_batch_script_with_a_secret_is_refused():
    options = Options(nproc=2)
    assert "lr=1e-5" in script(options, ["train", "config.py", "lr=1e-5"], "config")
    with pytest.raises(UserError, match=r"hub_token=\*\*\* holds a token"):
        script(options, ["train", "config.py", "hub_token=opensesame"], "config")
