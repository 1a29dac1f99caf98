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
        "zero_optimization": {"stage": 0},
    },
    (0, "bf16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": True},
    },
    (2, "bf16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True},
    },
    (3, "fp16"): {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 50_000_000},
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": True, "loss_scale": 0},
    },
}


@pytest.mark.parametrize(("stage", "precision"), GOLDEN)
def test_golden(stage: int, precision: str) -> None:
    assert derive_deepspeed_config(small_config(zero={"stage": stage}, precision=precision), world_size=3) == GOLDEN[stage, precision]


def test_overrides_are_merged_last() -> None:
    overrides = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}, "wall_clock_breakdown": True}
    derived = derive_deepspeed_config(small_config(zero={"stage": 1, "deepspeed": overrides}), world_size=2)
    assert derived["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7, "overlap_comm": True}
    assert derived["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("overrides", "named", "instead"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "batch"),
        ({"bf16": {"enabled": False}}, "bf16", "precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "zero.stage"),
        ({"gradient_clipping": 2.0}, "gradient_clipping", "optimizer.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "optimizer"),
    ],
)
def test_derived_keys_are_refused(overrides: dict[str, Any], named: str, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        derive_deepspeed_config(small_config(zero={"stage": 1, "deepspeed": overrides}), world_size=2)
    assert f"zero.deepspeed.{named} is derived" in caught.value.cause
    assert f"`{instead}`" in caught.value.remedy


@pytest.mark.parametrize(("stage", "untested"), [(0, {}), (1, {"zero_allow_untested_optimizer": True}), (3, {"zero_allow_untested_optimizer": True})])
def test_lamb_differs_in_what_lets_it_pass(stage: int, untested: dict[str, Any]) -> None:
    lamb, adamw = (derive_deepspeed_config(small_config(zero={"stage": stage}, optimizer={"kind": kind}), 2) for kind in ("lamb", "adamw"))
    assert lamb == adamw | untested


@pytest.mark.parametrize(
    "zero", [{"offload_optimizer": {"device": "cpu"}}, {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, {"cpu_offload": True}]
)
@pytest.mark.parametrize("forced", [True, False])
def test_lamb_is_not_offloaded(zero: dict[str, Any], forced: bool) -> None:
    overrides = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": forced}
    with pytest.raises(ConfigError) as caught:
        derive_deepspeed_config(small_config(zero={"stage": 2, "deepspeed": overrides}, optimizer={"kind": "lamb"}), world_size=2)
    assert "lamb" in caught.value.cause
    assert "offload_optimizer" in caught.value.cause
    assert "adamw" in caught.value.remedy


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
