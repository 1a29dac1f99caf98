"""`ZeroConfig`, section `zero` of run.yaml: what is partitioned, offloaded and overlapped, and what a raw DeepSpeed block may say (pure)."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from data_pipeline.config import Section

BUCKET_ELEMENTS = 50_000_000

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
"""DeepSpeed's settings that follow from ours, and from which."""
_ALSO_OURS = {
    "offload_optimizer": ("zero_optimization.offload_optimizer", "zero_optimization.cpu_offload", "zero_force_ds_cpu_optimizer"),
    "offload_parameters": ("zero_optimization.offload_param", "zero_optimization.cpu_offload_param"),
    "bucket_elements": ("zero_optimization.reduce_bucket_size",),
    "overlap": ("zero_optimization.overlap_comm",),
}
"""Settings of ours by which DeepSpeed's are derived unless the raw block says more about them: one or the other."""
_LEAST_STAGE = {"offload_optimizer": 1, "offload_parameters": 3, "overlap": 1}


class ZeroConfig(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020). All of it may change whenever a run is continued."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: replicate; 1: partition optimizer state; 2: also gradients; 3: also parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu`: the optimizer's state and the fp32 weights stay in main memory and are updated there, by the same AdamW: less GPU memory, slower steps.
    From stage 1 on. Nothing is compiled."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """`cpu`: parameters wait in main memory until a layer needs them. Stage 3 only."""
    bucket_elements: int = Field(default=BUCKET_ELEMENTS, ge=1)
    """Elements of gradients that are reduced at once: 200 MB in fp32 by default. Larger parameters are reduced whole. Smaller buckets take less
    memory and are on their way sooner, larger ones travel faster. Stage 1 in bf16 (on CPUs in fp32, too), where no
    state is offloaded, reduces in place: GPUs all at once, CPUs that do not read each other's memory at most four million."""
    overlap: bool | Literal["auto"] = "auto"
    """Reduce gradients beside the backward pass, for the memory of another bucket; from stage 1 on, but not at stage 1 in bf16, where the state is
    not offloaded: DeepSpeed cannot. `auto`: on GPUs wherever it can, on CPUs at stage 3."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed settings merged last over the derived ones. Keys that this project derives are refused."""

    @field_validator("offload_optimizer", "offload_parameters", "overlap")
    @classmethod
    def _stage_has_it(cls, value: Any, info: ValidationInfo) -> Any:
        stage, least = info.data.get("stage"), _LEAST_STAGE[str(info.field_name)]
        if stage is not None and stage < least and value in ("cpu", True):
            raise ValueError(f"needs zero.stage {least}{' or more' if least < 3 else ''}, and it is {stage}")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _leaves_ours_alone(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        refused = [f"{key} is derived from `{owner}`; set that instead" for key, owner in _DERIVED.items() if _holds(value, key)]
        refused += [f"{key} is given as well as zero.{ours}; keep one of the two" for ours, key in _given_twice(value, info.data)]
        if refused:
            raise ValueError("; ".join(refused))
        return value

    @property
    def offloads_state(self) -> bool:
        """Whether the optimizer's state lives outside of the device, be it by the raw block."""
        raw = self.deepspeed.get("zero_optimization")
        if not isinstance(raw, dict):
            raw = {}
        return self.offload_optimizer != "none" or bool(raw.get("cpu_offload")) or offload_device(raw, "offload_optimizer") != "none"

    def can_overlap(self, precision: str) -> bool:
        """Whether DeepSpeed can reduce beside the backward pass: its optimizer for stage 1 in bf16 cannot."""
        return self.stage > 1 or (self.stage == 1 and (precision != "bf16" or self.offloads_state))

    def overlaps(self, precision: str, device: str) -> bool:
        """`overlap`, settled for a type of device."""
        if self.overlap != "auto":
            return self.overlap
        return self.can_overlap(precision) and (device == "cuda" or self.stage == 3)


def offload_device(zero_optimization: dict[str, Any], key: str) -> str:
    """Where DeepSpeed's `offload_optimizer` or `offload_param` puts what it offloads; `none` where it does not."""
    offload = zero_optimization.get(key)
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"


def _given_twice(raw: dict[str, Any], ours: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, keys in _ALSO_OURS.items():
        if name in ours and ours[name] != ZeroConfig.model_fields[name].default:
            yield from ((name, key) for key in keys if _holds(raw, key))


def _holds(raw: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return True
