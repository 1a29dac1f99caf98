"""Runs handed over by HTTP, with a token, to a real Ray cluster: followed, left, stopped, resumed and refused, from a machine that is none of it."""

import json
import secrets
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.start_up import PARTS
from tests.support.commands import Command, maskwright
from tests.support.ray_nodes import RayCluster
from tests.support.tiny_run import STEPS, write_run

LONG = 100_000
"""More steps than are made: the run is stopped when enough was seen."""
SECRET, NODES_SECRET = secrets.token_hex(16), secrets.token_hex(16)
"""Of who submits, and of the machines; each in a variable of the environment."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two nodes of one CPU, with packages of ours that cannot be imported: those that travel with the job come first."""
    folder = tmp_path_factory.mktemp("cluster")
    for package in ("launcher", "trainer", "data_pipeline"):
        (folder / "old" / package).mkdir(parents=True)
        (folder / "old" / package / "__init__.py").write_text("raise RuntimeError('an old release of ours')\n")
    environment = {"PYTHONPATH": str(folder / "old"), "AWS_SECRET_ACCESS_KEY": NODES_SECRET}
    with RayCluster(folder / "nodes", environment, takes_jobs=True) as cluster:
        for _ in range(2):
            cluster.add_node()
        yield cluster


@pytest.fixture
def folder(tmp_path: Path, cluster: RayCluster) -> Path:
    """Of who submits: a run, and the cluster's file."""
    write_run(tmp_path)
    cluster.write_config(tmp_path / "ray.yaml", num_workers=2, min_workers=1)
    return tmp_path


def environment(cluster: RayCluster) -> dict[str, str]:
    """Of who submits: the token, and secrets of their own."""
    return {"RAY_AUTH_TOKEN_PATH": cluster.environment["RAY_AUTH_TOKEN_PATH"], "AWS_SECRET_ACCESS_KEY": SECRET}


def submitting(folder: Path, cluster: RayCluster, *options: str) -> Command:
    return Command(["submit", "run.yaml", "--cluster", "ray.yaml", *options], folder, environment(cluster))


