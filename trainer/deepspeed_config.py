"""DeepSpeed's configuration, derived from ours in one place (pure)."""

from typing import Any

from data_pipeline.errors import ConfigError
from trainer.config import RunConfig

BUCKET_ELEMENTS = 50_000_000
"""Elements of a reduction bucket: 200 MB in fp32. DeepSpeed's default would take ten times that."""

_DERIVED = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch",
    "managed_gradient_accumulation": "batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "zero_optimization.stage": "zero.stage",
    "zero_allow_untested_optimizer": "optimizer",
    "checkpoint": "checkpoint",
    "prescale_gradients": "batch",
    "gradient_predivide_factor": "batch",
}


def derive_deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, with `zero.deepspeed` merged over it.

    DeepSpeed's own counting of micro-batches is left at one a step: the engine states the accumulation boundary itself, because the
    number of micro-steps follows from the global batch and may change between phases. Gradients are accumulated and reduced in fp32;
    stage 0 refuses the setting and gets the same by other means (see `trainer.engine`).

    Raises:
        ConfigError: `zero.deepspeed` names a key that is derived.
    """
    stage = config.zero.stage
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.batch.micro_batch_size * world_size,
        # In fp32 at stage 0 DeepSpeed clips without telling the norm, so the engine clips.
        "gradient_clipping": 0.0 if stage == 0 and config.precision == "fp32" else config.optimizer.clip_norm,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage},
    }
    if stage > 0:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["zero_optimization"]["reduce_bucket_size"] = BUCKET_ELEMENTS
    if config.precision == "bf16":
        derived["bf16"] = {"enabled": True, "check_grad_overflow": False}  # a loss that is not finite is found before the step
    if config.precision == "fp16":
        derived["fp16"] = {"enabled": True, "loss_scale": 0}
    _refuse_derived(config.zero.deepspeed)
    return _merged(derived, config.zero.deepspeed)


def _refuse_derived(overrides: dict[str, Any]) -> None:
    for key, owner in _DERIVED.items():
        value: Any = overrides
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            raise ConfigError(f"zero.deepspeed.{key} is derived and cannot be set", f"Set `{owner}` instead.")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged
