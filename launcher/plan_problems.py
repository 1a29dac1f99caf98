"""Everything that a run would stumble over, found beforehand (pure)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data_pipeline.errors import ConfigError, DataCorruptError, MaskwrightError
from data_pipeline.mixture import Mixture
from launcher.plan_checkpoints import CheckpointPlan
from launcher.plan_memory import StageMemory
from trainer.config import RunConfig
from trainer.dimensions import Dimensions
from trainer.gpus import find_gpu

MANY_EPOCHS = 40.0
"""Of BERT's own training (Devlin et al. 2018, appendix A.2)."""
BLOCKS_PER_LANE = 8
"""With fewer, documents of a lane are shuffled poorly."""
BESIDE_RANKS_BYTES = 1500 << 20
"""What the command and Ray take of a machine beside ranks. Measured, as the sum of their proportional sets."""


@dataclass(frozen=True)
class Problem:
    """What will go wrong, or may."""

    severity: Literal["error", "warning"]
    """`error`: the run will not get past it."""
    cause: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


def device_problems(config: RunConfig, precision: str, gpu: str | None, world_size: int) -> Iterator[Problem]:
    """Precisions and kernels that the device lacks, ranks without work."""
    entry, phases = find_gpu(gpu) if gpu is not None else None, config.phases
    if gpu is None and precision == "fp16":
        yield Problem("error", "precision fp16 needs a GPU", "Set precision to bf16 or fp32, or plan with --gpu.")
    if gpu is None and config.model.attention == "varlen":
        yield Problem("error", "model.attention varlen needs a GPU", "Set model.attention to auto, or plan with --gpu.")
    if entry is not None and precision not in entry.tflops:
        cause = f"{gpu} is not known to compute in {precision}: its maker states no rate"
        yield Problem("warning", cause, f"Set precision to {' or '.join(entry.tflops)}.")
    most, remedy = max(phase.num_micro_batches for phase in phases), "Take fewer ranks, or lower batch.micro_batch_size."
    if world_size > most:
        yield Problem("error", f"{world_size} ranks exceed the {most} micro-batches of a step, so some would never have work", remedy)
        return
    short = [phase for phase in phases if world_size > phase.num_micro_batches]
    if short:
        steps, fewest = sum(phase.num_steps for phase in short), min(phase.num_micro_batches for phase in short)
        cause = f"{steps:,} steps have as few as {fewest} micro-batches: some of {world_size} ranks are idle in them"
        yield Problem("warning", cause, remedy)


def memory_problems(
    config: RunConfig, memory: Sequence[StageMemory], *, gpu: str | None, gpu_bytes: int | None, host_bytes: int | None, world_size: int
) -> Iterator[Problem]:
    """Ranks that do not fit the GPU, or the machine."""
    own = next((stage for stage in memory if stage.stage == config.zero.stage), None)
    if own is None:
        return
    if gpu_bytes is not None and own.needed_bytes > gpu_bytes:
        yield Problem(
            "error", f"a rank needs {_gb(own.needed_bytes)} at ZeRO stage {own.stage}; {gpu} has {_gb(gpu_bytes)}", _to_fit(config, memory, own)
        )
    needed = own.needed_bytes * world_size + BESIDE_RANKS_BYTES
    if host_bytes is not None and needed > host_bytes:
        cause = f"{world_size} ranks at ZeRO stage {own.stage} and Ray need {_gb(needed)}; this machine gives {_gb(host_bytes)}"
        yield Problem("error", cause, _to_fit(config, memory, own))


def _to_fit(config: RunConfig, memory: Sequence[StageMemory], own: StageMemory) -> str:
    ways: list[str] = []
    if own.largest_micro_batch:
        ways.append(f"lower batch.micro_batch_size to {own.largest_micro_batch}")
    ways.append("raise batch.split, which keeps the batch as it is")
    if not config.model.activation_checkpointing and own.activations_bytes_checkpointed < own.activations_bytes_kept:
        ways.append("set model.activation_checkpointing")
    smaller = min(memory, key=lambda stage: stage.needed_bytes)
    if smaller.needed_bytes < own.needed_bytes:
        ways.append(f"set zero.stage to {smaller.stage}")
    return f"{', or '.join(ways)}.".capitalize()


