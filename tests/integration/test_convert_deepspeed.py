"""Checkpoints that DeepSpeed itself has written on two ranks, converted without it: the weights of its own script."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tuner.convert.legacy import convert_legacy
from tuner.engine.deepspeed_package import load_deepspeed

pytestmark = pytest.mark.slow
CASES = [(1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp16")]
FROZEN = "model.layers.1.mlp.up_proj.weight"  # which DeepSpeed's script leaves out under ZeRO 1
SHAPE: dict[str, Any] = {
    "vocab_size": 63,  # no multiple of anything, so that parts are filled up
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def train_and_save(folder: str) -> None:
    """Two steps and a checkpoint in each case, some weights frozen, with an object of DeepSpeed's in the file."""
    deepspeed = load_deepspeed()  # with its shared memory left out, which it would compile for minutes
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    deepspeed.init_distributed("gloo", dist_init_required=False)
    for stage, precision in CASES:
        torch.manual_seed(0)
        llm = LlamaForCausalLM(LlamaConfig(**SHAPE))
        llm.get_parameter(FROZEN).requires_grad_(False)
        groups = [list(llm.model.layers[0].parameters()), list(llm.model.layers[1].parameters())]
        groups += [[llm.lm_head.weight, llm.model.embed_tokens.weight, llm.model.norm.weight]]
        trained = [{"params": [p for p in group if p.requires_grad]} for group in groups]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        engine, *_ = deepspeed.initialize(model=llm, optimizer=torch.optim.AdamW(trained, lr=0.01), config=config)
        for step in range(2):
            ids = torch.arange(9)[None] + step
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(f"{folder}/{stage}_{precision}", client_state={"meta": {"cfg": "lr = 0.01"}})


def test_what_deepspeed_saved_is_what_its_own_script_reads(tmp_path: Path) -> None:
    run_on_ranks(2, train_and_save, str(tmp_path), timeout=400)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage, precision in CASES:
        saved = tmp_path / f"{stage}_{precision}"
        expected = get_fp32_state_dict_from_zero_checkpoint(str(saved))
        out = convert_legacy(saved, tmp_path / f"hf_{stage}_{precision}", allow=True, verify=False)
        found = load_file(out / "model.safetensors")
        assert expected.keys() | {FROZEN} == found.keys() == LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict().keys()
        assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected), (stage, precision)
        torch.manual_seed(0)
        untouched = LlamaForCausalLM(LlamaConfig(**SHAPE)).get_parameter(FROZEN).to(found[FROZEN].dtype)
        assert torch.equal(found[FROZEN], untouched), (stage, precision)
