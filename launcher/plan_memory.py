"""Memory of a rank at every ZeRO stage, and the largest micro-batch that a GPU takes (pure)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.config import Phase
from data_pipeline.order import micro_steps
from launcher.plan_work import MeanSample, special_tokens
from trainer.activations import Kernels, Pass
from trainer.config import RunConfig
from trainer.deepspeed_config import derive_deepspeed_config
from trainer.dimensions import MASKED_MULTIPLE, Dimensions
from trainer.memory import RankMemory, rank_memory
from trainer.zero_config import offload_device
from trainer.zero_stages import STAGES, Job

MARGIN = 0.1
"""Share of the peak that is left for what allocators lose and kernels borrow; assumed."""
GPU_CONTEXT_BYTES = 1 << 30
"""What CUDA and NCCL take of a GPU before there is a tensor; assumed."""
CPU_PROCESS_BYTES = 700 << 20
"""What a rank's process takes on a CPU before it has a network: Python and the libraries that it imports. Measured, as its resident set under Ray."""
ON_A_GPU = "computed; not compared with the memory of any GPU"
ON_A_CPU = "computed; within a tenth of what ranks took in eleven configurations (benchmarks/plan_memory.py, on a CPU)"
"""What a person has to know of the peaks."""
_ROW_FILL = 0.9
"""Share of packed rows that holds tokens, with 16 samples a micro-batch; more samples fill better."""
_WIDTH_MULTIPLE = 8
MOST_SAMPLES = 1 << 16
"""Up to which the largest micro-batch is looked for."""


@dataclass(frozen=True)
class StageMemory:
    """A rank at one ZeRO stage, with and without recomputation of activations."""

    stage: int
    rank: RankMemory
    """As `model.activation_checkpointing` has it."""
    activations_bytes_kept: int
    """Without checkpointing."""
    activations_bytes_checkpointed: int
    process_bytes: int
    """What is taken before there is a tensor: of a GPU by CUDA, on a CPU by the process."""
    margin_bytes: int
    needed_bytes: int
    """Peak, margin and process."""
    fits: bool | None
    """On the named GPU; None where there is none."""
    largest_micro_batch: int | None
    """Samples of the longest rows that fit it, everything else as configured; 0 where not one does."""
    accumulates_in: str
    """Type in which gradients of several micro-batches are summed."""

    def to_json(self) -> dict[str, Any]:
        """JSON object; the parts of `rank` lie beside the rest."""
        return {**self.rank.to_json(), **{key: value for key, value in asdict(self).items() if key != "rank"}}


@dataclass(frozen=True)
class Shape:
    """What the memory of a rank depends on beside its stage."""

    config: RunConfig
    network: Dimensions
    precision: str
    world_size: int
    on_gpu: bool
    samples: dict[int, MeanSample]
    """By sequence length."""
    attention: str
    """Kernel of attention."""

    def job(self, phase: Phase, stage: int, *, checkpointing: bool, micro_batch_size: int | None = None) -> Job:
        """A phase at a stage as `trainer.memory` wants it."""
        settings = self.zero_settings(stage)
        size = micro_batch_size or phase.micro_batch_size
        return Job(
            network=self.network,
            batch=_pass_of(self.config, size, phase.sequence_length, self.samples[phase.sequence_length]),
            kernels=Kernels(4 if self.precision == "fp32" else 2, self.on_gpu, checkpointing, self.attention),
            precision=self.precision,
            world_size=self.world_size,
            num_passes=micro_steps(phase.num_micro_batches, self.world_size) * self.config.batch.split,
            bucket_elements=int(settings["reduce_bucket_size"]),
            overlaps=bool(settings.get("overlap_comm", False)),
            has_flat_gradients=not settings.get("contiguous_gradients", True),
            has_updates=self.config.optimizer.kind == "lamb",
        )

    def zero_settings(self, stage: int) -> dict[str, Any]:
        """DeepSpeed's section `zero_optimization` at a stage; where that cannot overlap as configured, it does not."""
        zero = self.config.zero.model_copy(update={"stage": stage})
        if stage != self.config.zero.stage and not zero.can_overlap(self.precision):
            zero = zero.model_copy(update={"overlap": False})
        config = self.config.model_copy(update={"precision": self.precision, "zero": zero})
        return derive_deepspeed_config(config, self.world_size, "cuda" if self.on_gpu else "cpu")["zero_optimization"]

    @property
    def why_unknown(self) -> str | None:
        """Why nothing is said of a rank's memory; None where something is."""
        settings = self.zero_settings(self.config.zero.stage)
        moved = [key for key in ("offload_optimizer", "offload_param") if offload_device(settings, key) != "none"]
        moved += [key for key in ("cpu_offload", "cpu_offload_param") if settings.get(key)]
        return f"what offloading ({', '.join(moved)}) leaves on the device, and takes of main memory, is not counted" if moved else None

    def peak(self, phases: Sequence[Phase], stage: int, *, checkpointing: bool, micro_batch_size: int | None = None) -> RankMemory:
        """The phase that takes most."""
        found = [rank_memory(self.job(phase, stage, checkpointing=checkpointing, micro_batch_size=micro_batch_size), stage) for phase in phases]
        return max(found, key=lambda memory: memory.peak_bytes)


