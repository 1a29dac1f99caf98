"""A training job that faults are put into, ours and plain Ray Train + DeepSpeed: its processes, and when it took which step."""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks.children import ROOT
from tests.support.commands import Command, worker_pid
from tests.support.ray_nodes import RayCluster
from tests.support.tiny_run import tiny_config, write_text

STEPS, EVERY_STEPS = 100_000, 50
"""Of the job, far more than it takes; between two checkpoints."""
WORK: dict[str, Any] = {
    "precision": "fp32",
    "zero_stage": 1,
    "ranks": 2,
    "global_batch_size": 32,
    "micro_batch_size": 16,
    "sequence_length": 64,
    "checkpoint_every_steps": EVERY_STEPS,
}
"""What both contestants do, on equal clusters, with the same network: the peer's is read from a checkpoint of ours."""
_POLL_S = 0.02


@dataclass(frozen=True)
class Step:
    """An optimizer step as it showed in the job's log."""

    number: int
    seen_at: float
    """Clock of `time.time`."""
    group: int
    """Which group of workers took it: an attempt's number, or a process of it."""


@dataclass
class Trainee(ABC):
    """A job on a Ray cluster. Everything that a job writes carries its name, which no other job has: one of the same name would be resumed."""

    folder: Path
    """Of all jobs of this contestant."""
    name: str
    cluster: RayCluster
    min_workers: int
    commands: list[Command] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _read: int = 0

    @property
    @abstractmethod
    def log(self) -> Path:
        """File that gets a line for each optimizer step."""

    @abstractmethod
    def write(self) -> None:
        """Write what the job's command reads."""

    @abstractmethod
    def make_command(self, *, again: bool) -> Command:
        """The job's command; `again`: the one that goes on after it was killed."""

    @abstractmethod
    def pid(self, rank: int) -> int:
        """Process of a rank of the present group."""

    @abstractmethod
    def parse(self, line: dict[str, Any]) -> Step:
        """One line of the log, seen now."""

    @abstractmethod
    def start_up_s(self) -> float:
        """Seconds from the start of the job's first group of workers to its first step; ask before it has another group."""

    @abstractmethod
    def newest_checkpoint(self) -> Path | None:
        """Folder of the checkpoint that a restart would load."""

    @property
    def command(self) -> Command:
        """The command that drives the job now."""
        return self.commands[-1]

    @property
    def is_elastic(self) -> bool:
        """Whether it may go on with fewer ranks."""
        return self.min_workers < WORK["ranks"]

    def start(self) -> Self:
        """Start the job's command."""
        self.write()
        self.commands.append(self.make_command(again=False).start())
        return self

    def restart(self) -> None:
        """Kill the job's command, and start the one that goes on."""
        self.command.kill_driver()
        self.commands.append(self.make_command(again=True).start())

    def look(self) -> None:
        """Read what was appended to the log."""
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        self.steps += [self.parse(json.loads(line)) for line in whole.splitlines() if line.startswith(b"{")]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Poll until it holds; False when the job ended or the time was up."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.look()
            if condition():
                return True
            if self.command.process.poll() is not None:
                self.look()
                return condition()
            time.sleep(_POLL_S)
        return False

    def wait_for_step_after(self, group: int, timeout_s: float) -> Step | None:
        """The first step of another group than `group`."""
        count = len(self.steps)
        self.wait_for(lambda: any(step.group != group for step in self.steps[count:]), timeout_s)
        return next((step for step in self.steps[count:] if step.group != group), None)

    def signal_rank(self, rank: int, number: int) -> None:
        """Send a signal to a rank's process."""
        os.kill(self.pid(rank), number)

    def text(self) -> str:
        """All that its commands have printed."""
        return "".join(command.text() for command in self.commands)

    def end(self) -> None:
        """End everything that the job started."""
        for command in self.commands:
            command.kill_everything()


