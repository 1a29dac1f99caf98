"""The typed models of cluster YAMLs: *where* a run trains (pure)."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import Section


class ClusterConfig(Section):
    """What every kind of cluster has: *where* to train. Machines and budgets only; nothing here changes the model."""

    num_workers: int | Literal["auto"] = Field(default="auto")
    """Ranks. `auto`: one per GPU; without GPUs two on this machine (one where there is a single CPU), on a cluster one per node."""
    threads_per_worker: int | Literal["auto"] = Field(default="auto")
    """CPU threads of a rank. `auto`: CPUs divided by ranks. Part of what must not change for bit-exact resumes."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Whether ranks get a GPU each. `auto`: when there is one."""
    max_failures: int = Field(default=3, ge=0)
    """Infrastructure failures (a worker killed, lost, stopped or hung) in 24 hours that are retried; one more ends the run with exit code 11."""
    max_preemptions: int = Field(default=50, ge=0)
    """Nodes taken away as announced (spot instances) in 24 hours that are followed by another attempt; one more ends the run with exit code 75."""


class LocalCluster(ClusterConfig):
    """The whole of a cluster YAML of kind `local`."""

    kind: Literal["local"] = "local"
    """`local`: Ray started by the command itself, on this machine, for the length of the command."""
    object_store_bytes: int | None = Field(default=None, ge=80_000_000)
    """Shared memory for Ray's object store; null means 512 MB, which only `prepare` uses."""


class SharedVenv(Section):
    """Software that lies in a virtual environment, on every node at one path."""

    venv: str = Field(pattern=r"^/[\w./+-]+$")
    """Its folder. It has the cluster's releases of Python and Ray."""

    @property
    def python(self) -> str:
        """Its interpreter."""
        return f"{self.venv.rstrip('/')}/bin/python"


DASHBOARD = r"^https?://([^\s:/@?#]+|\[[0-9a-fA-F:]+\])(:\d+)?/?$"
"""Addresses without anything that would lead elsewhere, or is secret."""


class ElasticCluster(ClusterConfig):
    """What clusters of several machines have, too."""

    min_workers: int | None = Field(default=None, ge=1)
    """Elastic: with fewer than `num_workers` ranks the run goes on, down to so many, and grows again where it pays. Null: it waits for all."""
    wait_s: float = Field(default=300.0, ge=0.0)
    """Seconds that an attempt waits for nodes enough before it counts as an infrastructure failure."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_workers is not None and self.num_workers != "auto" and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds num_workers {self.num_workers}")
        return self

    def inside(self) -> "RayCluster":
        """The same cluster for the driver of a submitted run, which is on one of its machines."""
        return RayCluster(kind="ray", **{name: getattr(self, name) for name in ElasticCluster.model_fields})


class RayCluster(ElasticCluster):
    """The whole of a cluster YAML of kind `ray`."""

    kind: Literal["ray"]
    """`ray`: a Ray cluster that is there already. `run` drives it from one of its machines, `submit` from anywhere. It is never shut down."""
    address: str = Field(default="auto", pattern=r"^(auto|[^\s:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+)$")
    """`host:port` of the cluster's head, or `auto`: the cluster that runs on the machine of the driver."""
    dashboard: str | None = Field(default=None, pattern=DASHBOARD)
    """Address of the dashboard, such as `http://head:8265`, through which `submit` hands a run over to the cluster. Null: only `run` works."""
    environment: SharedVenv | None = None
    """Where ranks, and the driver of a submitted run, find their libraries. Null: ranks where Ray does, that driver in the PATH of the head."""

    def inside(self) -> "RayCluster":
        """It is what it is."""
        return self


WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.,+-]*$"
"""Names of partitions and accounts."""
DURATION = r"^(\d+-)?\d+(:\d+){0,2}$"
"""How Slurm writes a length of time: 90 (minutes), 12:00:00, 2-00:00:00."""
SBATCH_OPTION = r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:/@%+=&|*()\[\]<>-]+)?$"
"""An option for sbatch, of which neither it nor a shell can make anything else."""
_OURS = (
    "account",
    "array",
    "chdir",
    "clusters",
    "cpus-per-task",
    "error",
    "export",
    "export-file",
    "get-user-env",
    "gid",
    "gpus-per-node",
    "job-name",
    "no-kill",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "requeue",
    "signal",
    "test-only",
    "time",
    "uid",
    "wait",
    "wrap",
)
"""Options that follow from other keys, or on which the job's script relies."""


class SlurmCluster(ElasticCluster):
    """The whole of a cluster YAML of kind `slurm`."""

    kind: Literal["slurm"]
    """`slurm`: `submit` hands a run over to sbatch. The job starts Ray on its allocation, drives the run, and continues it when it is requeued."""
    environment: SharedVenv
    """Where the job finds its libraries. Our own packages travel with it."""
    nodes: int = Field(default=1, ge=1)
    """Machines of the allocation; each becomes a node of the job's own Ray."""
    partition: str | None = Field(default=None, pattern=WORD)
    """Null: the one that Slurm takes by itself."""
    account: str | None = Field(default=None, pattern=WORD)
    """What is charged. Null: what Slurm takes by itself."""
    time_limit: str | None = Field(default=None, pattern=DURATION)
    """As Slurm writes it, in quotes: "90" (minutes), "12:00:00", "2-00:00:00". A run that needs longer is requeued. Null: that of the partition."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs of each machine. Null: none are asked for."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPUs of each machine, where one task runs: Ray. Null: what Slurm gives by itself, a single one unless `--exclusive` is among the options."""
    grace_s: int = Field(default=120, ge=30, le=3600)
    """Seconds before its time limit at which the job saves a checkpoint and goes back into the queue."""
    options: tuple[Annotated[str, Field(pattern=SBATCH_OPTION)], ...] = ()
    """Further options for sbatch, in their long form: --constraint=h100, --exclusive, --mem=0."""

    @field_validator("time_limit", mode="before")
    @classmethod
    def _is_quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('time_limit: put it in quotes, as in "12:00:00": without them YAML reads it as a number')  # noqa: TRY004 - pydantic's
        return value

    @field_validator("options")
    @classmethod
    def _are_free(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option.removeprefix("--").partition("=")[0]
            if taken := [ours for ours in _OURS if ours.startswith(name)]:  # sbatch takes every beginning of a name for it
                raise ValueError(f"options: --{name} may not be among them, the job's script sets --{taken[0]}")
        return value


Cluster = LocalCluster | RayCluster | SlurmCluster
CLUSTER_KINDS: dict[str, type[Cluster]] = {"local": LocalCluster, "ray": RayCluster, "slurm": SlurmCluster}