def call(cluster: RayCluster, folder: Path, verb: str, *options: str) -> tuple[int, str]:
    """A verb about the run, from a folder that knows nothing of it."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    return maskwright(verb, str(folder / "storage/tiny"), *options, folder=folder / "elsewhere", **environment(cluster))


def status(cluster: RayCluster, folder: Path) -> dict[str, Any]:
    code, output = call(cluster, folder, "status", "--json")
    assert code == 0, output
    return json.loads(output)


def wait_for(cluster: RayCluster, folder: Path, steps: int, attempts: int = 1) -> dict[str, Any]:
    """Until the run has made so many steps, in so many attempts."""
    deadline = time.monotonic() + 300
    while (found := status(cluster, folder))["step"] < steps or found["attempt"] < attempts:
        assert time.monotonic() < deadline, found
        assert found["state"] in {"submitted", "running"}, json.dumps(found)  # whole: what the cause is, pytest would leave out
        time.sleep(1)
    return found


def everything_told(cluster: RayCluster, job: str) -> str:
    """What the cluster's API answers to everybody who has the token, about jobs and what they run in."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    told: list[str] = []
    for path in (
        "jobs/",
        f"jobs/{job}",
        f"jobs/{job}/logs",
        "v0/actors?detail=1",
        "v0/workers?detail=1",
        "v0/runtime_envs?detail=1",
        "v0/jobs?detail=1",
    ):
        request = urllib.request.Request(f"{cluster.dashboard}/api/{path}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            told.append(answer.read().decode())
    return "\n".join(told)


def test_a_submitted_run_is_followed_to_its_end_and_tells_no_secret(folder: Path, cluster: RayCluster) -> None:
    """Neither in what it, Ray or its verbs write and print, nor in what the cluster answers: not the token, not what is in the environment."""
    command = submitting(folder, cluster, "--follow").start()
    assert command.wait(600) == 0, command.text()
    for word in ("submitted to", "prepare", "s to the first step: command", f"step {STEPS}/{STEPS}", "export", "report"):
        assert word in command.text()
    found = status(cluster, folder)
    assert (found["state"], found["exit_code"], found["step"]) == ("finished", 0, STEPS)
    assert found["submission"] in command.text()
    assert list(found["start_up"]) == list(PARTS)
    assert found["start_up"]["workers"] > 0
    told = everything_told(cluster, found["submission"])
    assert told.count(found["submission"]) > 2
    code, log = call(cluster, folder, "logs")
    assert (code, "process" in log) == (0, True)
    places = (folder / "storage", cluster.folder, Path(cluster.temporary))
    written = {path: path.read_bytes() for place in places for path in place.rglob("*") if is_told(path)}
    assert any("session_" in str(path) and path.name.startswith("job-driver") for path in written)
    for word in (SECRET, NODES_SECRET, Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()):
        assert not [str(path) for path, data in written.items() if word.encode() in data]
        for text in (told, log, command.text(), json.dumps(found)):
            assert word not in text


def is_told(path: Path) -> bool:
    """Whether it is something that a run or a node has written."""
    return path.is_file() and path.name != "token"


@pytest.mark.full
def test_ctrl_c_leaves_the_run_alone_and_it_is_stopped_and_resumed_from_elsewhere(folder: Path, cluster: RayCluster) -> None:
    write_run(folder, schedule={"steps": LONG, "warmup_steps": 5}, validation={"every_steps": LONG, "micro_batches": 1})
    command = submitting(folder, cluster, "--follow").start()
    command.wait_until(lambda: "submitted to" in command.text())
    assert status(cluster, folder)["state"] in {"submitted", "running"}
    code, output = maskwright("submit", "run.yaml", "--cluster", "ray.yaml", folder=folder, **environment(cluster))
    assert (code, len(output.strip().splitlines())) == (8, 2), output
    wait_for(cluster, folder, steps=10)
    command.process.send_signal(signal.SIGINT)
    assert command.wait(60) == 130, command.text()
    for verb in ("logs", "status", "stop"):
        assert f"maskwright {verb} " in command.text()
    assert "detached" in command.text()
    seen = status(cluster, folder)["step"]
    wait_for(cluster, folder, steps=seen + 5)
    code, output = maskwright("submit", "run.yaml", "--cluster", "ray.yaml", folder=folder, **environment(cluster))
    assert (code, len(output.strip().splitlines())) == (8, 2), output
    code, output = call(cluster, folder, "logs", "--rank", "1")
    assert code == 0, output
    code, output = call(cluster, folder, "stop")
    assert code == 0, output
    stopped = status(cluster, folder)
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 75)
    assert stopped["last_checkpoint"]
    code, output = call(cluster, folder, "resume")
    assert code == 0, output
    assert "-0002" in output
    resumed = wait_for(cluster, folder, steps=stopped["last_checkpoint"] + 1, attempts=stopped["attempt"] + 1)
    assert (resumed["recoveries"], resumed["steps_lost"]) == (1, 0)
    assert resumed["submission"].endswith("-0002")
    code, output = call(cluster, folder, "stop", "--now")
    assert code == 0, output


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, 4, "wants a Ray token"),
        ({"RAY_AUTH_TOKEN": "wrong"}, 4, "does not accept our Ray token"),
    ],
)
def test_tokens_that_do_not_fit(settings: dict[str, str], code: int, said: str, folder: Path, cluster: RayCluster) -> None:
    found, output = maskwright("submit", "run.yaml", "--cluster", "ray.yaml", folder=folder, **settings)
    assert (found, len(output.strip().splitlines())) == (code, 2), output
    assert said in output
    assert not (folder / "storage").exists()


def test_a_job_that_dies_before_it_drives_is_found_with_its_cause(folder: Path, cluster: RayCluster) -> None:
    settings = json.dumps({"kind": "ray", "dashboard": cluster.dashboard, "environment": {"venv": "/nowhere"}})
    (folder / "ray.yaml").write_text(settings)
    command = submitting(folder, cluster, "--follow").start()
    assert command.wait(120) == 6, command.text()
    found = status(cluster, folder)
    assert (found["state"], found["exit_code"]) == ("failed", 6)
    assert "/nowhere/bin/python" in found["cause"]


@pytest.mark.full
def test_a_node_with_other_software_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    other = tmp_path / "other" / "transformers-99.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 99.0\n")
    write_run(tmp_path)
    with RayCluster(tmp_path / "nodes", takes_jobs=True) as cluster:
        cluster.add_node()
        cluster.add_node(environment={"PYTHONPATH": str(other.parent)})
        cluster.write_config(tmp_path / "ray.yaml", num_workers=2)
        command = submitting(tmp_path, cluster, "--follow").start()
        assert command.wait(600) == 6, command.text()
        error, remedy = command.text().partition("error: ")[2].splitlines()[:2]
        assert "other software: transformers " in error
        assert "Install the same packages" in remedy
        assert "Traceback" not in command.text()
        found = status(cluster, tmp_path)
        assert (found["state"], found["exit_code"], found["step"], found["attempt"]) == ("failed", 6, 0, 1)
        assert "99.0 on" in found["cause"]