class Ours(Trainee):
    """`maskwright run` at its defaults, but for a step that takes milliseconds. All jobs share one corpus, which the first prepares."""

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "text.jsonl").exists():
            write_text(self.folder)
        (self.folder / f"{self.name}.yaml").write_text(yaml.safe_dump(run_config(self.name)))
        elastic = {"min_workers": self.min_workers} if self.is_elastic else {}
        self.cluster.write_config(self.folder / f"{self.name}-cluster.yaml", num_workers=WORK["ranks"], **elastic)

    def make_command(self, *, again: bool) -> Command:
        first = ["run", f"{self.name}.yaml", "--cluster", f"{self.name}-cluster.yaml"]
        return Command(["resume", self.name, "--storage", "storage"] if again else first, self.folder, self.cluster.environment)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "storage" / self.name

    @property
    def log(self) -> Path:
        return self.run / "metrics.jsonl"

    def pid(self, rank: int) -> int:
        found = worker_pid(self.run, attempt=self.steps[-1].group, rank=rank)
        assert found is not None
        return found

    def parse(self, line: dict[str, Any]) -> Step:
        return Step(line["step"], time.time(), line["attempt"])

    def start_up_s(self) -> float:
        started = next(event for event in self.events("attempt_started") if event["stage"] == "pretrain")
        return self.steps[0].seen_at - started["time"]

    def newest_checkpoint(self) -> Path | None:
        names = sorted(path for path in (self.run / "checkpoints").glob("step-*") if "." not in path.name)
        return names[-1] if names else None

    def network(self) -> dict[str, Any]:
        """The network's dimensions, from the newest checkpoint."""
        checkpoint = self.newest_checkpoint()
        assert checkpoint is not None
        return json.loads((checkpoint / "zero" / "config.json").read_text())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        path = self.run / "events.jsonl"
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


def run_config(name: str) -> dict[str, Any]:
    """run.yaml of a job of ours; pure."""
    return tiny_config(
        name=name,
        batch={key: WORK[key] for key in ("global_batch_size", "micro_batch_size", "sequence_length")},
        schedule={"steps": STEPS, "warmup_steps": 5},
        checkpoint={"every_steps": EVERY_STEPS},
        validation={"every_steps": STEPS},
        precision=WORK["precision"],
        zero={"stage": WORK["zero_stage"]},
    )


@dataclass
class Peer(Trainee):
    """`benchmarks.contestants.ray_deepspeed`. Its documented way to go on after a lost driver is the same script again, under the same name."""

    network: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def own(self) -> Path:
        """What this job writes."""
        return self.folder / self.name

    def write(self) -> None:
        self.own.mkdir(parents=True)

    def make_command(self, *, again: bool) -> Command:
        del again
        settings = {
            **WORK,
            "address": f"{self.cluster.address}:{self.cluster.port}",
            "name": self.name,
            "folder": str(self.own),
            "num_workers": [self.min_workers, WORK["ranks"]] if self.is_elastic else WORK["ranks"],
            "steps": STEPS,
            "network": self.network,
        }
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        return Command([json.dumps(settings)], self.own, environment, program="benchmarks.contestants.ray_deepspeed")

    @property
    def log(self) -> Path:
        return self.own / "rank-0.jsonl"

    def pid(self, rank: int) -> int:
        return json.loads((self.own / f"rank-{rank}.jsonl").read_text().splitlines()[-1])["pid"]

    def parse(self, line: dict[str, Any]) -> Step:
        return Step(line["step"], time.time(), line["pid"])

    def start_up_s(self) -> float:
        return self.steps[0].seen_at - float((self.own / "fit-started").read_text())

    def newest_checkpoint(self) -> Path | None:
        run = self.own / "ray" / self.name
        registered = run / "checkpoint_manager_snapshot.json"  # Ray's controller loads nothing newer, whatever lies there
        latest = json.loads(registered.read_text())["latest_checkpoint_result"] if registered.exists() else None
        return run / latest["checkpoint_dir_name"] if latest else None
