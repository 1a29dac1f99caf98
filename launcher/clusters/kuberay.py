"""What Kubernetes is asked for with a run: the RayJob manifest of the KubeRay operator (pure)."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from data_pipeline.errors import ConfigError
from launcher.cluster_config import KubeRayCluster
from launcher.cluster_environment import KubernetesSecret
from launcher.cluster_machines import HeadPod
from launcher.job_request import runtime_env_of
from launcher.submission import Submission
from trainer.redaction import redacted
from trainer.runlog import RunFolder

_OBJECT_STORE_BYTES = 512 * 2**20
"""Of Ray's object store, which only `prepare` uses: the rest of the shared memory is for loader workers and NCCL."""
_LONGEST_NAME = 47
"""KubeRay adds to the name of a RayJob, and Kubernetes ends at 63."""
_OWN = len("0123456789ab-0001")
"""The end of a job's name, which no other has."""
_SUBMITTERS = 10
"""How often the submitter may be lost, or the stream that it prints, before the operator believes that the job has failed."""
_PLAIN = re.compile(r"[\w./:@=+-]+")
"""What a shell leaves alone: the operator pastes entry point and runtime environment into one."""


SUBMITTER = "ray-job-submitter"
"""The container that prints what the driver prints."""


def rayjob_name(job: str) -> str:
    """Name of a job's RayJob: lower case, a letter first, and what tells it from others whole."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.lower()).strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}"
    if len(slug) <= _LONGEST_NAME:
        return slug
    own = slug[-_OWN:]
    return f"{slug[: _LONGEST_NAME - len(own) - 1].rstrip('-')}-{own}"


@dataclass(frozen=True)
class Software:
    """What runs in the pods."""

    package: str
    """URL of our own packages."""
    ray: str
    """Its release."""
    python: str
    """Its release, as `3.11`."""
    requirements: Sequence[str]
    """What each pod installs where the environment is `pip`."""


def rayjob(run: RunFolder, submission: Submission, cluster: KubeRayCluster, software: Software) -> dict[str, Any]:
    """The manifest that runs a submission on a Ray cluster of its own.

    Pods ask for what they may use and no more, run as one user that is not root, and have no token of Kubernetes. Ray's ports answer only to
    the token that the operator makes for this cluster. Nobody starts a failed job again: the driver retries by itself, and a run that was
    stopped is to stay so. The submitter, which lives in the stream of the driver's log, is started again when that breaks: it finds the job that
    it has submitted, or where the head was lost with it submits the same once more, which continues the run. The operator submits when all
    of `num_nodes` are ready, and waits for that without limit.

    Raises:
        ConfigError: storage that pods do not see, or whose address a shell would change.
    """
    _require_reachable(run, cluster)
    image = cluster.environment.image or f"rayproject/ray:{software.ray}-py{software.python.replace('.', '')}"
    container = _container(cluster, image)
    runtime_env = runtime_env_of(software.package, software.requirements if cluster.environment.choice == "pip" else ())
    head = {"num-cpus": "0", "object-store-memory": str(_OBJECT_STORE_BYTES)}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": rayjob_name(submission.job),
            "namespace": cluster.namespace,
            "labels": {"app.kubernetes.io/name": "maskwright"},
            "annotations": {"maskwright/run": run.root.url, "maskwright/job": submission.job},
        },
        "spec": {
            "entrypoint": shlex.join([cluster.environment.python, "-m", "launcher.submitted", run.root.url, str(submission.number)]),
            "runtimeEnvYAML": yaml.safe_dump(runtime_env, sort_keys=False),
            "submissionMode": "K8sJobMode",
            "backoffLimit": 0,
            "submitterConfig": {"backoffLimit": _SUBMITTERS},
            "shutdownAfterJobFinishes": True,
            "submitterPodTemplate": {"spec": {"restartPolicy": "Never", **_pod(cluster, [_submitter(image)])}},
            "rayClusterSpec": {
                "rayVersion": software.ray,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {"rayStartParams": head, "template": {"spec": _ray_pod(cluster, container, cluster.head)}},
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": cluster.num_nodes,
                        "minReplicas": cluster.num_nodes,
                        "maxReplicas": cluster.num_nodes,
                        "rayStartParams": {"object-store-memory": str(_OBJECT_STORE_BYTES)},
                        "template": {"spec": _ray_pod(cluster, container, None)},
                    }
                ],
            },
        },
    }


def _require_reachable(run: RunFolder, cluster: KubeRayCluster) -> None:
    if not _PLAIN.fullmatch(run.root.url):
        cause = f"storage {redacted(run.root.url)} has characters that a shell would change"
        raise ConfigError(cause, "Choose one of letters, digits and ._/:@=+- only.")
    if run.root.is_local and (cluster.claim is None or not run.root.path.is_relative_to(cluster.claim.path)):
        seen = f"below {cluster.claim.path}, where the claim is mounted" if cluster.claim else "an object store, as the cluster file has no claim"
        raise ConfigError(f"pods do not see storage {run.root.parent.url}: expected {seen}", "Set storage, or claim in the cluster file.")


def _container(cluster: KubeRayCluster, image: str) -> dict[str, Any]:
    """What containers of head and workers have in common."""
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if cluster.claim is not None:
        mounts.append({"name": "storage", "mountPath": cluster.claim.path})
    variables = [(key, source.secret) for source in cluster.env_from if isinstance(source, KubernetesSecret) for key in source.keys]
    return {
        "image": image,
        "env": [*_HOME["env"], *({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for key, secret in variables)],
        "workingDir": _HOME["workingDir"],
        "volumeMounts": mounts,
        "securityContext": _LOCKED,
    }


_HOME: dict[str, Any] = {"env": [{"name": "HOME", "value": "/tmp"}, {"name": "USER", "value": "maskwright"}], "workingDir": "/tmp"}
"""Whatever `user_id` is, the image may know no such user and let nobody else into its home."""
_LOCKED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _ray_pod(cluster: KubeRayCluster, container: dict[str, Any], head: HeadPod | None) -> dict[str, Any]:
    """The pod of the head, or else one that trains."""
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}}]
    if cluster.claim is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": cluster.claim.name}})
    if head is not None:
        ports = [{"name": "gcs-server", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
        own = {"name": "ray-head", **container, "ports": ports, "resources": _resources(head.cpus, head.memory)}
        return {**_pod(cluster, [own]), "volumes": volumes}
    own = {"name": "ray-worker", **container, "resources": _resources(cluster.cpus, cluster.memory, cluster.gpus)}
    place = {"nodeSelector": cluster.node_selector, "tolerations": list(cluster.tolerations)}
    return {**_pod(cluster, [own]), "volumes": volumes, **{key: value for key, value in place.items() if value}}


def _submitter(image: str) -> dict[str, Any]:
    """Runs `ray job submit` and prints what the driver prints."""
    return {"name": SUBMITTER, "image": image, **_HOME, "resources": _resources(1, "1Gi"), "securityContext": _LOCKED}


def _pod(cluster: KubeRayCluster, containers: list[dict[str, Any]]) -> dict[str, Any]:
    user: dict[str, Any] = {"runAsUser": cluster.user_id, "runAsGroup": cluster.user_id, "fsGroup": cluster.user_id}
    user["fsGroupChangePolicy"] = "OnRootMismatch"  # or every file of the claim would be changed whenever a pod starts
    security = {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}}
    pod: dict[str, Any] = {"automountServiceAccountToken": False, "securityContext": security, "containers": containers}
    if cluster.service_account is not None:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": cluster.pull_secret}]
    return pod


def _resources(cpus: int, memory: str, gpus: int = 0) -> dict[str, Any]:
    """Asked for and never exceeded: a pod that asks for less is the first to be killed."""
    wanted: dict[str, str] = {"cpu": str(cpus), "memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {"requests": wanted, "limits": wanted}
