"""Shapes of what verbs answer about configurations, runs and models (pure). Where a run stands is `run_status.RunStatus`."""

from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from launcher.answers.shape import SHAPE
from launcher.history import Attempt
from launcher.plan_checkpoints import CheckpointPlan
from launcher.plan_problems import Problem
from launcher.plan_work import WorldSize


@with_config(SHAPE)
class Files(TypedDict):
    """Of `init`, and of `schema --write`."""

    files: list[str]
    """That were written."""


@with_config(SHAPE)
class Schemas(TypedDict):
    """Of `schema`: JSON schemas."""

    run: dict[str, Any]
    cluster: dict[str, Any]


@with_config(SHAPE)
class AnswerSchema(TypedDict):
    """Of a verb, in what `schema --answers` answers."""

    a_line_each: bool
    """Whether the answer may be several documents, each on a line of its own."""
    schema: dict[str, Any]
    """JSON schema of a document."""


@with_config(SHAPE)
class PlannedStage(TypedDict):
    """Memory of a rank at a ZeRO stage, in bytes."""

    stage: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int
    peak_bytes: int
    peak_at: str
    activations_bytes_kept: int
    activations_bytes_checkpointed: int
    process_bytes: int
    margin_bytes: int
    needed_bytes: int
    fits: bool | None
    largest_micro_batch: int | None
    accumulates_in: str


@with_config(SHAPE)
class Basis(TypedDict):
    """A value that a plan rests on, and where it comes from."""

    value: Any
    basis: str


@with_config(SHAPE)
class PlanAnswer(TypedDict):
    """Of `plan`. What is null has its reason beside it, or in the basis of what it follows from."""

    steps: int
    epochs: float | None
    """Of the corpus that is seen most often."""
    epochs_by_corpus: dict[str, float] | None
    epochs_reason: str | None
    tokens: int
    tokens_are_upper_bound: bool
    parameters: int | None
    memory: list[PlannedStage] | None
    memory_reason: str | None
    memory_basis: str | None
    """With what the peaks were compared."""
    world_size: int
    world_sizes: list[WorldSize]
    snapshot_bytes: int | None
    resume_bytes: int | None
    hours: float | None
    hours_basis: str
    hours_are_upper_bound: bool
    step_s: float | None
    cost: float | None
    cost_reason: str | None
    checkpoints: CheckpointPlan | None
    problems: list[Problem]
    basis: dict[str, Basis]


@with_config(SHAPE)
class Submitted(TypedDict):
    """Of `submit`; with --follow what the job prints comes after it, on stderr."""

    run: str
    folder: str
    """Folder or URL of the run."""
    submission: str
    """Id of the job, as the cluster has it."""
    cluster: str
    """Where that is."""


@with_config(SHAPE)
class PlannedRayJob(TypedDict):
    """Of `submit --dry-run` on a cluster of kind `ray` or `ray_up`: the arguments of Ray's `submit_job`, and what the job would do."""

    dashboard: str
    """Where it would be sent."""
    submission_id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    command: list[str]
    """That the job would find in the run's folder."""


@with_config(SHAPE)
class PlannedSlurmJob(TypedDict):
    """Of `submit --dry-run` on a cluster of kind `slurm`."""

    dashboard: str
    """Empty."""
    job: str
    """Its name."""
    script: str
    """That sbatch would be given."""
    command: list[str]


@with_config(SHAPE)
class PlannedKubernetesJob(TypedDict):
    """Of `submit --dry-run` on a cluster of kind `kuberay`."""

    dashboard: str
    manifest: dict[str, Any]
    """That `kubectl create` would be given."""
    package: str
    """Where our packages would lie."""
    command: list[str]


@with_config(SHAPE)
class LogLine(TypedDict):
    """Of `logs`: a line of a rank's log, or of what the job of a submitted run has printed."""

    attempt: int
    """Counted from 1; 0: before the first one, by the job."""
    rank: int
    line: str


@with_config(SHAPE)
class Exported(TypedDict):
    """Of `export`."""

    model: str
    """Folder or URL of the model."""
    step: int
    """Of the checkpoint that it was made from."""


@with_config(SHAPE)
class TaskScore(TypedDict):
    """Of `evaluate`: a classifier on its task's test rows."""

    task: str
    num_rows: int
    accuracy: float
    macro_f1: float


@with_config(SHAPE)
class Filling(TypedDict):
    """Of `evaluate --text`: a token that may stand at a [MASK]."""

    token: str
    probability: float


@with_config(SHAPE)
class GoodputAnswer(TypedDict):
    """What the wall time of pretraining was spent on."""

    wall_s: float
    useful_s: float
    goodput: float
    """Useful time as a share of the wall time."""
    lost_s: dict[str, float]
    """By cause; with `useful_s` they add up to `wall_s`."""
    paused_s: float
    """For which somebody had stopped the run; in none of the others."""


@with_config(SHAPE)
class StepPhasesAnswer(TypedDict):
    """The mean step."""

    num_steps: int
    step_s: float
    seconds: dict[str, float | None]
    """By phase; null where it cannot be told from another."""


@with_config(SHAPE)
class ProofAnswer(TypedDict):
    """That the newest weights come from each batch of the run exactly once."""

    holds: bool
    steps: int
    repeated: int
    skipped: int
    wrong_steps: list[int]
    deliberate: int
    checked: int
    different: list[int]
    unchecked: str


@with_config(SHAPE)
class RunReport(TypedDict):
    """Of `report RUN`."""

    report: str
    """Where the page lies."""
    attempts: list[Attempt]
    goodput: GoodputAnswer
    step_phases: StepPhasesAnswer | None
    proof: ProofAnswer | None


@with_config(SHAPE)
class PhaseAnswer(TypedDict):
    """A part of a profiled step."""

    phase: str
    seconds: float | None
    share: float | None


@with_config(SHAPE)
class CostAnswer(TypedDict):
    """What an operator or kernel took for itself, in all profiled steps."""

    name: str
    calls: int
    seconds: float
    share: float


@with_config(SHAPE)
class ProfileAnswer(TypedDict):
    """Of `profile`."""

    run: str
    checkpoint_step: int | None
    """Whose weights were taken; null: fresh ones."""
    first_step: int
    num_steps: int
    world_size: int
    zero_stage: int
    precision: str
    attention: str
    compiled: bool
    device: str
    step_s: float
    phases: list[PhaseAnswer]
    costs_of: Literal["cpu", "gpu"]
    costs: list[CostAnswer]
    trace: str


@with_config(SHAPE)
class LeftoverAnswer(TypedDict):
    """Something that serves nothing any more."""

    path: str
    kind: str
    bytes: int
    removed: bool


@with_config(SHAPE)
class Cleaned(TypedDict):
    """Of `clean`."""

    leftovers: list[LeftoverAnswer]
    bytes: int
    """Of those that can go, or have gone."""
    removed: bool
    """Whether --yes was given."""
    passed_over: dict[str, str]
    """Why, by name."""
