"""A training job that faults are put into, ours and plain Ray Train + DeepSpeed: its processes, and when it took which step."""

import json
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks.children import ROOT
from tests.support.commands import Command, worker_pid
from tests.support.ray_nodes import RayCluster
from tests.support.tiny_run import tiny_config, write_text

STEPS, EVERY_STEPS, WIDTH = 100_000, 20, 64
_POLL_S = 0.02


@dataclass(frozen=True)
class Step:
    """An optimizer step as it showed in the job's log."""

    number: int
    seen_at: float
    """Clock of `time.time`."""
    group: int
    """Which group of workers took it: an attempt's number, or a process of it."""
    loss: float | None = None


@dataclass
class Trainee(ABC):
    """A job on a Ray cluster, in a folder of its own."""

    folder: Path
    cluster: RayCluster
    min_workers: int
    num_workers: int
    command: Command = field(init=False)
    steps: list[Step] = field(default_factory=list)
    _read: int = 0

    @property
    @abstractmethod
    def log(self) -> Path:
        """File that gets a line for each optimizer step."""

    @abstractmethod
    def start(self) -> Self:
        """Start the job's command."""

    @abstractmethod
    def pid(self, rank: int) -> int:
        """Process of a rank of the present group."""

    @abstractmethod
    def parse(self, line: dict[str, Any]) -> Step:
        """One line of the log, seen now."""

    @abstractmethod
    def start_up_s(self) -> float:
        """Seconds from the start of the first group of workers to its first step."""

    @abstractmethod
    def newest_checkpoint(self) -> Path | None:
        """Folder of the checkpoint that a restart would load."""

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

    def wait_for(self, condition: Any, timeout_s: float) -> bool:
        """Poll until it holds; False when the job ended or the time was up."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.look()
            if condition():
                return True
            if self.command.process.poll() is not None:
                self.look()
                return bool(condition())
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

    def end(self) -> None:
        """End everything that the job started."""
        self.command.kill_everything()


class Ours(Trainee):
    """`maskwright run` at its defaults, but for a step that takes milliseconds."""

    def start(self) -> Self:
        config = tiny_config(
            name="bench", schedule={"steps": STEPS, "warmup_steps": 5}, checkpoint={"every_steps": EVERY_STEPS}, validation={"every_steps": STEPS}
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "text.jsonl").exists():
            write_text(self.folder)
        (self.folder / "run.yaml").write_text(yaml.safe_dump(config))
        elastic = {"min_workers": self.min_workers} if self.min_workers < self.num_workers else {}
        self.cluster.write_config(self.folder / "cluster.yaml", num_workers=self.num_workers, **elastic)
        self.command = Command(["run", "run.yaml", "--cluster", "cluster.yaml"], self.folder, self.cluster.environment).start()
        return self

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "storage" / "bench"

    @property
    def log(self) -> Path:
        return self.run / "metrics.jsonl"

    def pid(self, rank: int) -> int:
        found = worker_pid(self.run, attempt=self.steps[-1].group, rank=rank)
        assert found is not None
        return found

    def parse(self, line: dict[str, Any]) -> Step:
        return Step(line["step"], time.time(), line["attempt"], line["loss"])

    def start_up_s(self) -> float:
        return self.steps[0].seen_at - self.events("attempt_started")[0]["time"]

    def newest_checkpoint(self) -> Path | None:
        names = sorted(path for path in (self.run / "checkpoints").glob("step-*") if "." not in path.name)
        return names[-1] if names else None

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        path = self.run / "events.jsonl"
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


class Peer(Trainee):
    """`benchmarks.contestants.ray_deepspeed`."""

    def start(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "address": f"{self.cluster.address}:{self.cluster.port}",
            "num_workers": [self.min_workers, self.num_workers] if self.min_workers < self.num_workers else self.num_workers,
            "folder": str(self.folder),
            "steps": STEPS,
            "every_steps": EVERY_STEPS,
            "model": {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        }
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self.command = Command([json.dumps(settings)], self.folder, environment, program="benchmarks.contestants.ray_deepspeed").start()
        return self

    @property
    def log(self) -> Path:
        return self.folder / "rank-0.jsonl"

    def pid(self, rank: int) -> int:
        return json.loads((self.folder / f"rank-{rank}.jsonl").read_text().splitlines()[-1])["pid"]

    def parse(self, line: dict[str, Any]) -> Step:
        return Step(line["step"], time.time(), line["pid"])

    def start_up_s(self) -> float:
        return self.steps[0].seen_at - float((self.folder / "fit-started").read_text())

    def newest_checkpoint(self) -> Path | None:
        names = sorted(path for path in (self.folder / "ray" / "peer").glob("checkpoint_*") if path.is_dir())
        return names[-1] if names else None
