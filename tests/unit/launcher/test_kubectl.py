"""Runs on Kubernetes: what is sent, what its answers mean, and what is said where it cannot be asked. The API server is one of our own."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import ConfigError, ExitCode
from data_pipeline.storage import Location
from launcher import cli, submitting
from launcher.cluster_config import KubeRayCluster
from launcher.clusters.kubectl import KubeRayJobs, rayjob_request, state_of, with_context
from launcher.clusters.kuberay import rayjob_name
from launcher.config import validate_cluster
from launcher.lease import Lease
from launcher.submission import newest_submission
from launcher.taken_jobs import JobState
from tests.support.answers import require_documented
from tests.support.kubernetes_api import KubernetesApi
from tests.support.required import missing
from tests.support.tiny_run import tiny_config
from tests.unit.launcher.test_manifests import a_submission
from trainer.runlog import RunFolder

CLUSTER: dict[str, Any] = {
    "kind": "kuberay",
    "environment": {"image": "registry.example/maskwright:0.1.0"},
    "namespace": "research",
    "env_from": [{"secret": "trackers", "keys": ["WANDB_API_KEY"]}],
}


FAILED = "Job entrypoint command failed with exit code 7"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that is not there yet, in a volume that is claimed."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("RAY_", "MASKWRIGHT_", "KUBE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-5e3f")
    Path("run.yaml").write_text(yaml.safe_dump(tiny_config()))
    Path("kube.yaml").write_text(yaml.safe_dump({**CLUSTER, "claim": {"name": "runs", "path": str(tmp_path)}}))
    return tmp_path


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    if shutil.which("kubectl") is None:
        missing("kubectl", "there is none in the PATH")
    with KubernetesApi() as found:
        found.write_kubeconfig(Path("kubeconfig"))
        monkeypatch.setenv("KUBECONFIG", str(Path("kubeconfig").resolve()))
        yield found


def invoke(*arguments: str) -> int:
    return cli.run(list(arguments), debug=False)


def submit(*arguments: str) -> int:
    return invoke("submit", "run.yaml", "--cluster", "kube.yaml", *arguments)


def tiny() -> RunFolder:
    return RunFolder(Location.at("storage/tiny"))


def two_lines(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2, lines
    return lines[0]


def test_a_dry_run_prints_the_manifest_and_asks_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit("--dry-run") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["kind"] == "RayJob"
    assert "planted-secret" not in printed
    assert submit("--dry-run", "--json") == 0
    (planned,) = require_documented("submit", capsys.readouterr().out)
    assert planned["manifest"]["kind"] == "RayJob"
    assert not Path("storage").exists()


def test_a_run_is_created_seen_followed_and_ended(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(submitting, "_HANDOVER_S", 0.0)
    assert submit() == 0
    submission = newest_submission(tiny())
    assert submission is not None
    assert (submission.kind, submission.dashboard) == ("kuberay", "research@here")
    assert yaml.safe_load((tiny().root / "submissions" / "0001" / "cluster.yaml").read_bytes())["context"] == "here"
    name = rayjob_name(submission.job)
    assert list(api.jobs) == [name]
    assert "fieldValidation=Strict" in api.asked["POST"]
    environment = yaml.safe_load(api.jobs[name]["spec"]["runtimeEnvYAML"])
    package = Path(environment["working_dir"].removeprefix("file://"))
    assert package.parent == (tiny().root / "submissions" / "0001").path
    assert package.stat().st_size > 100_000
    inside = yaml.safe_load((package.parent / "inside.yaml").read_text())
    assert (inside["kind"], inside["address"], inside["env_from"]) == ("ray", "auto", ["WANDB_API_KEY"])
    assert submission.arguments[-1] == str(package.parent / "inside.yaml")
    written = [path for path in Path("storage").rglob("*") if path.is_file() and b"planted-secret" in path.read_bytes()]
    assert not written
    assert "planted-secret" not in json.dumps(api.jobs)
    assert submit() == ExitCode.CONFLICT
    capsys.readouterr()
    assert invoke("logs", "tiny", "--storage", "storage") == 0
    assert capsys.readouterr().out == ""
    api.log = "preparing\n"
    assert invoke("logs", "tiny", "--storage", "storage") == 0
    assert capsys.readouterr().out == "preparing\n"
    message = "Job entrypoint command failed with exit code 7, last available logs:\nerror: no storage\nShare it."
    api.jobs[name]["status"] = {"jobDeploymentStatus": "Failed", "message": message}
    assert invoke("status", "tiny", "--storage", "storage", "--exit-code") == ExitCode.STORAGE
    api.jobs[name]["status"] = {}
    assert invoke("stop", "tiny", "--storage", "storage") == 0
    assert not api.jobs
    assert invoke("status", "tiny", "--storage", "storage", "--exit-code") == ExitCode.INTERRUPTED


def test_a_run_that_is_driven_is_told_by_its_folder_alone(api: KubernetesApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    submission = newest_submission(tiny())
    assert submission is not None
    with Lease.acquire(tiny()):
        tiny().append_event("command_started", attempt=0, verb="run", submission=submission.job)
        api.__exit__()
        capsys.readouterr()
        assert invoke("status", "tiny", "--storage", "storage", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["state"], found["submission"]) == ("running", submission.job)
    api.__enter__()


def test_kubernetes_without_the_operator(api: KubernetesApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.knows_rayjobs = False
    assert submit() == ExitCode.UNREACHABLE
    assert "knows no RayJobs" in two_lines(capsys)
    assert not Path("storage").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"PATH": "/nowhere"}, "there is no kubectl on this machine"), ({"KUBECONFIG": "/nowhere/config"}, "Kubernetes does not do what kubectl asks")],
)
def test_kubernetes_that_cannot_be_asked(
    settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "KUBECONFIG" in settings and shutil.which("kubectl") is None:
        missing("kubectl", "there is none in the PATH")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert submit() == ExitCode.UNREACHABLE
    assert said in two_lines(capsys)
    assert not Path("storage").exists()


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, JobState("waiting")),
        ({"jobDeploymentStatus": "Initializing"}, JobState("waiting")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, JobState("waiting")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, JobState("running")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, JobState("ended", exit_code=0)),
        ({"jobDeploymentStatus": "Running", "jobStatus": "STOPPED"}, JobState("ended", was_stopped=True)),
        ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED", "message": FAILED}, JobState("ended", exit_code=7, message=FAILED)),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, JobState("ended", exit_code=0)),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, JobState("ended", was_stopped=True)),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, JobState("ended", message="no")),
        ({"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed"}, JobState("ended", message="SubmissionFailed")),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "late"}, JobState("ended", was_lost=True, message="late")),
    ],
)
def test_what_the_status_of_a_rayjob_means(status: dict[str, str], state: JobState) -> None:
    assert state_of(status) == state


def test_packages_lie_where_ray_fetches_them() -> None:
    cluster = validate_cluster(CLUSTER, "test")
    assert isinstance(cluster, KubeRayCluster)
    request = rayjob_request(RunFolder(Location("s3://bucket/runs/tiny")), a_submission(), cluster, "maskwright-0.zip")
    assert request.package.url == "s3://bucket/runs/tiny/submissions/0001/maskwright-0.zip"
    assert request.package.url in request.artefact
    with pytest.raises(ConfigError, match="Ray fetches no packages from"):
        rayjob_request(RunFolder(Location("memory://runs/tiny")), a_submission(), cluster, "maskwright-0.zip")


@pytest.mark.parametrize("query", ["", "?a=$(id)"])
def test_credentials_in_the_address_of_the_storage_reach_no_request_and_no_error(query: str) -> None:
    cluster = validate_cluster(CLUSTER, "test")
    assert isinstance(cluster, KubeRayCluster)
    with pytest.raises(ConfigError, match="has credentials in its address") as caught:
        rayjob_request(RunFolder(Location(f"s3://AKIAKEY:hunter2secret@bucket/runs/tiny{query}")), a_submission(), cluster, "maskwright-0.zip")
    assert "hunter2secret" not in f"{caught.value.cause}{caught.value.remedy}"


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ((403, "Forbidden", "rayjobs.ray.io is forbidden: User me cannot create resource"), "Ask for the right"),
        ((400, "BadRequest", 'strict decoding error: unknown field "spec.rayClusterSpec.authOptions"'), "1.5.1 or later"),
        ((422, "Invalid", "RayJob.ray.io x is invalid: spec.backoffLimit: Invalid value"), "Correct the cluster file"),
    ],
)
def test_a_rayjob_that_kubernetes_refuses_is_an_error_of_the_file(
    refusal: tuple[int, str, str], remedy: str, api: KubernetesApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.refusal = refusal
    assert submit() == ExitCode.CONFIG
    cause, what_to_do = capsys.readouterr().err.strip().splitlines()
    assert refusal[2].rpartition(":")[2] in cause
    assert remedy in what_to_do


def test_a_rayjob_whose_creation_had_no_answer_is_deleted_and_named(api: KubernetesApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.refusal = (504, "Timeout", "request did not complete")
    assert submit() == ExitCode.UNREACHABLE
    assert re.search(r"`kubectl --namespace=research .*delete rayjob tiny-\S+-0001`", capsys.readouterr().err)
    assert (api.asked["DELETE"].rpartition("/")[2].startswith("tiny-"), api.jobs) == (True, {})


def a_kubectl(does: str, monkeypatch: pytest.MonkeyPatch) -> KubeRayJobs:
    Path("kubectl").write_text(f"#!/bin/sh\n{does}\n")
    Path("kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path.cwd()}:{os.environ['PATH']}")
    return KubeRayJobs("research", 5.0)


def test_kubectl_is_given_nothing_of_what_a_person_types(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, (reads, writes), own = a_kubectl("cat", monkeypatch), os.pipe(), os.dup(0)
    os.write(writes, b"typed ahead")
    os.close(writes)
    os.dup2(reads, 0)
    try:
        assert jobs.log("tiny-0001") == ""
    finally:
        os.dup2(own, 0)
        os.close(reads)
        os.close(own)


@pytest.mark.parametrize("said", ["timed out waiting for the condition", "container is waiting to start: ContainerCreating"])
def test_the_log_of_a_pod_that_is_not_there_yet_is_empty_and_not_waited_for(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = a_kubectl(f'echo "$@" > asked; echo "error: {said}" >&2; exit 1', monkeypatch)
    assert jobs.log("tiny-0001") == ""
    assert "--pod-running-timeout=1s" in Path("asked").read_text().split()


@pytest.mark.parametrize(
    ("does", "given", "context"),
    [("echo here", None, "here"), ("exit 1", "there", "there"), ('echo "error: current-context is not set" >&2; exit 1', None, None)],
)
def test_a_submission_names_its_kubernetes(does: str, given: str | None, context: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    a_kubectl(does, monkeypatch)
    cluster = validate_cluster({**CLUSTER, "context": given}, "test")
    assert isinstance(cluster, KubeRayCluster)
    assert with_context(cluster, 5.0).context == context


def test_a_context_that_no_cluster_file_may_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a_kubectl("echo 'my context'", monkeypatch)
    cluster = validate_cluster(CLUSTER, "test")
    assert isinstance(cluster, KubeRayCluster)
    with pytest.raises(ConfigError, match="current context 'my context'"):
        with_context(cluster, 5.0)