def storage_problems(checkpoints: CheckpointPlan | None, free_bytes: int | None, host_bytes: int | None, snapshots_bytes: int) -> Iterator[Problem]:
    """Disks and main memory that checkpoints do not fit."""
    if checkpoints is None:
        return
    wanted = checkpoints.kept_bytes + checkpoints.checkpoint_bytes
    if free_bytes is not None and wanted > free_bytes:
        yield Problem(
            "error" if 2 * checkpoints.checkpoint_bytes > free_bytes else "warning",
            f"checkpoints take {_gb(wanted)} with the one that is being written; {_gb(free_bytes)} are free where the storage is",
            "Free space, lower checkpoint.keep_last or keep less often, or choose another --storage.",
        )
    if host_bytes is not None and snapshots_bytes > host_bytes:
        yield Problem(
            "error",
            f"snapshots of all ranks take {_gb(snapshots_bytes)} of main memory; this machine gives {_gb(host_bytes)}",
            "Train on more machines.",
        )


def input_problems(errors: Sequence[MaskwrightError]) -> Iterator[Problem]:
    """Text that could not be prepared, tasks that could not be fine-tuned on.

    What cannot be read here may be readable where the run will be; what is wrong here is wrong there.
    """
    for error in errors:
        yield Problem("error" if isinstance(error, (ConfigError, DataCorruptError)) else "warning", error.cause, error.remedy)


def data_problems(config: RunConfig, mixture: Mixture | None, rounds: Sequence[float] | None) -> Iterator[Problem]:
    """Corpora with too little text for the batch, or for the length of the run."""
    if mixture is None:
        return
    for series in {phase.series: phase for phase in config.phases}.values():
        for index in mixture.indexes:
            if series.sequence_length not in index.sequence_lengths:
                yield Problem(
                    "error", f"corpus {index.folder.name} is not prepared for rows of {series.sequence_length}", "Run `maskwright prepare CONFIG`."
                )
                continue
            samples, blocks = index.num_samples("train", series.sequence_length), len(index.blocks("train"))
            if samples < series.num_lanes:
                cause = f"corpus {index.folder.name} has {samples:,} samples, fewer than the {series.num_lanes:,} micro-batches of a step"
                yield Problem("error", cause, "Use more text, or a smaller batch.global_batch_size.")
            elif blocks < BLOCKS_PER_LANE * series.num_lanes:
                few = f"fewer than {BLOCKS_PER_LANE} each shuffle poorly"
                cause = f"corpus {index.folder.name} has {blocks:,} blocks for {series.num_lanes:,} lanes: {few}"
                yield Problem("warning", cause, "Use more text, or fewer and larger micro-batches.")
    if rounds and max(rounds) > MANY_EPOCHS:
        yield Problem("warning", f"the model will see each text {max(rounds):,.0f} times", "Use more text, or fewer schedule.steps.")


def network_problems(config: RunConfig, network: Dimensions | None, memory_reason: str | None) -> Iterator[Problem]:
    """Rows that the network does not take; networks and settings of which nothing can be said."""
    longest = max(config.batch.sequence_lengths)
    if network is None:
        yield Problem("warning", f"memory and checkpoints are not planned: {memory_reason}", "Plan for a network like it, by its dimensions.")
    elif memory_reason is not None:
        yield Problem("warning", f"memory is not planned: {memory_reason}", "Plan without offloading for a bound of the device, or try a few steps.")
    if network is not None and longest > network.max_positions:
        yield Problem(
            "error", f"batch.sequence_length {longest} exceeds the {network.max_positions} positions of the network", "Choose shorter rows."
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
