"""What Kubernetes and Ray's cluster launcher are asked for: golden artefacts, checked against the schemas of those who read them."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.autoscaler._private.util import prepare_config, validate_config

from data_pipeline.errors import ConfigError
from data_pipeline.storage import Location
from launcher.cluster_config import KubeRayCluster, RayUpCluster
from launcher.clusters.kuberay import Software, rayjob, rayjob_name
from launcher.clusters.ray_up import ray_up_file, ray_up_request
from launcher.config import load_cluster_config, validate_cluster
from launcher.submission import Submission
from trainer.runlog import RunFolder

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
SCHEMA = GOLDEN / "rayjob-v1.openapi.json.gz"
"""The OpenAPI schema of RayJob v1 out of ray-project/kuberay, of a release that has `authOptions` (1.5.1 or later). Copyright of the KubeRay authors,
Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0); not changed, but compressed."""
RUN = RunFolder(Location("/shared/runs/tiny"))
CLAIMED: dict[str, Any] = {
    "kind": "kuberay",
    "environment": {"image": "registry.example/maskwright:0.1.0"},
    "namespace": "research",
    "num_nodes": 2,
    "cpus": 16,
    "memory": "64Gi",
    "gpus": 4,
    "claim": {"name": "maskwright", "path": "/shared"},
    "env_from": [{"secret": "trackers", "keys": ["WANDB_API_KEY"]}],
    "service_account": "trainer",
    "pull_secret": "registry",
    "node_selector": {"gpu": "l4"},
    "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
}
BARE: dict[str, Any] = {"kind": "kuberay", "environment": {"pip": "constraints.txt"}}


def a_submission(run: str = "tiny", number: int = 1) -> Submission:
    return Submission(number, f"{run}-12e7b4af0000-{number:04d}", "http://head:8265", ["run"], "/home/me", 0, "laptop", 1.5)


def manifest(cluster: dict[str, Any], run: RunFolder = RUN) -> dict[str, Any]:
    found = validate_cluster(cluster, "test")
    assert isinstance(found, KubeRayCluster)
    package = f"file://{run.root}/submissions/0001/maskwright-0.zip" if run.root.is_local else f"{run.root}/submissions/0001/maskwright-0.zip"
    return rayjob(run, a_submission(), found, Software(package, "2.60.0", "3.11", ["torch==2.13.0"]))


def launcher_file(path: str, **changes: Any) -> dict[str, Any]:
    cluster = load_cluster_config(path)
    assert isinstance(cluster, RayUpCluster)
    changed = validate_cluster({**cluster.model_dump(mode="json"), **changes}, "test")
    assert isinstance(changed, RayUpCluster)
    return ray_up_file(changed, ["ray[default,train]==2.60.0", "torch==2.13.0"])


GCP = {
    "provider": {"type": "gcp", "region": "europe-west4", "availability_zone": "europe-west4-a", "project_id": "p"},
    "workers": {"config": {"machineType": "g2-standard-48"}, "cpus": 48, "gpus": 4},
    "head": {"config": {"machineType": "n2-standard-4"}},
    "environment": {"pip": "/home/me/constraints.txt"},
}
ON_PREMISE = {
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]},
    "head": None,
    "workers": None,
    "ssh_private_key": "~/.ssh/id",
}
FILES = {"aws": {}, "gcp": GCP, "local": ON_PREMISE}


@pytest.mark.parametrize("name", ["rayjob.yaml", "ray-up.yaml"])
def test_what_is_asked_for_is_the_golden_artefact(name: str) -> None:
    """Whoever changes it changes what clusters are asked for: `yaml.safe_dump_all(rendered(name), sort_keys=False, width=160)`."""
    assert list(yaml.safe_load_all((GOLDEN / name).read_text())) == rendered(name)


def rendered(name: str) -> list[dict[str, Any]]:
    if name == "rayjob.yaml":
        return [manifest(CLAIMED), manifest(BARE, RunFolder(Location("s3://bucket/runs/tiny")))]
    return [launcher_file("ray-up", **changes) for changes in FILES.values()]


@pytest.mark.parametrize("cluster", [CLAIMED, BARE], ids=["claim", "store"])
def test_the_manifest_is_one_that_kuberay_takes(cluster: dict[str, Any]) -> None:
    schema = closed(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    jsonschema.validate(manifest(cluster, RunFolder(Location("/shared/tiny" if "claim" in cluster else "s3://b/tiny"))), schema)


def closed(schema: Any) -> Any:
    """The schema without Kubernetes' own words, which admits no key that it does not name: the API server drops those without a word."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    own = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    is_object = isinstance(own.get("properties"), dict) and own.get("type") == "object"
    return {**own, "additionalProperties": False} if is_object else own