def stages_memory(shape: Shape, gpu_bytes: int | None) -> list[StageMemory]:
    """A rank at each stage."""
    return [_stage_memory(shape, stage, gpu_bytes) for stage in STAGES]


def _stage_memory(shape: Shape, stage: int, gpu_bytes: int | None) -> StageMemory:
    phases, checkpointing = shape.config.phases, shape.config.model.activation_checkpointing
    rank = shape.peak(phases, stage, checkpointing=checkpointing)
    process, needed = process_bytes(on_gpu=shape.on_gpu), needed_bytes(rank.peak_bytes, on_gpu=shape.on_gpu)
    return StageMemory(
        stage=stage,
        rank=rank,
        activations_bytes_kept=shape.peak(phases, stage, checkpointing=False).activations_bytes,
        activations_bytes_checkpointed=shape.peak(phases, stage, checkpointing=True).activations_bytes,
        process_bytes=process,
        margin_bytes=needed - rank.peak_bytes - process,
        needed_bytes=needed,
        fits=None if gpu_bytes is None else needed <= gpu_bytes,
        largest_micro_batch=None if gpu_bytes is None else _largest(shape, stage, gpu_bytes),
        accumulates_in="fp32",  # at every stage, see `trainer.deepspeed_config` and `trainer.engine`
    )


def needed_bytes(peak_bytes: int, *, on_gpu: bool) -> int:
    """What has to be there for a peak."""
    return round(peak_bytes * (1 + MARGIN)) + process_bytes(on_gpu=on_gpu)


def process_bytes(*, on_gpu: bool) -> int:
    """What a rank takes without a tensor."""
    return GPU_CONTEXT_BYTES if on_gpu else CPU_PROCESS_BYTES


def _largest(shape: Shape, stage: int, gpu_bytes: int) -> int:
    """The largest micro-batch of the longest rows, by bisection: more samples never take less."""
    longest = max(shape.config.phases, key=lambda phase: phase.sequence_length)
    checkpointing = shape.config.model.activation_checkpointing

    def fits(size: int) -> bool:
        rank = shape.peak([longest], stage, checkpointing=checkpointing, micro_batch_size=size)
        return needed_bytes(rank.peak_bytes, on_gpu=True) <= gpu_bytes

    low, high = 0, MOST_SAMPLES
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _pass_of(config: RunConfig, micro_batch_size: int, sequence_length: int, sample: MeanSample) -> Pass:
    """The part of a micro-batch that is computed at once. Padded rows are as wide as the longest sample, which is a full row in almost every one."""
    tokens = micro_batch_size * sample.num_tokens
    packed = config.batch.row_packing == "rows"
    rows = math.ceil(tokens / sequence_length / (1.0 if sample.is_bound else _ROW_FILL)) if packed else micro_batch_size
    ordinary = tokens - special_tokens(config.objective) * micro_batch_size
    predicted = tokens - micro_batch_size if config.objective.kind == "clm" else config.objective.mask_rate * ordinary
    split = min(config.batch.split, rows)
    return Pass(
        num_rows=math.ceil(rows / split),
        width=-(-sequence_length // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE,
        num_predicted=max(1, math.ceil(predicted / split / MASKED_MULTIPLE)) * MASKED_MULTIPLE,
        packed=packed,
    )
