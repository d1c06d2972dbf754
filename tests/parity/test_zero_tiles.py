"""ZeRO-3 gathers the weights of a block once for all of its tiles, in forward and in backward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from test_one_gradient import StepOfDocuments
from test_zero_step import Case, make_method, on_all_ranks, start

from tuner.dataset.sampler import StepSampler
from tuner.model.tiles import Tiled, tile

NUM_TOKENS = [None, 100, 8]  # of a tile; packs of the two ranks differ in length, and so in tiles
KEEPS_NOTHING = {
    "stage": 3,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


class Asked:
    """In place of DeepSpeed's gathering: what is asked of it is counted."""

    def __init__(self, gather: Any) -> None:
        self.gather, self.times, self.elements = gather, 0, 0

    def __call__(self, params: set, forward: bool, *rest: Any, **options: Any) -> Any:
        self.times += 1
        self.elements += sum(parameter.ds_numel for parameter in params)
        return self.gather(params, forward, *rest, **options)


def gathered(path: str, tile_tokens: int | None) -> tuple[float, int, int]:
    """The loss of a second step, how often something was gathered in it, and how many elements."""
    case = Case(path, num_packs=2, num_accumulation_steps=1)
    strategy, method = on_all_ranks(case), make_method(case)
    if tile_tokens is not None:
        tile(method.llm, tile_tokens)
        assert sum(isinstance(module, Tiled) for module in method.llm.modules()) == 2 * 3 + 1
    start(strategy, case, method)
    dataset = StepOfDocuments("every token", 2)
    sampler = StepSampler(dataset, num_accumulation_steps=1, rank=dist.get_rank(), num_ranks=2)
    batches = dataset.batches(sampler.plan(0), 1)
    strategy.train_step(batches)
    coordinator = strategy.optimizer.parameter_offload.get_param_coordinator()
    asked = Asked(coordinator._PartitionedParameterCoordinator__all_gather_params_)
    coordinator._PartitionedParameterCoordinator__all_gather_params_ = asked
    loss = strategy.train_step(batches).loss
    strategy.engine.destroy()
    return loss, asked.times, asked.elements


def gathered_by_all(path: str) -> list[tuple[float, int, int]]:
    return [gathered(path, tile_tokens) for tile_tokens in NUM_TOKENS]


@pytest.mark.slow
def test_a_block_in_tiles_is_gathered_as_often_as_a_whole_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    path = tmp_path / "keeps_nothing.json"
    path.write_text(json.dumps({"zero_optimization": KEEPS_NOTHING}))
    for whole, *tiled in run_on_ranks(2, gathered_by_all, str(path)):
        assert whole[1] > 20
        for step in tiled:
            assert step[0] == pytest.approx(whole[0], rel=1e-6)
            assert step[1] < whole[1], "a block's weights come together"
            assert step[2] == whole[2]