def pods(found: dict[str, Any]) -> list[dict[str, Any]]:
    spec = found["spec"]["rayClusterSpec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"]), found["spec"]["submitterPodTemplate"]]
    return [template["spec"] for template in templates]


@pytest.mark.parametrize("cluster", [CLAIMED, BARE], ids=["claim", "store"])
def test_no_pod_is_root_asks_for_less_than_it_takes_or_has_a_token_of_kubernetes(cluster: dict[str, Any]) -> None:
    found = manifest(cluster, RunFolder(Location("/shared/tiny" if "claim" in cluster else "s3://b/tiny")))
    assert found["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(found):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            said = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
            assert said == {"HOME": "/tmp", "USER": "maskwright"}, "values that are secret come from Secrets"


@given(st.text("Aa0._-", min_size=1, max_size=80).filter(lambda text: text[0].isalnum()), st.integers(1, 9999))
def test_names_are_those_that_kubernetes_takes(run: str, number: int) -> None:
    name = rayjob_name(a_submission(run, number).job)
    assert len(name) <= 47
    assert name[0].isalpha()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name.endswith(f"-12e7b4af0000-{number:04d}")


@pytest.mark.parametrize(
    ("cluster", "storage", "said"),
    [
        (CLAIMED, "/elsewhere/tiny", "below /shared"),
        (CLAIMED, "/shared/my runs/tiny", "characters that a shell would change"),
        (CLAIMED, "/shared/$(id)/tiny", "characters that a shell would change"),
        (BARE, "/shared/tiny", "an object store"),
    ],
)
def test_storage_that_pods_do_not_see_is_refused(cluster: dict[str, Any], storage: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        manifest(cluster, RunFolder(Location(storage)))


@pytest.mark.parametrize("changes", FILES.values(), ids=FILES.keys())
def test_the_file_is_one_that_ray_up_takes(changes: dict[str, Any]) -> None:
    validate_config(prepare_config(launcher_file("ray-up", **changes)))


@pytest.mark.parametrize("changes", FILES.values(), ids=FILES.keys())
def test_ray_listens_to_nobody_without_the_token(changes: dict[str, Any]) -> None:
    found = launcher_file("ray-up", **changes)
    starts = [command for part in ("head", "worker") for command in found[f"{part}_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert found["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize(
    ("changes", "storage", "said"),
    [
        ({}, "/shared/runs/tiny", "an object store"),
        ({"shared_folder": "/shared"}, "/sharedelse/runs/tiny", "below /shared"),
        ({"shared_folder": "/shared"}, "/shared/runs/tiny", None),
        ({}, "s3://bucket/runs/tiny", None),
    ],
)
def test_storage_that_containers_do_not_see_is_refused(changes: dict[str, Any], storage: str, said: str | None) -> None:
    found = validate_cluster({**load_cluster_config("ray-up").model_dump(mode="json"), **changes}, "test")
    assert isinstance(found, RayUpCluster)
    asked = partial(ray_up_request, RunFolder(Location(storage)), a_submission(), found, "maskwright-0.zip")
    if said is None:
        assert asked().launcher_file["docker"]["image"]
        return
    with pytest.raises(ConfigError, match=said):
        asked()
