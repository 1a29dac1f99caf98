"""A RayJob on a real Ray cluster: `maskwright submit` gives it to kubectl, and the test does what KubeRay's operator does with it."""

import json
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import maskwright
from tests.support.kubernetes_api import KubernetesApi
from tests.support.ray_nodes import RayCluster
from tests.support.required import missing
from tests.support.tiny_run import STEPS, write_run

SECRET = secrets.token_hex(16)

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def as_the_operator_submits(job: dict[str, Any], dashboard: str) -> str:
    """The shell command of KubeRay's submitter container (`BuildJobSubmitCommand` in its sources, K8sJobMode)."""
    runtime_env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    options = ["--address", dashboard, "--runtime-env-json", json.dumps(json.dumps(runtime_env)), "--submission-id", job["metadata"]["name"]]
    return " ".join(["ray job submit", *options, "--", job["spec"]["entrypoint"]])


def test_what_kubernetes_is_asked_for_runs_on_ray(tmp_path: Path) -> None:
    """Packages out of storage, the driver inside, Secrets as variables of the pods, and no value of one in anything that is left."""
    if shutil.which("kubectl") is None:
        missing("kubectl", "there is none in the PATH")
    write_run(tmp_path)
    cluster_file = {
        "kind": "kuberay",
        "environment": {"image": "registry.example/maskwright:0.1.0"},
        "namespace": "research",
        "claim": {"name": "runs", "path": str(tmp_path)},
        "env_from": [{"secret": "trackers", "keys": ["PLANTED_API_KEY"]}],
        "num_workers": 2,
    }
    (tmp_path / "kube.yaml").write_text(yaml.safe_dump(cluster_file))
    pod = {"PLANTED_API_KEY": SECRET, "PATH": f"{sys.prefix}/bin:/usr/bin:/bin"}
    with KubernetesApi() as api, RayCluster(tmp_path / "nodes", pod, takes_jobs=True) as cluster:
        for _ in range(2):
            cluster.add_node()
        api.write_kubeconfig(tmp_path / "kubeconfig")
        code, output = maskwright("submit", "run.yaml", "--cluster", "kube.yaml", folder=tmp_path, KUBECONFIG=str(tmp_path / "kubeconfig"))
        assert code == 0, output
        (job,) = api.jobs.values()
        command = as_the_operator_submits(job, cluster.dashboard)
        done = subprocess.run(
            ["bash", "-ce", "--", command], env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"step {STEPS}/{STEPS}" in done.stdout
        told = done.stdout + done.stderr + command + output
        code, output = maskwright("status", str(tmp_path / "storage/tiny"), "--exit-code", folder=tmp_path)
        assert code == 0, output
        places = (tmp_path / "storage", cluster.folder, Path(cluster.temporary))
        written = b"".join(path.read_bytes() for place in places for path in place.rglob("*") if path.is_file() and path.name != "token")
        assert SECRET not in told
        assert SECRET.encode() not in written
        assert shlex.split(job["spec"]["entrypoint"])[1:3] == ["-m", "launcher.submitted"]
