"""The typed models of cluster YAMLs: *where* a run trains (pure)."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import Section
from launcher.cluster_environment import Environment, KubernetesSecret, SecretFile, Variable, only
from launcher.cluster_machines import AwsProvider, Claim, GcpProvider, HeadPod, Label, LocalProvider, Machines, Quantity


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
    env_from: tuple[Variable | SecretFile | KubernetesSecret, ...] = ()
    """Secrets that driver and ranks need, by name: variables of Ray's processes on each machine or `{file: PATH}` there; on Kubernetes
    `{secret: NAME, keys: [VARIABLE]}`. Values are taken where they are used, and travel nowhere."""

    @model_validator(mode="after")
    def _secrets_are_of_its_kind(self) -> Self:
        on_kubernetes = getattr(self, "kind", None) == "kuberay"
        if any(isinstance(source, KubernetesSecret) is not on_kubernetes for source in self.env_from):
            wanted = "{secret: NAME, keys: [VARIABLE]}" if on_kubernetes else "names of variables or {file: PATH}"
            raise ValueError(f"env_from: expected {wanted}, found something else")
        return self

    @property
    def publishes_metrics(self) -> bool:
        """Whether runs are shown by Ray's endpoint for Prometheus; the network of a cluster is its own (SECURITY.md)."""
        return True


class LocalCluster(ClusterConfig):
    """The whole of a cluster YAML of kind `local`."""

    kind: Literal["local"] = "local"
    """`local`: Ray started by the command itself, on this machine, for the length of the command."""
    object_store_bytes: int | None = Field(default=None, ge=80_000_000)
    """Shared memory for Ray's object store; null means 512 MB, which only `prepare` uses."""
    metrics: bool = False
    """Whether the run's metrics are published for Prometheus, by Ray's endpoint: it asks for no token, and Ray has it listen on all interfaces."""

    @property
    def publishes_metrics(self) -> bool:
        """Where a machine has no network of its own, only when asked."""
        return self.metrics


DASHBOARD = r"^https?://([^\s:/@?#]+|\[[0-9a-fA-F:]+\])(:\d+)?/?$"
"""Addresses without anything that would lead elsewhere, or is secret."""


NAMESPACE = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(@[\w./:@-]+)?$"
"""Of Kubernetes, and kubectl's context where it is not the current one."""


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
        return self._as_ray()

    def _as_ray(self, **changes: Any) -> "RayCluster":
        return RayCluster(kind="ray", **{**{name: getattr(self, name) for name in ElasticCluster.model_fields}, **changes})


class RayCluster(ElasticCluster):
    """The whole of a cluster YAML of kind `ray`."""

    kind: Literal["ray"]
    """`ray`: a Ray cluster that is there already. `run` drives it from one of its machines, `submit` from anywhere. It is never shut down."""
    address: str = Field(default="auto", pattern=r"^(auto|[^\s:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+)$")
    """`host:port` of the cluster's head, or `auto`: the cluster that runs on the machine of the driver."""
    dashboard: str | None = Field(default=None, pattern=DASHBOARD)
    """Address of the dashboard, such as `http://head:8265`, through which `submit` hands a run over to the cluster. Null: only `run` works."""
    environment: Annotated[Environment | None, only("venv", "pip", because="machines that run already have their image")] = None
    """Where ranks, and the driver of a submitted run, find their libraries. Null: ranks where Ray does, that driver in the PATH of the head."""
    metrics: bool = True
    """Whether the run's metrics are published for Prometheus; whoever reaches the cluster's network may read them."""

    @property
    def publishes_metrics(self) -> bool:
        """As the file says."""
        return self.metrics

    def inside(self) -> "RayCluster":
        """It is what it is."""
        return self


WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.,+-]*$"
"""Names of partitions and accounts."""
DURATION = r"^(\d+-)?\d+(:\d+){0,2}$"
"""How Slurm writes a length of time: 90 (minutes), 12:00:00, 2-00:00:00."""
_LEAST_WORK_S = 120
"""Less than that before the grace begins is no time to train in: Ray starts, and a checkpoint is loaded."""
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
    "propagate",
    "requeue",
    "signal",
    "test-only",
    "time",
    "uid",
    "wait",
    "wrap",
)
"""Options that follow from other keys, or on which the job's script relies."""


