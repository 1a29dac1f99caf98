"""A run across machines with addresses and mounts of their own: the cable of one is pulled, and put back."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.health import SILENCE_S, Seen
from launcher.lease import process_start
from launcher.rank_watch import ORPHANED_AFTER_S
from tests.chaos.test_elastic_cluster import (
    assert_same_batches,
    metrics,
    seconds_to_first_step,
    started_at,
    wait_for_attempt,
    write_long_run,
)
from tests.support.commands import Command, maskwright
from tests.support.namespaces import Machines
from tests.support.ray_nodes import RayCluster
from tests.support.rig import Rig

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def machines() -> Iterator[Machines]:
    """One for the head and the command, two for the ranks."""
    with Machines(3) as found:
        yield found


@pytest.fixture
def cluster(machines: Machines, tmp_path: Path) -> Iterator[RayCluster]:
    """Ray on all of them, with a token: no other is talked to over a network."""
    with RayCluster(tmp_path / "nodes", address=machines.address(0), inside=machines.inside(0)) as cluster:
        for number in (1, 2):
            cluster.add_node(address=machines.address(number), inside=machines.inside(number))
        yield cluster


LISTEN = "import socket; s = socket.create_server(('', 7777)); print(flush=True); s.accept(); s.accept()"
LOOK = """
import sys
from launcher.clusters.existing import answers
from launcher.interfaces import interface_of
ours, theirs = sys.argv[1:]
look = lambda port: answers({"NodeManagerAddress": theirs, "NodeManagerPort": port})
print(interface_of(ours), look(7777), look(7778), flush=True)
input()
print(look(7777))
"""


def test_a_node_behind_a_cut_link_does_not_answer(machines: Machines) -> None:
    listener = subprocess.Popen([*machines.inside(1), sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
    words = [sys.executable, "-c", LOOK, machines.address(0), machines.address(1)]
    looker = subprocess.Popen([*machines.inside(0), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        listener.stdout.readline()
        assert looker.stdout is not None
        assert looker.stdout.readline().split() == ["eth0", "True", "False"]
        machines.cut(1)
        out, _ = looker.communicate("\n", timeout=30)
        assert out.strip() == "False"
    finally:
        for process in (listener, looker):
            process.kill()
            process.wait()


@pytest.mark.full
def test_a_cut_link_shrinks_the_run_and_what_was_cut_off_ends_in_silence(machines: Machines, cluster: RayCluster, tmp_path: Path) -> None:
    """The link is put back while the next attempt trains: its ranks on the other side must not write any more, and end by themselves."""
    write_long_run(tmp_path)
    cluster.write_config(tmp_path / "cluster.yaml", num_workers=2, min_workers=1)
    rig = Rig(tmp_path, "cut", cluster, random.Random(0), cluster.environment).start()
    try:
        wait_for_attempt(rig, 1, world_size=2, steps=25)
        beyond = rig.ranks_of(cluster.nodes[1])
        cut_at = time.time()
        machines.cut(2)
        wait_for_attempt(rig, 2, world_size=1, steps=25)
        machines.heal(2)
        rig.wait_for("the end of what was cut off", lambda: not any(map(is_alive, beyond.values())), cut_at + ENDED_S - time.time())
        gone_s = time.time() - cut_at
        startup_s = seconds_to_first_step(rig, 1, started_at(rig, 1))
        lost_s = seconds_to_first_step(rig, 2, cut_at)
        print(f"link cut: {lost_s:.1f} s to the next optimizer step, ranks beyond it gone after {gone_s:.1f} s; start-up {startup_s:.1f} s")
        assert beyond
        assert lost_s <= SILENCE_S[Seen.NOTHING] + 20 + startup_s
        steps = rig.stop()
        assert_same_batches(rig, steps)
        assert [(event["before"], event["after"]) for event in rig.events("resized")][:1] == [(2, 1)]
        assert_one_writer(rig)
    finally:
        rig.command.kill_everything()


ENDED_S = ORPHANED_AFTER_S + 30
"""After the cut: a rank beyond it has not heard of its driver for so long, and twice had no answer from the head."""


def is_alive(pid: int) -> bool:
    return bool(process_start(pid))


def assert_one_writer(rig: Rig) -> None:
    """Nothing of the first attempt was written after the second had begun."""
    claimed_at = float((rig.run / "logs/attempt-0002/claim").read_text().split()[0])
    attempts = [record["attempt"] for record in metrics(rig.run)]
    assert attempts == sorted(attempts)
    late = [line for line in [*metrics(rig.run), *rig.events()] if line["attempt"] == 1 and line["time"] > claimed_at]
    assert not late


@pytest.mark.full
def test_a_node_that_does_not_see_the_storage_is_refused_by_name(machines: Machines, tmp_path: Path) -> None:
    write_long_run(tmp_path)
    code, output = maskwright("prepare", "run.yaml", folder=tmp_path)
    assert code == 0, output
    with RayCluster(tmp_path / "nodes", address=machines.address(0), inside=machines.inside(0)) as cluster:
        cluster.add_node(address=machines.address(1), inside=machines.inside(1))
        cluster.add_node(address=machines.address(2), inside=machines.inside(2, own_mount=str(tmp_path / "storage")))
        cluster.write_config(tmp_path / "cluster.yaml", num_workers=2)
        rig = Rig(tmp_path, "apart", cluster, random.Random(0), cluster.environment).start()
        try:
            assert rig.command.wait() == 7, rig.command.text()
        finally:
            rig.command.kill_everything()
    said = " ".join(rig.command.text().split())
    apart = f"host {machines.host(2)}"  # a rank's there, or rank 0's
    assert f"{apart} does not see" in said or f"wrote there on {apart}: the storage is not shared" in said
    assert rig.step() == -1


@pytest.mark.full
def test_a_run_is_submitted_from_a_machine_that_is_no_part_of_the_cluster(machines: Machines, tmp_path: Path) -> None:
    """It trains on both machines of the cluster, survives the loss of one, and every verb about it works from the third."""
    write_long_run(tmp_path)
    with RayCluster(tmp_path / "nodes", address=machines.address(0), inside=machines.inside(0), head_cpus=1, takes_jobs=True) as cluster:
        cluster.add_node(address=machines.address(1), inside=machines.inside(1))
        cluster.write_config(tmp_path / "ray.yaml", num_workers=2, min_workers=1)
        rig = Rig(tmp_path, "tiny", cluster, random.Random(0))
        here = {"RAY_AUTH_TOKEN_PATH": cluster.environment["RAY_AUTH_TOKEN_PATH"], "MASKWRIGHT_STORAGE": str(tmp_path / "storage")}

        def call(*arguments: str, code: int = 0) -> str:
            command = Command(list(arguments), tmp_path, here, inside=machines.inside(2)).start()
            try:
                assert command.wait() == code, command.text()
                return command.text()
            finally:
                command.kill_everything()

        call("submit", "run.yaml", "--cluster", "ray.yaml")
        rig.command = Command(["logs", "tiny", "-f"], tmp_path, here, inside=machines.inside(2)).start()
        try:
            wait_for_attempt(rig, 1, world_size=2, steps=25)
            cluster.kill_node(cluster.nodes[0])
            wait_for_attempt(rig, 2, world_size=1, steps=25)
            assert json.loads(call("status", "tiny", "--json", "--exit-code", code=20))["state"] == "running"
            assert "stopped" in call("stop", "tiny")
            assert rig.command.wait() == 0, rig.command.text()
            call("status", "tiny", "--exit-code", code=75)
            steps = int(rig.checkpoints()[-1].name.removeprefix("step-"))
            assert_same_batches(rig, steps)
            call("resume", "tiny")
            rig.command = Command(["logs", "tiny", "-f"], tmp_path, here, inside=machines.inside(2)).start()
            wait_for_attempt(rig, 3, world_size=1, steps=5)
            call("stop", "tiny", "--now")
        finally:
            rig.command.kill_everything()
