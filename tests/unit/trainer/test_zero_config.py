"""Section `zero`: what a stage, an optimizer, a precision or the raw block rules out is refused when the configuration is read."""

from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from launcher.config import override_run_config
from tests.support.batches import small_config
from trainer.config import RunConfig


def cause(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override_run_config(RunConfig(name="a"), overrides)
    return caught.value.cause


def test_everything_that_a_stage_lacks_is_said_at_once() -> None:
    found = cause(
        "zero.stage=0", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu", "zero.overlap=true", "zero.bucket_elements=0"
    ).splitlines()
    assert found[0] == "--set: 4 problems"
    assert sorted(line.strip() for line in found[1:]) == [
        "zero.bucket_elements: expected greater than or equal to 1, found 0 (whole number)",
        "zero.offload_optimizer: needs zero.stage 1 or more, and it is 0",
        "zero.offload_parameters: needs zero.stage 3, and it is 0",
        "zero.overlap: needs zero.stage 1 or more, and it is 0",
    ]


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_are_offloaded_at_stage_3_alone(stage: int) -> None:
    assert "zero.offload_parameters: needs zero.stage 3" in cause(f"zero.stage={stage}", "zero.offload_parameters=cpu")


@pytest.mark.parametrize(
    ("raw", "named", "instead"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "batch"),
        ({"bf16": {"enabled": False}}, "bf16", "precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "zero.stage"),
        ({"gradient_clipping": 2.0}, "gradient_clipping", "optimizer.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "optimizer"),
    ],
)
def test_the_raw_block_may_not_say_what_is_derived(raw: dict[str, Any], named: str, instead: str) -> None:
    assert f"zero.deepspeed: {named} is derived from `{instead}`" in cause(f"zero.deepspeed={raw}")


@pytest.mark.parametrize(
    ("ours", "raw", "named"),
    [
        ("offload_optimizer=cpu", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
        ("offload_optimizer=cpu", {"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload"),
        ("offload_optimizer=cpu", {"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        ("offload_parameters=cpu", {"zero_optimization": {"offload_param": {"device": "none"}}}, "zero_optimization.offload_param"),
        ("bucket_elements=7", {"zero_optimization": {"reduce_bucket_size": 8}}, "zero_optimization.reduce_bucket_size"),
        ("overlap=false", {"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm"),
    ],
)
def test_a_setting_is_ours_or_the_raw_blocks(ours: str, raw: dict[str, Any], named: str) -> None:
    found = cause("zero.stage=3", f"zero.{ours}", f"zero.deepspeed={raw}")
    assert f"zero.deepspeed: {named} is given as well as zero.{ours.partition('=')[0]}; keep one of the two" in found
    assert override_run_config(RunConfig(name="a"), ("zero.stage=3", f"zero.deepspeed={raw}")).zero.deepspeed == raw


@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": "cpu"},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}},
        {"deepspeed": {"zero_optimization": {"cpu_offload": True}}},
    ],
)
def test_lamb_is_not_offloaded(zero: dict[str, Any]) -> None:
    assert small_config(zero={"stage": 2} | zero).zero.offloads_state
    with pytest.raises(ValueError, match="lamb does not go with an offloaded optimizer"):
        small_config(zero={"stage": 2} | zero, optimizer={"kind": "lamb"})


def test_deepspeed_has_nothing_to_overlap_at_stage_1_in_bf16() -> None:
    for possible in ({"precision": "fp32"}, {"precision": "auto"}, {"zero": {"stage": 2, "overlap": True}}):
        small_config(**({"precision": "bf16", "zero": {"stage": 1, "overlap": True}} | possible))
    small_config(precision="bf16", zero={"stage": 1, "overlap": True, "offload_optimizer": "cpu"})
    with pytest.raises(ValueError, match=r"zero\.overlap cannot be true at zero\.stage 1 in bf16"):
        small_config(precision="bf16", zero={"stage": 1, "overlap": True})