def duration_s(text: str) -> float:
    """Seconds of a length of time as Slurm writes it; 0 stands for no limit."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)  # the first is hours, or minutes
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False)) or math.inf


class SlurmCluster(ElasticCluster):
    """The whole of a cluster YAML of kind `slurm`."""

    kind: Literal["slurm"]
    """`slurm`: `submit` hands a run over to sbatch. The job starts Ray on its allocation, drives the run, and continues it when it is requeued."""
    environment: Annotated[Environment, only("venv", because="its machines are those of Slurm")]
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
    grace_s: int = Field(default=120, ge=120, le=3600)
    """Seconds before its time limit at which the job saves a checkpoint and goes back into the queue. The last 60 of them are for Ray to end in."""
    options: tuple[Annotated[str, Field(pattern=SBATCH_OPTION)], ...] = ()
    """Further options for sbatch, in their long form: --constraint=h100, --exclusive, --mem=0, --gres=gpu:h100:4 (instead of `gpus_per_node`)."""
    setup_commands: tuple[Annotated[str, Field(pattern=r"^[ -~]+$")], ...] = ()
    """Lines for the job's script before anything is started, such as `module load cuda`. Whoever may look at jobs can read them."""
    metrics: bool = False
    """Whether the run's metrics are published for Prometheus: all users of the machines' network may read them."""

    def inside(self) -> RayCluster:
        """The job's own Ray, on a network that it shares with others."""
        return self._as_ray(metrics=self.metrics)

    @field_validator("time_limit", mode="before")
    @classmethod
    def _is_quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('time_limit: put it in quotes, as in "12:00:00": without them YAML reads it as a number')  # noqa: TRY004 - pydantic's
        return value

    @model_validator(mode="after")
    def _leaves_time_to_train(self) -> Self:
        if self.time_limit is not None and duration_s(self.time_limit) < self.grace_s + _LEAST_WORK_S:
            raise ValueError(f"time_limit {self.time_limit} leaves less than {_LEAST_WORK_S} s before grace_s, {self.grace_s} s before its end")
        return self

    @field_validator("options")
    @classmethod
    def _are_free(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option.removeprefix("--").partition("=")[0]
            if taken := [ours for ours in _OURS if ours.startswith(name)]:  # sbatch takes every beginning of a name for it
                raise ValueError(f"options: --{name} may not be among them, the job's script sets --{taken[0]}")
        return value


class KubeRayCluster(ElasticCluster):
    """The whole of a cluster YAML of kind `kuberay`."""

    kind: Literal["kuberay"]
    """`kuberay`: Kubernetes with the KubeRay operator. `submit` asks for a Ray cluster of the run's own, which goes with the run."""
    environment: Annotated[Environment, only("image", "pip", because="pods start from an image")]
    """`{image: REF}`; or `{pip: FILE}`: Ray's own image, and each pod installs the rest when it starts."""
    context: str | None = Field(default=None, pattern=r"^[\w./:@-]+$")
    """Of kubectl: which Kubernetes. Null: the one that is current when the run is submitted."""
    namespace: Label = "default"
    """Where everything is made."""
    num_nodes: int = Field(default=1, ge=1)
    """Pods that train. The first start waits for all of them without limit, whatever `min_workers` and `wait_s` say: so does KubeRay."""
    cpus: int = Field(default=8, ge=1)
    """CPUs of each, asked for and never more."""
    memory: Quantity = "32Gi"
    """Main memory of each, shared memory included."""
    gpus: int = Field(default=0, ge=0)
    """NVIDIA GPUs of each."""
    shared_memory: Quantity = "4Gi"
    """Of each: /dev/shm, for loader workers, NCCL, Ray's object store, and gradients of ranks on CPUs."""
    head: HeadPod = HeadPod()
    """The pod that drives."""
    claim: Claim | None = None
    """A volume for the run's storage. Null: storage is an object store."""
    service_account: Label | None = None
    """Of all pods, which is how clouds grant access to object stores. Its token is not mounted."""
    pull_secret: Label | None = None
    """A Secret with which the image is pulled."""
    user_id: int = Field(default=1000, ge=1)
    """The user that everything runs as, and group of the claim's files. Never root."""
    node_selector: dict[str, str] = Field(default_factory=dict[str, str])
    """Labels that a node must have to get a pod that trains."""
    tolerations: tuple[dict[str, str], ...] = ()
    """Taints of nodes that pods that train may be put on all the same, as Kubernetes writes them."""

    def inside(self) -> RayCluster:
        """For the driver, the keys of Secrets are variables of its pod."""
        return self._as_ray(env_from=[key for source in self.env_from if isinstance(source, KubernetesSecret) for key in source.keys])


class RayUpCluster(ElasticCluster):
    """The whole of a cluster YAML of kind `ray_up`."""

    kind: Literal["ray_up"]
    """`ray_up`: machines that Ray's cluster launcher starts (`ray up`), by a file that `submit --dry-run` prints. Then as kind `ray`."""
    name: Label = "maskwright"
    """Of the cluster, and part of the machines' names."""
    provider: Annotated[AwsProvider | GcpProvider | LocalProvider, Field(discriminator="type")]
    """Whose machines."""
    environment: Annotated[Environment, only("image", "pip", because="a new machine has no virtual environment")]
    """`{image: REF}`, run by Docker on each machine; or `{pip: FILE}`: each machine installs everything when it starts."""
    ssh_user: str = Field(default="ubuntu", pattern=r"^[a-z_][a-z0-9_-]*$")
    """Who logs in. With an image, a user whose number is 1000, as that of the image's: the token that Ray copies is only its owner's to read."""
    ssh_private_key: str | None = None
    """File of the key to log in with, which the head gets for the others. Null: clouds get a new one; a lone machine on premise what SSH uses."""
    head: Machines | None = None
    """The machine with Ray's head, on which no rank runs. On premise: not given."""
    workers: Machines | None = None
    """The machines that train. On premise: not given."""
    num_nodes: int = Field(default=1, ge=0)
    """Machines that train, of a cloud. On premise those that are named."""
    shared_memory: Quantity = "4Gi"
    """/dev/shm of a container."""
    setup_commands: tuple[str, ...] = ()
    """Shell commands for each new machine, before anything else: such as those that mount shared storage."""
    shared_folder: str | None = Field(default=None, pattern=r"^/[\w./+-]+$")
    """A folder that `setup_commands` mount, for the run's storage: containers see it at the same path. Null: storage is an object store."""
    dashboard: str = Field(default="http://127.0.0.1:8265", pattern=DASHBOARD)
    """Where jobs are submitted: `ray dashboard FILE` leads there."""

    @model_validator(mode="after")
    def _has_machines(self) -> Self:
        is_local = isinstance(self.provider, LocalProvider)
        for name in ("head", "workers"):
            if (getattr(self, name) is None) is not is_local:
                raise ValueError(f"{name}: {'not given on premise: provider names the machines' if is_local else 'required, not given'}")
        if isinstance(self.provider, LocalProvider) and self.provider.worker_ips and self.ssh_private_key is None:
            raise ValueError("ssh_private_key: required on premise, not given: with it the head logs in to the workers")
        if isinstance(self.provider, GcpProvider) and self.workers is not None and self.workers.cpus is None:
            raise ValueError("workers.cpus: required at Google, not given")
        return self


Cluster = LocalCluster | RayCluster | SlurmCluster | KubeRayCluster | RayUpCluster
CLUSTER_KINDS: dict[str, type[Cluster]] = {
    "local": LocalCluster,
    "ray": RayCluster,
    "slurm": SlurmCluster,
    "kuberay": KubeRayCluster,
    "ray_up": RayUpCluster,
}
