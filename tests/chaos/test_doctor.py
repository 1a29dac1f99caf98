"""Doctor on real clusters: nodes that are dead, slow, different or apart are named, and the others are not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import Prepared
from tests.support.commands import maskwright
from tests.support.namespaces import Machines
from tests.support.ray_nodes import RayCluster, RayNode
from tests.support.rig import send

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(900), pytest.mark.full]


def doctor(cluster: RayCluster, folder: Path, *options: str) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, what is on stdout as JSON, and the two lines of an error."""
    config = cluster.write_config(folder / "cluster.yaml")
    command = ["doctor", "--cluster", str(config), "--storage", str(folder / "storage"), "--json", *options]
    code, output = maskwright(*command, folder=folder, timeout_s=400, **cluster.environment)
    lines = output.splitlines()
    record = next((json.loads(line) for line in lines if line.startswith("{")), {})
    return code, record, [line for line in lines if line and not line.startswith("{")]


def faults(record: dict[str, Any]) -> dict[str, str]:
    """What is said, by node."""
    return {finding["node"]: finding["what"] for finding in record["findings"] if finding["severity"] == "fault"}


def on_core(number: int) -> Sequence[str]:
    """Words before a command that keep it to one core."""
    if shutil.which("taskset") is None:
        pytest.skip("no taskset (util-linux)")
    return ("taskset", "-c", str(number))


@contextmanager
def others_at_work(core: int, count: int = 12) -> Iterator[None]:
    """Processes that take most of a core: so many that it is the slow one also while other tests use the rest of the machine.

    Each in a session of its own: Linux may share a core out by session, whatever the number of processes in one.
    """
    work = "import os; test = os.getppid()\nwhile os.getppid() == test: pass"
    command = [*on_core(core), sys.executable, "-c", work]
    busy = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_dead_and_a_slow_node_of_three_are_named(tmp_path: Path) -> None:
    """A raylet that is stopped is what Ray itself believes in for a minute; a slow node has others at work on its core."""
    with RayCluster(tmp_path / "nodes") as cluster:
        well, slow, dead = (cluster.add_node(inside=on_core(core)) for core in (0, 1, 0))
        well_id, slow_id, dead_id = (node.id() for node in (well, slow, dead))
        send(dead.raylet(), signal.SIGSTOP)
        with others_at_work(core=1):
            code, record, said = doctor(cluster, tmp_path)
    print(said, json.dumps(record, indent=1))
    assert code == 6
    assert set(record["exclude"]) == {slow_id, dead_id} == set(faults(record))
    assert "multiplies matrices at" in faults(record)[slow_id]
    assert "dead" in faults(record)[dead_id]
    assert len(said) == 2
    assert slow_id[:8] in said[0]
    assert dead_id[:8] in said[0]
    assert well_id[:8] not in said[0]
    assert not list((tmp_path / "storage").iterdir())


def test_a_cluster_that_is_well_then_a_node_with_other_packages_then_a_dead_one(tmp_path: Path, tiny_corpus: Prepared) -> None:
    with RayCluster(tmp_path / "nodes") as cluster:
        for _ in range(2):
            cluster.add_node()
        code, record, said = doctor(cluster, tmp_path, "--corpus", str(tiny_corpus.folder))
        assert (code, faults(record)) == (0, {}), said
        assert_measured(record)
        other = add_node_with_other_packages(cluster, tmp_path)
        name = other.id()
        code, record, said = doctor(cluster, tmp_path)
        assert (code, record["exclude"]) == (6, [name]), said
        assert "has maskwright" in faults(record)[name]
        cluster.kill_node(other)
        code, record, said = doctor(cluster, tmp_path)
        assert (code, record["exclude"]) == (6, [name]), said
        assert "is dead" in faults(record)[name]


def assert_measured(record: dict[str, Any]) -> None:
    """A head without CPUs drives and does not train; with a token, nothing answers without it."""
    trains = [node for node in record["nodes"] if node["flops"]]
    assert (len(record["nodes"]), len(trains)) == (3, 2)
    assert record["all_reduce"]["bytes_per_s"] > 0
    assert record["corpus"]["checked"] == record["corpus"]["shards"] > 0
    for node in record["nodes"]:
        assert node["open_ports"] == node["unsure_ports"] == []
        assert abs(node["clock_offset_s"]) < 1.0
        assert node["write_s"] > 0
        assert node["read_s"] > 0


def add_node_with_other_packages(cluster: RayCluster, folder: Path) -> RayNode:
    """Its trainer is another release: ours and one more file. All else is ours, wherever that is installed."""
    package = folder / "other/trainer"
    shutil.copytree(REPOSITORY / "trainer", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "more.py").write_text("")
    own = dict(cluster.environment)
    cluster.environment["PYTHONPATH"] = os.pathsep.join(map(str, (package.parent, REPOSITORY)))
    try:
        return cluster.add_node()
    finally:
        cluster.environment.clear()
        cluster.environment.update(own)


def test_a_cluster_without_a_token_is_told_what_is_open(tmp_path: Path) -> None:
    with RayCluster(tmp_path / "nodes", token=False) as cluster:
        cluster.add_node()
        code, record, said = doctor(cluster, tmp_path)
    assert code == 0, said
    opened = [port for node in record["nodes"] for port in node["open_ports"]]
    assert f"the head's port {cluster.port}" in opened
    assert [finding["severity"] for finding in record["findings"] if "without a token" in finding["what"]]


def test_a_node_with_a_storage_of_its_own_and_one_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    with Machines(4) as machines, RayCluster(tmp_path / "nodes", address=machines.address(0), inside=machines.inside(0)) as cluster:
        cluster.add_node(address=machines.address(1), inside=machines.inside(1))
        apart = cluster.add_node(address=machines.address(2), inside=machines.inside(2, own_mount=str(tmp_path / "storage"))).id()
        cut = cluster.add_node(address=machines.address(3), inside=machines.inside(3)).id()
        machines.cut(3)
        config = cluster.write_config(tmp_path / "cluster.yaml")
        command = [*machines.inside(0), sys.executable, "-P", "-m", "launcher.cli", "doctor", "--cluster", str(config), "--json"]
        done = subprocess.run(
            [*command, "--storage", str(tmp_path / "storage")],
            env=environment(cluster),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 7, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert set(record["exclude"]) == {apart, cut}
    assert "not shared" in faults(record)[apart]
    assert "dead" in faults(record)[cut]


def environment(cluster: RayCluster) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}, **cluster.environment}
