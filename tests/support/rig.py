"""A real training command on a real Ray cluster of several nodes, and the faults that are put into it (reads only what users can read)."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.commands import Command, maskwright, worker_pid
from tests.support.ray_nodes import RayCluster

EVERY_STEPS = 10
_RECOVERED_AFTER = 2 * EVERY_STEPS + 2
"""Steps of progress after a fault before the next: two checkpoints were committed by then, one of them after the recovery."""


@dataclass
class Rig:
    """A run under test."""

    folder: Path
    name: str
    cluster: RayCluster
    chance: random.Random
    environment: dict[str, str] = field(default_factory=dict)
    command: Command = field(init=False)
    _offset: int = 0
    _step: int = -1

    def start(self, *settings: str) -> "Rig":
        """`maskwright run`."""
        chosen = [argument for setting in (f"name={self.name}", *settings) for argument in ("--set", setting)]
        self.command = Command(
            ["run", "run.yaml", "--cluster", "cluster.yaml", *chosen], self.folder, self.environment, inside=self.cluster.inside
        ).start()
        return self

    def resume(self) -> None:
        """`maskwright resume`, as the person or service does that watches the command."""
        self.command = Command(["resume", self.name, "--storage", "storage"], self.folder, self.environment, inside=self.cluster.inside).start()

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "storage" / self.name

    def step(self) -> int:
        """The last optimizer step in the metrics."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().rpartition(b"\n")[0]
            self._offset += len(lines) + 1 if lines else 0
            for line in lines.splitlines():
                self._step = json.loads(line)["step"]
        return self._step

    def events(self, *kinds: str, since: float = 0.0) -> list[dict[str, Any]]:
        """Events of these kinds (all without any) after a time."""
        path = self.run / "events.jsonl"
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.startswith(b"{")]
        return [event for event in found if event["time"] > since and (not kinds or event["kind"] in kinds)]

    def ranks(self) -> dict[int, int]:
        """Processes of the present attempt's ranks that are alive."""
        attempt = max((event["attempt"] for event in self.events("attempt_started")), default=0)
        world_size = next((e["world_size"] for e in reversed(self.events("attempt_started"))), 0)
        found = {rank: worker_pid(self.run, attempt, rank) for rank in range(world_size)}
        return {rank: pid for rank, pid in found.items() if pid is not None and Path(f"/proc/{pid}").exists()}

    def any_rank(self) -> int:
        """Process of one of them."""
        ranks = self.ranks()
        return ranks[self.chance.choice(sorted(ranks))]

    def checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(path for path in (self.run / "checkpoints").glob("step-*") if "." not in path.name)

    def wait_for(self, what: str, condition: Callable[[], Any], timeout_s: float = 240.0) -> None:
        """Poll while the command runs; fails the test with all that the command printed."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = self.command.process.poll()
            if ended is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what}: not in {timeout_s:.0f} s (exit code {ended}, step {self.step()})\n{self.command.text()[-4000:]}")
            time.sleep(0.02)

    def wait_until_trained(self, steps: int) -> None:
        """Until so many more steps are done, repeated ones not counted."""
        target = self.step() + steps
        self.wait_for(f"step {target}", lambda: self.step() >= target)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, and what the run must say about it."""

    name: str
    inject: Callable[[Rig], None]
    detected_as: tuple[str, ...]
    """Kinds of events, of which one must follow; none for a control, after which none of ALARMS may."""
    changes_world: bool = False
    weight: int = 2


ALARMS = ("worker_failed", "rank_unhealthy", "checkpoint_damaged", "numeric_trouble", "preempted")


