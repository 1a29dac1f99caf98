"""DeepSpeed's configuration, derived from ours in one place, and what it makes DeepSpeed compile (pure, but for a look for a compiler)."""

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.errors import ConfigError, EnvironmentMismatchError
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
        ConfigError: `zero.deepspeed` names a key that is derived, or offloads the state of an optimizer that cannot be.
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
        derived["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        derived["fp16"] = {"enabled": True, "loss_scale": 0}
    if config.optimizer.kind == "lamb" and stage > 0:
        derived["zero_allow_untested_optimizer"] = True
    _refuse_derived(config.zero.deepspeed)
    settings = _merged(derived, config.zero.deepspeed)
    _refuse_offload(config.optimizer.kind, settings)
    return settings


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives in main memory, so that DeepSpeed insists on an Adam of its own, which it compiles."""
    return _keeps_state_in_main_memory(settings) and bool(settings.get("zero_force_ds_cpu_optimizer", True))


def _keeps_state_in_main_memory(settings: dict[str, Any]) -> bool:
    zero = settings["zero_optimization"]
    return bool(zero.get("cpu_offload")) or _offload_device(zero, "offload_optimizer") != "none"


def compiled_ops(settings: dict[str, Any]) -> dict[str, str]:
    """DeepSpeed's extensions (by its own name) that these settings need, each with the setting that asks for it. The defaults need none."""
    zero = settings["zero_optimization"]
    needed: dict[str, str] = {}
    if offloads_optimizer(settings):
        needed["cpu_adam"] = "zero_optimization.offload_optimizer"
    for key in ("offload_optimizer", "offload_param"):
        if _offload_device(zero, key) == "nvme":
            needed["async_io"] = f"zero_optimization.{key}"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            needed["quantizer"] = f"zero_optimization.{key}"
    return needed


def require_compiler(settings: dict[str, Any], built: Mapping[str, bool], which: Callable[[str], str | None] = shutil.which) -> None:
    """Refuse settings whose extensions can neither be compiled here nor are `built` into the installed DeepSpeed.

    Raises:
        EnvironmentMismatchError: the C++ compiler or ninja is missing.
    """
    missing = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if which(tool) is None]
    for op, setting in compiled_ops(settings).items():
        if missing and not built.get(op, False):
            raise EnvironmentMismatchError(
                f"zero.deepspeed.{setting} makes DeepSpeed compile {op}, but there is no {' and no '.join(missing)} on the PATH",
                f"Install a C++ compiler and ninja (Debian: `apt install g++ ninja-build`), or remove zero.deepspeed.{setting}.",
            )


def _offload_device(zero: dict[str, Any], key: str) -> str:
    offload = zero.get(key)
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"


def _refuse_derived(overrides: dict[str, Any]) -> None:
    for key, owner in _DERIVED.items():
        value: Any = overrides
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            raise ConfigError(f"zero.deepspeed.{key} is derived and cannot be set", f"Set `{owner}` instead.")


def _refuse_offload(kind: str, settings: dict[str, Any]) -> None:
    """LAMB's norms are sums over ranks, whose process group may know nothing but GPUs."""
    if kind == "lamb" and _keeps_state_in_main_memory(settings):
        raise ConfigError(
            "optimizer.kind lamb does not go with zero.deepspeed.zero_optimization.offload_optimizer",
            "Remove the offload (from zero.stage 1 on the state is spread over the ranks), or set optimizer.kind to adamw.",
        )


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged
