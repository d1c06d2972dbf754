"""Our InternLM2 against numbers that the published modelling code gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tuner.model  # noqa: F401  # registers InternLM2


@pytest.fixture(scope="module")
def golden_directory(shared_data: Path) -> Path:
    return shared_data / "internlm2-tiny-golden"


@pytest.fixture(scope="module")
def golden(golden_directory: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_directory / "golden.safetensors")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_hidden_states_and_loss_equal_the_published_code(
    golden_directory: Path, golden: dict[str, torch.Tensor], attention: str
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(golden_directory, attn_implementation=attention)
    output = llm(golden["ids"], labels=golden["ids"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, golden["logits"], rtol=0, atol=2e-5)
    torch.testing.assert_close(output.hidden_states[1], golden["hidden_1"], rtol=0, atol=2e-5)
    torch.testing.assert_close(output.hidden_states[-1], golden["hidden_last"], rtol=0, atol=2e-5)
    torch.testing.assert_close(output.loss[None], golden["loss"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_left_padded_logits_equal_the_published_code(
    golden_directory: Path, golden: dict[str, torch.Tensor], attention: str
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(golden_directory, attn_implementation=attention)
    mask = golden["mask_pad"]
    assert mask[:, -1].all()
    assert not mask.bool().all()
    output = llm(golden["ids_pad"], attention_mask=mask, position_ids=golden["pos_pad"])
    torch.testing.assert_close(output.logits[mask.bool()], golden["logits_pad"][mask.bool()], rtol=0, atol=2e-5)