def strike(rig: Rig, fault: Fault) -> float:
    """Inject the fault, wait until it is noticed and training goes on; returns the seconds until the next new optimizer step."""
    rig.wait_until_trained(1)
    begun, attempt = time.time(), len(rig.events("attempt_started"))
    fault.inject(rig)
    if fault.detected_as:
        rig.wait_for(f"{fault.name}: {' or '.join(fault.detected_as)}", lambda: rig.events(*fault.detected_as, since=begun))
        rig.wait_for(f"{fault.name}: another attempt", lambda: len(rig.events("attempt_started")) > attempt)
        started = rig.events("attempt_started")[attempt]["attempt"]
        rig.wait_for(f"{fault.name}: training", lambda: rig.step() >= 0 and last_attempt_of(rig) >= started)
    took = time.time() - begun
    rig.wait_until_trained(_RECOVERED_AFTER)
    if not fault.detected_as:
        assert not (alarms := rig.events(*ALARMS, since=begun)), f"{fault.name} tripped {alarms}"
    return took


def last_attempt_of(rig: Rig) -> int:
    """Attempt of the last record of a step."""
    with (rig.run / "metrics.jsonl").open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return json.loads(lines[-1])["attempt"]


def kill_rank(rig: Rig) -> None:
    """SIGKILL."""
    os.kill(rig.any_rank(), signal.SIGKILL)


def stop_rank(rig: Rig) -> None:
    """SIGSTOP, for good."""
    os.kill(rig.any_rank(), signal.SIGSTOP)


def slow_rank(rig: Rig) -> None:
    """A control: a rank that is stopped half of the time for some seconds is slow, not broken."""
    pid = rig.any_rank()
    for _ in range(10):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)


def kill_driver(rig: Rig) -> None:
    """The command dies; somebody resumes the run."""
    rig.command.kill_driver()
    rig.resume()


def kill_node(rig: Rig) -> None:
    """A node is gone, and another comes once the run goes on without it."""
    rig.cluster.kill_node(rig.chance.choice(rig.cluster.nodes))
    before = len(rig.events("attempt_started"))
    rig.wait_for("an attempt without the node", lambda: len(rig.events("attempt_started")) > before)
    rig.wait_until_trained(_RECOVERED_AFTER)
    rig.cluster.add_node()
    rig.wait_for("growth", lambda: rig.ranks().keys() == {0, 1})


def kill_during_save(rig: Rig) -> None:
    """SIGKILL while a checkpoint is being written."""
    rig.wait_for("a save", lambda: list((rig.run / "checkpoints").glob("step-*.partial-*")))
    kill_rank(rig)


def _damage(how: Callable[[Rig, Path], None]) -> Callable[[Rig], None]:
    def inject(rig: Rig) -> None:
        newest = rig.checkpoints()[-1]
        file = rig.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        how(rig, file)
        kill_rank(rig)

    return inject


def _truncate(rig: Rig, file: Path) -> None:
    os.truncate(file, rig.chance.randrange(file.stat().st_size))


def _flip(rig: Rig, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[rig.chance.randrange(len(data))] ^= 1 << rig.chance.randrange(8)
    file.write_bytes(data)


def _delete(rig: Rig, file: Path) -> None:
    del rig
    file.unlink()


FAULTS = (
    Fault("kill a rank", kill_rank, ("worker_failed",), weight=4),
    Fault("stop a rank", stop_rank, ("rank_unhealthy",)),
    Fault("kill the driver", kill_driver, ("worker_failed",)),
    Fault("kill a node", kill_node, ("worker_failed",), changes_world=True),
    Fault("kill a rank during a save", kill_during_save, ("worker_failed",), weight=3),
    Fault("truncate a checkpoint's file", _damage(_truncate), ("checkpoint_damaged",)),
    Fault("flip a bit of a checkpoint", _damage(_flip), ("checkpoint_damaged",)),
    Fault("delete a checkpoint's file", _damage(_delete), ("checkpoint_damaged",)),
    Fault("a slow rank (control)", slow_rank, ()),
)


def proof(run: Path, folder: Path) -> dict[str, Any]:
    """The proof panel of the report, as JSON."""
    code, output = maskwright("report", str(run), "--json", "--all-steps", folder=folder)
    assert code == 0, output
    return json.loads(output)["proof"]
