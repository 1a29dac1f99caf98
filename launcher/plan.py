"""`Plan`: how long a run takes, what it needs and what will go wrong, from its configuration and what is known beside it (pure)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipeline import volume
from data_pipeline.mixture import Mixture
from data_pipeline.order import blocks_per_window, micro_steps
from launcher.plan_checkpoints import CheckpointPlan, checkpoint_plan
from launcher.plan_memory import MARGIN, ON_A_CPU, ON_A_GPU, Shape, StageMemory, process_bytes, stages_memory
from launcher.plan_problems import Problem, data_problems, device_problems, input_problems, memory_problems, network_problems, storage_problems
from launcher.plan_time import Duration, Stated, cost, duration
from launcher.plan_work import PhaseWork, WorldSize, mean_sample, total_tokens, world_sizes
from trainer.config import RunConfig
from trainer.gpus import stated_flops
from trainer.memory import checkpoint_bytes, snapshot_bytes

if TYPE_CHECKING:
    from launcher.plan_facts import Facts

COPY_BYTES_PER_S = 2e9
"""At which a rank copies what it saves into main memory, where no checkpoint of an earlier run was measured; assumed."""


@dataclass(frozen=True)
class Plan:
    """See `to_json`, whose keys are an interface."""

    config: RunConfig
    facts: "Facts"
    work: tuple[PhaseWork, ...]
    epochs: tuple[float, ...] | None
    """Of each corpus."""
    tokens_are_bound: bool
    memory: tuple[StageMemory, ...] | None
    memory_reason: str | None
    """Why that is not known."""
    world_sizes: tuple[WorldSize, ...]
    snapshot_bytes: int | None
    """Of host memory, for the largest rank."""
    duration: Duration
    cost: float | None
    cost_reason: str | None
    checkpoints: CheckpointPlan | None
    resume_bytes: int | None
    """That a rank reads at most before it goes on (D2)."""
    problems: tuple[Problem, ...]

    @property
    def tokens(self) -> int:
        """That the model sees."""
        return total_tokens(self.work)

    @property
    def memory_basis(self) -> str:
        """What the peaks were compared with."""
        return ON_A_GPU if self.facts.gpu else ON_A_CPU

    def to_json(self) -> dict[str, Any]:
        """JSON object. What is null has its reason beside it or in the basis of what it follows from: `parameters`, `checkpoints` and
        `snapshot_bytes` in `basis.network`, `step_s` in `hours_basis`, `resume_bytes` in `epochs_reason` or a problem."""
        facts = self.facts
        return {
            "steps": self.config.schedule.steps,
            "epochs": None if self.epochs is None else max(self.epochs),
            "epochs_by_corpus": None if self.epochs is None else dict(zip(facts.corpora, self.epochs, strict=True)),
            "epochs_reason": None if self.epochs is not None else facts.corpora_basis,
            "tokens": self.tokens,
            "tokens_are_upper_bound": self.tokens_are_bound,
            "parameters": None if facts.network is None else facts.network.parameters,
            "memory": None if self.memory is None else [stage.to_json() for stage in self.memory],
            "memory_reason": self.memory_reason,
            "memory_basis": None if self.memory is None else self.memory_basis,
            "world_size": facts.world_size.value,
            "world_sizes": [size.to_json() for size in self.world_sizes],
            "snapshot_bytes": self.snapshot_bytes,
            "resume_bytes": self.resume_bytes,
            "hours": self.duration.hours,
            "hours_basis": self.duration.basis,
            "hours_are_upper_bound": self.duration.is_bound,
            "step_s": self.duration.step_s,
            "cost": self.cost,
            "cost_reason": self.cost_reason,
            "checkpoints": None if self.checkpoints is None else self.checkpoints.to_json(),
            "problems": [problem.to_json() for problem in self.problems],
            "basis": self.basis(),
        }

    def basis(self) -> dict[str, dict[str, Any]]:
        """What the plan rests on: each value, and whether it was stated, measured, read or assumed."""
        facts = self.facts
        known = {"vocabulary": facts.vocabulary, "precision": facts.precision, "attention": facts.attention, "world_size": facts.world_size}
        corpus = {"value": " + ".join(facts.corpora) or None, "basis": facts.corpora_basis}
        found = {"corpus": corpus, **{name: {"value": each.value, "basis": each.basis} for name, each in known.items()}}
        device = {"value": facts.gpu or "cpu", "basis": "stated: --gpu" if facts.gpu else "assumed: no --gpu"}
        network = {"value": self.config.model.architecture, "basis": facts.network_basis}
        process = {"value": f"{process_bytes(on_gpu=facts.gpu is not None) / 1e9:.2f} GB", "basis": "assumed: CUDA" if facts.gpu else "measured"}
        margin = {"value": f"{MARGIN:.0%} of memory", "basis": "assumed"}
        return {**found, "device": device, "network": network, "process": process, "margin": margin}


def make_plan(config: RunConfig, facts: "Facts", stated: Stated) -> Plan:
    """The plan of a run.

    Raises:
        ConfigError: `zero.deepspeed` is refused, as it would be when the run begins.
    """
    samples = {length: mean_sample(facts.mixture, length, config.objective) for length in config.batch.sequence_lengths}
    work = tuple(PhaseWork.of(phase, samples[phase.sequence_length], config.objective) for phase in config.phases)
    world_size, precision, network = facts.world_size.value, facts.precision.value, facts.network
    epochs = None if facts.mixture is None else tuple(volume.epochs(facts.mixture, config.phases))
    memory, memory_reason, snapshot = None, facts.network_basis, None
    if network is not None:
        shape = Shape(config, network, precision, world_size, facts.gpu is not None, samples, facts.attention.value)
        memory_reason = shape.why_unknown
        memory = tuple(stages_memory(shape, facts.gpu_bytes)) if memory_reason is None else None
        snapshot = snapshot_bytes(network, precision, config.zero.stage, world_size)
    took = duration(config, work, network, world_size, stated, facts.speed, stated_flops(facts.gpu, precision) if facts.gpu else None)
    price, price_reason = cost(took.hours, world_size, stated)
    checkpoints = _checkpoints(config, facts, stated, took, snapshot)
    problems = [
        *network_problems(config, network, memory_reason),
        *device_problems(config, precision, facts.gpu, world_size),
        *memory_problems(config, memory or (), gpu=facts.gpu, gpu_bytes=facts.gpu_bytes, host_bytes=facts.host_bytes, world_size=world_size),
        *storage_problems(checkpoints, facts.free_bytes, facts.host_bytes, (snapshot or 0) * world_size),
        *data_problems(config, facts.mixture, epochs),
        *input_problems((*facts.source_errors, *facts.task_errors)),
    ]
    return Plan(
        config=config,
        facts=facts,
        work=work,
        epochs=epochs,
        tokens_are_bound=any(sample.is_bound for sample in samples.values()),
        memory=memory,
        memory_reason=memory_reason,
        world_sizes=tuple(world_sizes(config.phases, world_size)),
        snapshot_bytes=snapshot,
        duration=took,
        cost=price,
        cost_reason=price_reason,
        checkpoints=checkpoints,
        resume_bytes=resume_bytes(config, facts.mixture, world_size),
        problems=tuple(sorted(problems, key=lambda problem: problem.severity)),
    )


def resume_bytes(config: RunConfig, mixture: Mixture | None, world_size: int) -> int | None:
    """What a rank reads at most before its first batch after a resume: a window of each lane that it serves, of each corpus. None without one."""
    if mixture is None or any(length not in index.sequence_lengths for index in mixture.indexes for length in config.batch.sequence_lengths):
        return None
    windows: list[int] = []
    for phase in config.phases:
        lanes = micro_steps(phase.num_micro_batches, world_size)
        for index in mixture.indexes:
            blocks = index.blocks("train")
            usual = blocks_per_window(index.num_samples("train", phase.sequence_length), len(blocks))
            of_lane = -(-len(blocks) // phase.num_lanes) + 1  # the first and the last of a lane may be shared with its neighbours
            windows.append(lanes * -(-of_lane // max(1, round(of_lane / usual))) * int(blocks["bytes"].max()))
    return sum(max(windows[corpus :: len(mixture)]) for corpus in range(len(mixture)))


def _checkpoints(config: RunConfig, facts: "Facts", stated: Stated, took: Duration, snapshot: int | None) -> CheckpointPlan | None:
    if facts.network is None or snapshot is None:
        return None
    measured = facts.speed.checkpoint_stall_s if facts.speed is not None else 0.0
    basis = f"measured: run {facts.speed.source}" if facts.speed is not None and measured else f"assumed: {COPY_BYTES_PER_S / 1e9:g} GB/s"
    return checkpoint_plan(
        config.checkpoint,
        config.schedule.steps,
        checkpoint_bytes(facts.network, facts.precision.value, config.zero.stage),
        stall_s=measured or snapshot / COPY_BYTES_PER_S,
        stall_basis=basis,
        step_s=took.step_s,
        failures_per_day=stated.failures_per_day,
    )
