"""The derived DeepSpeed configuration."""

from typing import Any

import pytest

from data_pipeline.errors import ConfigError, EnvironmentMismatchError, ExitCode
from tests.support.batches import small_config
from trainer.deepspeed_config import compiled_ops, derive_deepspeed_config, require_compiler

GOLDEN: dict[tuple[int, str], dict[str, Any]] = {
    (0, "fp32"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 50_000_000},
    },
    (0, "bf16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 50_000_000},
        "bf16": {"enabled": True},
    },
    (1, "bf16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000, "overlap_comm": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True, "immediate_grad_update": True},
    },
    (2, "bf16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "overlap_comm": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True},
    },
    (3, "fp16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 50_000_000, "overlap_comm": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": True, "loss_scale": 0},
    },
}


@pytest.mark.parametrize(("stage", "precision"), GOLDEN)
def test_golden(stage: int, precision: str) -> None:
    assert derive_deepspeed_config(small_config(zero={"stage": stage}, precision=precision), world_size=3) == GOLDEN[stage, precision]


def test_gradients_lie_flat_at_stage_1_in_fp32_unless_the_raw_block_says_anything_of_them() -> None:
    for zero, flat in (
        ({"stage": 1}, True),
        ({"stage": 2}, False),
        ({"stage": 1, "overlap": True}, False),
        ({"stage": 1, "offload_optimizer": "cpu"}, False),
        ({"stage": 1, "deepspeed": {"zero_optimization": {"round_robin_gradients": True}}}, False),
    ):
        settings = derive_deepspeed_config(small_config(zero=zero), world_size=2)["zero_optimization"]
        assert (settings.get("contiguous_gradients") is False) == flat, zero


def test_overrides_are_merged_last() -> None:
    overrides = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}, "wall_clock_breakdown": True}
    derived = derive_deepspeed_config(small_config(zero={"stage": 1, "deepspeed": overrides}), world_size=2)
    assert derived["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7, "overlap_comm": True}
    assert derived["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("stage", "precision", "device", "overlaps"),
    [
        *((1, "fp32", "cpu", False), (2, "bf16", "cpu", False), (3, "bf16", "cpu", True)),
        *((1, "fp16", "cuda", True), (1, "bf16", "cuda", False), (2, "bf16", "cuda", True), (3, "bf16", "cuda", True)),
    ],
)
def test_gradients_are_reduced_beside_the_backward_pass_where_it_can_be(stage: int, precision: str, device: str, overlaps: bool) -> None:
    config = small_config(zero={"stage": stage}, precision=precision)
    assert derive_deepspeed_config(config, 2, device)["zero_optimization"]["overlap_comm"] is overlaps
    chosen = small_config(zero={"stage": 2, "overlap": not overlaps}, precision=precision)
    assert derive_deepspeed_config(chosen, 2, device)["zero_optimization"]["overlap_comm"] is not overlaps


def test_what_bf16_cannot_do_is_refused_once_it_is_chosen() -> None:
    config = small_config(zero={"stage": 1, "overlap": True}, precision="auto")
    with pytest.raises(ConfigError, match=r"zero\.overlap"):
        derive_deepspeed_config(config.model_copy(update={"precision": "bf16"}), 2)
    assert derive_deepspeed_config(config.model_copy(update={"precision": "fp32"}), 2)["zero_optimization"]["overlap_comm"] is True


def test_offload_keeps_the_optimizer() -> None:
    zero = {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu", "bucket_elements": 7}
    derived = derive_deepspeed_config(small_config(zero=zero), world_size=2)
    offloaded = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert derived["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 7, "overlap_comm": True, **offloaded}
    assert derived["zero_force_ds_cpu_optimizer"] is False
    assert compiled_ops(derived) == {}


@pytest.mark.parametrize(("stage", "untested"), [(0, {}), (1, {"zero_allow_untested_optimizer": True}), (3, {"zero_allow_untested_optimizer": True})])
def test_lamb_differs_in_what_lets_it_pass(stage: int, untested: dict[str, Any]) -> None:
    lamb, adamw = (derive_deepspeed_config(small_config(zero={"stage": stage}, optimizer={"kind": kind}), 2) for kind in ("lamb", "adamw"))
    assert lamb == adamw | untested


def settings_of(overrides: dict[str, Any]) -> dict[str, Any]:
    return derive_deepspeed_config(small_config(zero={"stage": 2, "deepspeed": overrides}), world_size=2)


@pytest.mark.parametrize(
    ("overrides", "ops"),
    [
        ({}, set[str]()),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, set[str]()),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"cpu_adam"}),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}, set[str]()),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, {"cpu_adam", "async_io"}),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, {"async_io"}),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, set[str]()),
        ({"zero_optimization": {"zero_quantized_weights": True}}, {"quantizer"}),
    ],
)
def test_what_must_be_compiled(overrides: dict[str, Any], ops: set[str]) -> None:
    assert set(compiled_ops(settings_of(overrides))) == ops


def test_the_default_needs_no_compiler() -> None:
    assert compiled_ops(settings_of({})) == {}
    require_compiler(settings_of({}), {}, which=lambda tool: None)


@pytest.mark.parametrize(("there", "named"), [((), r"no c\+\+ and no ninja"), (("c++",), "no ninja"), (("ninja",), r"no c\+\+")])
def test_without_a_compiler_what_needs_one_says_so(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], named: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    settings = settings_of({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(EnvironmentMismatchError, match=named) as caught:
        require_compiler(settings, {"cpu_adam": False}, which=lambda tool: tool if tool in there else None)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "zero.deepspeed.zero_optimization.offload_optimizer" in caught.value.cause
    assert "Install a C++ compiler and ninja" in caught.value.remedy
    require_compiler(settings, {"cpu_adam": True}, which=lambda tool: None)  # built with DeepSpeed
    require_compiler(settings, {}, which=lambda tool: tool)
