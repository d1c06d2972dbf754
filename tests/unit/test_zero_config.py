"""What DeepSpeed is told: sizes follow from the model, the rest from the config, and a file may not say otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.engine.zero_config import PRESETS, ModelSizes, Settings, zero_config
from tuner.errors import UserError

KNOWN = {
    "": {"zero_optimization", "bf16", "fp16", "gradient_clipping", "communication_data_type", "wall_clock_breakdown"},
    "zero_optimization": {"stage", "reduce_bucket_size", "zero_hpz_partition_size", "offload_param", "overlap_comm",
                          "offload_optimizer", "stage3_prefetch_bucket_size", "zenflow"},
    "bf16": {"enabled"},
    "fp16": {"enabled", "loss_scale_window"},
}  # fmt: skip
SEVEN_B = ModelSizes(hidden=4096, layer=200_000_000)


def config_of(choice: str, sizes: ModelSizes | None = SEVEN_B, **settings: Any) -> dict[str, Any]:
    return zero_config(choice, Settings(**settings), KNOWN, sizes)


@pytest.fixture
def file_with(tmp_path: Path):
    def write(**keys: Any) -> str:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **keys}))
        return str(path)

    return write


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sums_gradients_in_fp32_and_keeps_fp32_weights(preset: str):
    config = config_of(preset, max_grad_norm=0.5)
    assert config["zero_optimization"]["stage"] == int(preset[4])
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"]
    assert config["fp16"] == {"enabled": False}
    assert config.get("gradient_allreduce_op") == (None if preset.startswith("zero3") else "sum")


def test_sizes_follow_from_the_model():
    third = config_of("zero3")["zero_optimization"]
    assert third["reduce_bucket_size"] == 4096**2
    assert third["stage3_prefetch_bucket_size"] == 4096**2 * 9 // 10
    assert third["stage3_param_persistence_threshold"] == 40960
    assert config_of("zero2")["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    tiny = config_of("zero2", ModelSizes(hidden=32, layer=5001))["zero_optimization"]
    assert tiny["reduce_bucket_size"] == tiny["allgather_bucket_size"] == 100_000
    huge = config_of("zero1", ModelSizes(hidden=16384, layer=3_000_000_001))["zero_optimization"]
    assert huge["allgather_bucket_size"] == 200_000_000


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_precision_is_that_of_the_config(precision: str):
    config = config_of("zero2", precision=precision)
    assert [name for name in ("bf16", "fp16") if config[name]["enabled"]] == [precision] * (precision != "fp32")
    if precision == "fp16":
        assert config["fp16"]["hysteresis"] == 1, "the first overflow halves the scale"


def test_offload_goes_to_the_cpu_or_to_a_directory():
    section = config_of("zero3_offload")["zero_optimization"]
    assert section["offload_param"] == section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    section = config_of("zero3_offload", offload_directory="/disk", has_cuda=False)["zero_optimization"]
    assert section["offload_param"] == {"device": "nvme", "nvme_path": "/disk", "pin_memory": False}
    with pytest.raises(UserError, match="offload_directory='/disk' needs ZeRO-3 with offloading"):
        config_of("zero2_offload", offload_directory="/disk")


def test_a_second_copy_is_shared_by_a_node_or_by_as_many_ranks_as_divide_the_world():
    config = config_of("zero3_hpz", world_size=16, local_size=8)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 8
    chosen = config_of("zero3_hpz", world_size=16, local_size=8, hpz_partition_size=4)
    assert chosen["zero_optimization"]["zero_hpz_partition_size"] == 4
    message = r"zero_hpz_partition_size 3 does not divide the 8 ranks of this run. Sizes that do: 1, 2, 4, 8\."
    with pytest.raises(UserError, match=message):
        config_of("zero3_hpz", world_size=8, hpz_partition_size=3)
    with pytest.raises(UserError, match="hpz_partition_size=4 needs deepspeed='zero3_hpz'"):
        config_of("zero3", hpz_partition_size=4)


def test_a_file_adds_to_what_is_derived(file_with):
    path = file_with(
        zero_optimization={"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
        communication_data_type="bf16",
        bf16={"enabled": True},
        gradient_clipping=1.0,
        wall_clock_breakdown=True,
    )
    config = config_of(path, max_grad_norm=1.0)
    assert config["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["communication_data_type"] == "bf16"
    assert config["wall_clock_breakdown"] is True


CONTRADICTIONS = {
    "gradient_clipping": (0.5, "'gradient_clipping' is 0.5, the config's max_grad_norm 1.0. The config decides"),
    "fp16": ({"enabled": True}, "'fp16.enabled' is True, the config's precision 'bf16'.*set precision='fp16'"),
    "bf16": ({"enabled": False}, "'bf16.enabled' is False.*set precision='fp32'"),
    "optimizer": ({"type": "AdamW", "params": {"lr": 1}}, "'optimizer' is decided by the config .*optim_wrapper"),
    "scheduler": ({"type": "WarmupLR"}, "'scheduler' is decided by the config .*param_scheduler"),
    "train_batch_size": (64, "'train_batch_size' is decided by the config .*num_accumulation_steps"),
    "gradient_accumulation_steps": (2, "'gradient_accumulation_steps' is decided by the config"),
    "prescale_gradients": (True, "'prescale_gradients' is decided by the config .*summed"),
    "data_types": ({"grad_accum_dtype": "bf16"}, "'data_types' is decided by the config"),
    "zero_optimization": ({"stage": 2, "zenflow": {"a": 1}}, "'zero_optimization.zenflow' has no effect"),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_a_file_that_contradicts_the_config_is_refused(file_with, key: str):
    value, message = CONTRADICTIONS[key]
    with pytest.raises(UserError, match=message):
        config_of(file_with(**{key: value}), max_grad_norm=1.0)


def test_all_mistakes_of_a_file_are_told_at_once_with_the_nearest_names(file_with):
    path = file_with(
        zero_optimization={"stage": 3, "mics_shard_size": 8, "reduce_bucket_sise": 1},
        elasticity={"enabled": True},
        gradient_cliping=1.0,
        train_batch_size=8,
    )
    with pytest.raises(UserError) as caught:
        config_of(path)
    message = str(caught.value)
    assert "'zero_optimization.mics_shard_size' is no key of the installed DeepSpeed" in message
    assert 'Set "zero_hpz_partition_size"' in message
    assert "'zero_optimization.reduce_bucket_sise' is no key of the installed DeepSpeed. Did you mean red" in message
    assert "'elasticity' is no key" in message
    assert "'gradient_cliping' is no key of the installed DeepSpeed. Did you mean gradient_clipping?" in message
    assert "'train_batch_size' is decided by the config" in message
    assert len(message.splitlines()) == 5


def test_what_is_no_preset_and_no_file_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"deepspeed='zero4' is no preset. Did you mean zero3 or .*JSON"):
        config_of("zero4")
    with pytest.raises(UserError, match=r"There is no file missing\.json"):
        config_of("missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        config_of(str(broken))
    broken.write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        config_of(str(broken))
    broken.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(UserError, match=r'\{"stage": 0\} shards nothing. Choose stage 1, 2 or 3'):
        config_of(str(broken))


def test_the_installed_deepspeed_says_what_it_reads_and_takes_what_is_made_for_it():
    pytest.importorskip("deepspeed")
    from tuner.engine.deepspeed_package import check_choice, known_keys

    known = known_keys()
    assert {"zero_optimization", "gradient_clipping", "bf16", "optimizer", "wall_clock_breakdown"} <= known[""]
    assert {"stage", "zero_hpz_partition_size", "offload_param"} <= known["zero_optimization"]
    assert not {"elasticity", "curriculum_learning"} & known[""]
    assert "mics_shard_size" not in known["zero_optimization"]
    for path, names in KNOWN.items():
        assert names <= known[path]
    for preset in PRESETS:
        for precision in ("fp32", "bf16", "fp16"):
            check_choice(preset, Settings(precision=precision, world_size=None, max_grad_norm=1.0))


def test_deepspeeds_own_complaint_reaches_the_user(file_with):
    pytest.importorskip("deepspeed")
    from tuner.engine.deepspeed_package import check_choice

    with pytest.raises(UserError, match="DeepSpeed does not take it"):
        check_choice(file_with(zero_optimization={"stage": 2, "reduce_bucket_size": "large"}), Settings())
