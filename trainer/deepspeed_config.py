"""DeepSpeed's configuration, derived from ours in one place, and what it makes DeepSpeed compile (pure, but for a look for a compiler)."""

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.errors import ConfigError, EnvironmentMismatchError
from trainer.config import RunConfig
from trainer.zero_config import offload_device


def derive_deepspeed_config(config: RunConfig, world_size: int, device: str = "cpu") -> dict[str, Any]:
    """The dict for `deepspeed.initialize` on one type of device, with `zero.deepspeed` merged over it.

    DeepSpeed's own counting of micro-batches is left at one a step: the engine states the accumulation boundary itself, because the
    number of micro-steps follows from the global batch and may change between phases. Gradients are accumulated and reduced in fp32;
    stage 0 refuses the setting and gets the same by other means (see `trainer.zero_start`).

    Raises:
        ConfigError: `zero.overlap` is true where it cannot be, `precision` having been left to measurement.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.batch.micro_batch_size * world_size,
        # In fp32 at stage 0 DeepSpeed clips without telling the norm, so the engine clips.
        "gradient_clipping": 0.0 if config.zero.stage == 0 and config.precision == "fp32" else config.optimizer.clip_norm,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every pass
        "zero_optimization": _zero_optimization(config, device),
        **_precision(config),
    }
    if config.zero.stage > 0:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.optimizer.kind == "lamb" and config.zero.stage > 0:
        derived["zero_allow_untested_optimizer"] = True
    if config.zero.offload_optimizer != "none":
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW is as fast on a CPU, and its state is the same wherever it lies
    return _merged(derived, config.zero.deepspeed)


def _zero_optimization(config: RunConfig, device: str) -> dict[str, Any]:
    zero = config.zero
    if zero.overlap is True and not zero.can_overlap(config.precision):
        raise ConfigError("zero.overlap cannot be true at zero.stage 1 in bf16, where nothing is offloaded", "Set zero.overlap to auto.")
    settings: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": zero.bucket_elements}
    if zero.stage == 0:
        return settings
    overlaps = zero.overlaps(config.precision, device)
    if zero.stage == 1 and config.precision == "fp32" and not (overlaps or zero.offloads_state or "zero_optimization" in zero.deepspeed):
        settings["contiguous_gradients"] = False  # `zero_buckets` lays them out better
    offloaded = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_parameters}
    return {
        **settings,
        "overlap_comm": overlaps,
        **{key: {"device": where} for key, where in offloaded.items() if where != "none"},
    }


def _precision(config: RunConfig) -> dict[str, Any]:
    if config.precision == "bf16":
        # At stage 1 16-bit gradients are added to the fp32 ones as they come, instead of being kept until the end of the backward pass.
        return {"bf16": {"enabled": True} | ({"immediate_grad_update": True} if config.zero.stage == 1 else {})}
    return {"fp16": {"enabled": True, "loss_scale": 0}} if config.precision == "fp16" else {}


def builds_own_adam(settings: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives in main memory by the raw block alone: DeepSpeed then insists on an Adam of its own, which it compiles."""
    zero = settings["zero_optimization"]
    offloads = bool(zero.get("cpu_offload")) or offload_device(zero, "offload_optimizer") != "none"
    return offloads and bool(settings.get("zero_force_ds_cpu_optimizer", True))


def compiled_ops(settings: dict[str, Any]) -> dict[str, str]:
    """DeepSpeed's extensions (by its own name) that these settings need, each with the setting that asks for it. The defaults need none."""
    zero = settings["zero_optimization"]
    needed: dict[str, str] = {}
    if builds_own_adam(settings):
        needed["cpu_adam"] = "zero_optimization.offload_optimizer"
    for key in ("offload_optimizer", "offload_param"):
        if offload_device(zero, key) == "nvme":
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


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged
