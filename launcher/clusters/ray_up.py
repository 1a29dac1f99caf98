"""The file with which Ray's cluster launcher starts machines (`ray up FILE`) for a cluster of kind `ray_up` (pure)."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from data_pipeline.errors import ConfigError
from launcher.cluster_config import RayUpCluster
from launcher.cluster_machines import LocalProvider, Machines
from launcher.job_request import JobRequest, job_request
from launcher.requirements import requirements
from launcher.submission import Submission
from trainer.runlog import RunFolder

_TOKEN = "~/.ray/auth_token"
_VENV = "$HOME/maskwright-venv"
_OF_PROVIDER = {"aws": ["boto3"], "gcp": ["google-api-python-client"]}
"""What Ray needs on the head to start machines."""
_RAY = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --object-manager-port=8076"


@dataclass(frozen=True)
class RayUpRequest(JobRequest):
    """A job for a cluster that `ray up` has started, or is to start."""

    launcher_file: dict[str, Any]

    @property
    def artefact(self) -> str:
        """The file for `ray up`."""
        return yaml.safe_dump(self.launcher_file, sort_keys=False, width=160)


def ray_up_request(run: RunFolder, submission: Submission, cluster: RayUpCluster, package: str) -> RayUpRequest:
    """The request for a submission, and the file that starts its cluster.

    Raises:
        ConfigError: as of `job_request`, there is no such constraints file, or containers do not see the storage.
    """
    _require_seen(run, cluster)
    job = job_request(run, submission, cluster.inside(), package)
    pip = cluster.environment.pip
    return RayUpRequest(**job.to_json(), launcher_file=ray_up_file(cluster, requirements(pip) if pip is not None else ()))


def _require_seen(run: RunFolder, cluster: RayUpCluster) -> None:
    """A container has of its machine's folders only the shared one."""
    folder = cluster.shared_folder
    if cluster.environment.image is None or not run.root.is_local or (folder is not None and run.root.path.is_relative_to(folder)):
        return
    seen = f"below {folder}, the shared_folder" if folder is not None else "an object store, as the cluster file has no shared_folder"
    raise ConfigError(f"containers do not see storage {run.root.parent.url}: expected {seen}", "Set storage, or shared_folder in the cluster file.")


def ray_up_file(cluster: RayUpCluster, packages: Sequence[str]) -> dict[str, Any]:
    """What `ray up` is told; `packages` are installed where the environment is `pip`.

    The token of who starts the cluster is copied to all its machines, and Ray's ports answer to nobody without it. The dashboard listens on the
    head's loopback: `ray dashboard FILE` leads there through SSH. The head lends no CPU to ranks, except on premise.
    """
    is_pip = cluster.environment.choice == "pip"
    on_head = "--autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1"
    return {
        "cluster_name": cluster.name,
        **_machines(cluster),
        "auth": {"ssh_user": cluster.ssh_user, **({"ssh_private_key": cluster.ssh_private_key} if cluster.ssh_private_key else {})},
        "docker": {} if is_pip else _container(cluster),
        "file_mounts": {_TOKEN: _TOKEN},
        "initialization_commands": list(cluster.setup_commands),
        "setup_commands": _installation([*packages, *_OF_PROVIDER.get(cluster.provider.type, [])]) if is_pip else [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", f"{_RAY} --head --port=6379 {on_head}"],
        "worker_start_ray_commands": ["ray stop", f"{_RAY} --address=$RAY_HEAD_IP:6379"],
    }


def _machines(cluster: RayUpCluster) -> dict[str, Any]:
    provider = {key: value for key, value in cluster.provider.model_dump(mode="json").items() if value is not None}
    if isinstance(cluster.provider, LocalProvider):
        return {"provider": provider}
    assert cluster.head is not None
    assert cluster.workers is not None
    num = cluster.num_nodes
    head = {"node_config": cluster.head.config, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0}
    workers = {"node_config": cluster.workers.config, "resources": _resources(cluster.workers), "min_workers": num, "max_workers": num}
    return {
        "provider": {**provider, "cache_stopped_nodes": False},  # a machine that is stopped still costs its disk
        "max_workers": num,
        "head_node_type": "head",
        "available_node_types": {"head": head, "workers": workers},
    }


def _resources(machines: Machines) -> dict[str, int]:
    if machines.cpus is None:
        return {}
    return {"CPU": machines.cpus, **({"GPU": machines.gpus} if machines.gpus else {})}


def _container(cluster: RayUpCluster) -> dict[str, Any]:
    shared_memory = cluster.shared_memory.removesuffix("i").lower()
    options = [f"--shm-size={shared_memory}", "--ulimit nofile=65536:65536"]
    if cluster.shared_folder is not None:
        options.append(f"-v {cluster.shared_folder}:{cluster.shared_folder}")
    return {"image": cluster.environment.image, "container_name": "maskwright", "pull_before_run": True, "run_options": options}


def _installation(packages: Sequence[str]) -> list[str]:
    """Into a virtual environment, which is then the first in the PATH of whatever Ray starts there."""
    on_path = f'export PATH="{_VENV}/bin:$PATH"'
    return [
        f'test -x "{_VENV}/bin/pip" || python3 -m venv "{_VENV}"',
        f'"{_VENV}/bin/pip" install --quiet {shlex.join(packages)}',
        f"grep -qF {shlex.quote(on_path)} ~/.bashrc || echo {shlex.quote(on_path)} >> ~/.bashrc",
    ]
