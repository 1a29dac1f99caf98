"""Gives runs to the cluster that a cluster YAML describes: the dictionary of the kinds that take jobs (the cluster is asked by what it returns)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ConfigError, UnreachableError, UsageError
from launcher.cluster_config import Cluster, ElasticCluster, RayCluster
from launcher.clusters.kubectl import KubeRayJobs, address_of, rayjob_request, with_context
from launcher.clusters.ray_jobs import RayJobs
from launcher.clusters.ray_up import ray_up_request
from launcher.clusters.slurm import job_script
from launcher.clusters.slurm_jobs import SlurmJobs
from launcher.job_request import job_request
from launcher.submission import Submission, submission_folder
from launcher.taken_jobs import Jobs, Request
from trainer.runlog import RunFolder


@dataclass(frozen=True)
class Taker:
    """How runs are given to the clusters of one kind, each in its own words: what `request` makes, `connect` takes."""

    request: Callable[[RunFolder, Submission, Any, str], Request]
    """The request for a submission whose packages lie in a file of that name (pure)."""
    connect: Callable[[RunFolder, Submission, float], Jobs[Any]]
    """The jobs of the cluster that a submission is for, which may take so many seconds for each answer. Raises UnreachableError."""
    dashboard: Callable[[Any], str] = lambda _: ""
    """The address that jobs are sent to; empty where the machine that submits knows its cluster. Raises ConfigError where the file should say it."""
    named: Callable[[Any, float], Any] = lambda cluster, _: cluster
    """The cluster, with what its file leaves to the machine that submits; within so many seconds. Raises UnreachableError."""
    begins_anew: bool = False
    """Whether the cluster may begin a job again by itself, as when a machine was lost."""


def taker_of(kind: str) -> Taker:
    """How runs are given to clusters of a kind.

    Raises:
        UsageError: they take none.
    """
    if kind not in TAKERS:
        raise UsageError(f"nothing is submitted to a cluster of kind {kind}", "Run it here with `maskwright run`, or give another --cluster.")
    return TAKERS[kind]


def require_taking(cluster: Cluster) -> ElasticCluster:
    """The cluster, if runs are submitted to its kind.

    Raises:
        UsageError: they are not.
    """
    taker_of(cluster.kind)
    assert isinstance(cluster, ElasticCluster)
    return cluster


def _dashboard(cluster: RayCluster) -> str:
    if cluster.dashboard is None:
        raise ConfigError("the cluster file has no dashboard: that is where jobs are submitted", "Set dashboard: http://HEAD:8265 in it.")
    return cluster.dashboard.rstrip("/")


def _slurm_jobs(run: RunFolder, submission: Submission, answer_s: float) -> SlurmJobs:
    return SlurmJobs.connect(submission_folder(run, submission.number).path, submission.time, answer_s)


def _kuberay_jobs(_: RunFolder, submission: Submission, answer_s: float) -> KubeRayJobs:
    return KubeRayJobs.connect(submission.dashboard, answer_s)


def _connect_up(_: RunFolder, submission: Submission, answer_s: float) -> RayJobs:
    try:
        return RayJobs.connect(submission.dashboard, answer_s)
    except UnreachableError as error:
        remedy = "Start it: `maskwright submit CONFIG --cluster FILE --dry-run > up.yaml`, `ray up up.yaml`; `ray dashboard up.yaml` leads there."
        raise UnreachableError(error.cause, remedy) from error


TAKERS: Mapping[str, Taker] = {
    "ray": Taker(job_request, lambda _, submission, answer_s: RayJobs.connect(submission.dashboard, answer_s), _dashboard),
    "slurm": Taker(job_script, _slurm_jobs, begins_anew=True),
    "kuberay": Taker(rayjob_request, _kuberay_jobs, address_of, with_context, begins_anew=True),
    "ray_up": Taker(ray_up_request, _connect_up, lambda cluster: cluster.dashboard.rstrip("/")),
}
