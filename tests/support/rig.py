"""A real training command on a real Ray cluster of several nodes, and how a fault is put into it and followed (reads only what users can read)."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.commands import Command, maskwright, worker_pid
from tests.support.ray_nodes import RayCluster, RayNode

EVERY_STEPS = 10
RECOVERED_AFTER = 2 * EVERY_STEPS + 2
"""Steps of progress after a fault before the next: two checkpoints were committed by then, one of them after the recovery."""

Event = dict[str, Any]


class MissedError(Exception):
    """A fault has not happened: its victim had ended."""


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

    def start(self, *settings: str, cluster: str = "cluster.yaml") -> "Rig":
        """`maskwright run`."""
        chosen = [argument for setting in (f"name={self.name}", *settings) for argument in ("--set", setting)]
        return self._start("run", "run.yaml", "--cluster", cluster, *chosen)

    def resume(self, *settings: str) -> None:
        """`maskwright resume`, as the person or service does that watches the command."""
        self._start("resume", self.name, "--storage", "storage", *[argument for setting in settings for argument in ("--set", setting)])

    def _start(self, *arguments: str) -> "Rig":
        self.command = Command(list(arguments), self.folder, self.environment, inside=self.cluster.inside).start()
        return self

    def stop(self) -> int:
        """Save and end; returns how many steps there are."""
        self.command.process.send_signal(signal.SIGTERM)
        assert self.command.wait() == 75, self.command.text()
        return int(self.checkpoints()[-1].name.removeprefix("step-"))

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

    def first_record_after(self, attempt: int) -> Event | None:
        """The first record of a step that a later attempt has made."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        return next((record for record in map(json.loads, lines) if record["attempt"] > attempt), None)

    def events(self, *kinds: str, since: float = 0.0) -> list[Event]:
        """Events of these kinds (all without any) after a time."""
        path = self.run / "events.jsonl"
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.startswith(b"{")]
        return [event for event in found if event["time"] > since and (not kinds or event["kind"] in kinds)]

    def attempt(self) -> int:
        """The present one."""
        return max((event["attempt"] for event in self.events("attempt_started")), default=0)

    def ranks(self) -> dict[int, int]:
        """Processes of the present attempt's ranks that are alive."""
        attempt = self.attempt()
        world_size = next((e["world_size"] for e in reversed(self.events("attempt_started"))), 0)
        found = {rank: worker_pid(self.run, attempt, rank) for rank in range(world_size)}
        return {rank: pid for rank, pid in found.items() if pid is not None and Path(f"/proc/{pid}").exists()}

    def any_rank(self) -> tuple[int, int]:
        """One of them, and its process.

        Raises:
            MissedError: there is none.
        """
        ranks = self.ranks()
        if not ranks:
            raise MissedError("no rank is alive")
        rank = self.chance.choice(sorted(ranks))
        return rank, ranks[rank]

    def ranks_of(self, node: RayNode) -> dict[int, int]:
        """Those of a node."""
        there = set(node.processes())
        return {rank: pid for rank, pid in self.ranks().items() if pid in there}

    def checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(path for path in (self.run / "checkpoints").glob("step-*") if "." not in path.name)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or an old one removed."""
        return any(path.name.partition(".")[2].startswith(("partial", "replaced")) for path in (self.run / "checkpoints").glob("step-*.*"))

    def wait_for(self, what: str, condition: Callable[[], Any], timeout_s: float = 240.0) -> None:
        """Poll while the command runs; fails the test with all that the command printed."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = self.command.process.poll()
            if ended is not None or time.monotonic() > deadline:
                told = "\n".join(map(str, [*self.events()[-10:], self.command.text()[-4000:]]))
                raise AssertionError(f"{what}: not in {timeout_s:.0f} s (exit code {ended}, step {self.step()})\n{told}")
            time.sleep(0.02)

    def wait_until_trained(self, steps: int) -> None:
        """Until so many more steps are done, repeated ones not counted."""
        target = self.step() + steps
        self.wait_for(f"step {target}", lambda: self.step() >= target)


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a victim.

    Raises:
        MissedError: it has ended.
    """
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise MissedError(f"process {pid} has ended") from None


def says(**fields: Any) -> Callable[[Event], bool]:
    """Whether an event says just this."""
    return lambda event: all(event.get(name) == value for name, value in fields.items())


@dataclass(frozen=True)
class Hit:
    """A fault that has happened."""

    victim: str
    expected: Mapping[str, Callable[[Event], bool]] = field(default_factory=dict[str, Callable[[Event], bool]])
    """Kinds of events, each of which must follow and fit the victim. None for a control: the run must go on as if nothing had been."""
    undo: Callable[[], None] = lambda: None
    """What somebody does once the run has recovered, such as to bring another machine."""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    inject: Callable[[Rig], Hit]
    changes_world: bool = False
    takes_minutes: bool = False
    weight: int = 2


@dataclass(frozen=True)
class Struck:
    """What became of a fault."""

    fault: str
    victim: str
    detected_as: str
    detected_s: float | None = None
    """Until the run said so; None for what must not be noticed."""
    next_step_s: float | None = None
    """Until the next optimizer step."""

    def __str__(self) -> str:
        seconds = ["" if value is None else f"{value:.1f}" for value in (self.detected_s, self.next_step_s)]
        return f"{self.fault:<36} {self.victim[-34:]:<34} {self.detected_as:<34} {seconds[0]:>8} {seconds[1]:>9}"


HEADER = f"{'fault':<36} {'victim':<34} {'detected as':<34} {'after s':>8} {'step at s':>9}"

ALARMS = ("worker_failed", "rank_unhealthy", "checkpoint_damaged", "numeric_trouble", "preempted")


def strike(rig: Rig, fault: Fault) -> Struck:
    """Inject the fault, and wait until it is noticed as what it is and training has gone on for a while.

    Raises:
        MissedError: it has not happened.
    """
    rig.wait_until_trained(1)
    begun, attempt = time.time(), rig.attempt()
    hit = fault.inject(rig)
    noticed: dict[str, float] = {}

    def are_noticed() -> bool:
        for kind, fits in hit.expected.items():
            found = next((event["time"] for event in rig.events(kind, since=begun) if event["attempt"] >= attempt and fits(event)), None)
            if found is not None:
                noticed.setdefault(kind, found - hit.at)
        return noticed.keys() == hit.expected.keys()

    rig.wait_for(f"{fault.name} ({hit.victim}): {', '.join(hit.expected)}", are_noticed)
    next_step_s = None
    if hit.expected:
        rig.wait_for(f"{fault.name}: training", lambda: last_attempt_of(rig) > attempt)
        first = rig.first_record_after(attempt)
        assert first is not None
        next_step_s = first["time"] - hit.at
    hit.undo()
    rig.wait_until_trained(RECOVERED_AFTER)
    others = [event for event in rig.events(*ALARMS, since=begun) if event["kind"] not in hit.expected]
    assert not others, f"{fault.name} ({hit.victim}) tripped {others}"
    return Struck(fault.name, hit.victim, ", ".join(hit.expected) or "-", min(noticed.values(), default=None), next_step_s)


def last_attempt_of(rig: Rig) -> int:
    """Attempt of the last record of a step."""
    with (rig.run / "metrics.jsonl").open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return json.loads(lines[-1])["attempt"]


def proof(run: Path, folder: Path) -> dict[str, Any]:
    """The proof panel of the report, as JSON."""
    code, output = maskwright("report", str(run), "--json", "--all-steps", folder=folder)
    assert code == 0, output
    return json.loads(output)["proof"]
