"""Shows a run's progress: a bar on a terminal, lines elsewhere, and what ranks record (reads metrics and events, writes to the console)."""

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from data_pipeline.config import ObjectiveConfig
from data_pipeline.lines import LineReader
from data_pipeline.storage import Location
from launcher.event_texts import FROM_RANKS, tell
from launcher.start_up import start_up, tell_start_up
from trainer.runlog import RunFolder, records

_REMOTE_POLL_S = 10.0
_TRIALS_POLL_S = 2.0
_TWINS = 1000
"""Lines among which one that is written again is known."""
_QUIET_S = 30.0
"""Where there is no terminal a line is printed at least so often."""


class RecordsTail:
    """New records of a file of JSON lines (metrics, events) since the last look."""

    def __init__(self, file: Location) -> None:
        self._reader = LineReader(file)
        self._looked_at = 0.0
        self._newest: deque[str] = deque(maxlen=_TWINS)

    def read(self) -> list[dict[str, Any]]:
        """Records appended since the last call, each once: as `RunFolder.read_events`, where storage that failed for a moment has a line twice.

        A last line that is not whole waits for the next; one that was cut by a crash is passed over.
        """
        if not self._reader.file.is_local:
            if time.monotonic() - self._looked_at < _REMOTE_POLL_S:
                return []
            self._looked_at = time.monotonic()
        new = [line for line in dict.fromkeys(self._reader.read()) if line not in self._newest]
        self._newest.extend(new)
        return list(records(new))

    def skip_old(self) -> Self:
        """Begin at the present end."""
        self._reader.skip()
        return self


@dataclass
class TrainingProgress:
    """Shows how pretraining gets on."""

    console: Console
    steps: int
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    paced_over: int = 20
    """Steps whose pace, with what lay between them, is that of those to come."""
    _bar: Progress | None = None
    _task: TaskID | None = None
    _shown: int = -1
    _shown_at: float = -math.inf
    _pace: deque[tuple[float, int]] = field(default_factory=deque)
    """When how many steps were done, in this attempt."""
    _attempt: int | None = None

    def update(self, steps: Iterable[dict[str, Any]]) -> None:
        """Show new records of steps."""
        for record in steps:
            done = int(record["step"]) + 1
            if record.get("attempt") != self._attempt:
                self._attempt = record.get("attempt")
                self._pace.clear()  # other ranks, perhaps, and time in which there were none
            self._pace.append((time.monotonic(), done))
            while self._pace[0][1] < done - self.paced_over:
                self._pace.popleft()
            if self.console.is_terminal:
                self._draw(record, done)
            elif done == self.steps or done * 10 // self.steps != self._shown or time.monotonic() - self._shown_at > _QUIET_S:
                self._shown, self._shown_at = done * 10 // self.steps, time.monotonic()
                self.console.print(f"  step {done}/{self.steps}  {self.describe(record, done)}", highlight=False)

    def describe(self, record: dict[str, Any], done: int) -> str:
        """`mlm 7.012  nsp 0.693  12.3k tokens/s  1:20 left`, with the losses that the objective has."""
        left = self._seconds_left(done)
        parts = [f"{name} {_number(record.get(key))}" for key, name in self.objective.losses.items()] + [f"{human(record['tokens_per_s'])} tokens/s"]
        return "  ".join([*parts, *([f"{clock(left)} left"] if left is not None else [])])

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, record: dict[str, Any], done: int) -> None:
        if self._bar is None:
            columns = (TextColumn("  pretrain"), BarColumn(bar_width=30), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.steps, text="")
        assert self._task is not None
        self._bar.update(self._task, completed=done, text=f"{done}/{self.steps}  {self.describe(record, done)}")

    def _seconds_left(self, done: int) -> float | None:
        if len(self._pace) < 2 or done >= self.steps:
            return None
        (first_at, first), (last_at, last) = self._pace[0], self._pace[-1]
        return (self.steps - done) * (last_at - first_at) / max(1, last - first)


@dataclass
class Notices:
    """Shows what ranks record and who watches should know: recoveries, damaged data, numeric trouble, the first step."""

    console: Console
    run: RunFolder
    _has_started: bool = False

    def update(self, events: Iterable[dict[str, Any]]) -> None:
        """Show new events."""
        for event in events:
            if event.get("kind") in FROM_RANKS:
                self._say(tell(event))
            elif event.get("kind") == "first_step" and not self._has_started:
                self._has_started = True  # what later attempts take is told with what ended those before
                self._say(tell_start_up(start_up(self.run.read_events())))

    def _say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


@dataclass
class TrialProgress:
    """Follows fine-tuning: a line for each trial that ends. Call `update` often; it looks now and then."""

    console: Console
    finetune: Location
    """Folder with a folder for each task."""
    tasks: tuple[str, ...]
    trials_per_task: int
    _ended: dict[str, list[str]] | None = None
    _looked_at: float = 0.0

    def update(self) -> None:
        """Show what is new; what had ended at the first look is not."""
        if time.monotonic() - self._looked_at < (_TRIALS_POLL_S if self.finetune.is_local else _REMOTE_POLL_S):
            return
        self._looked_at = time.monotonic()
        found = {task: self._trials(task) for task in self.tasks}
        before, self._ended = self._ended, found
        if before is None:
            return
        for task, trials in found.items():
            new = sorted(set(trials) - set(before[task]))
            for number, trial in enumerate(new, len(trials) - len(new) + 1):
                init, _, seed = trial.rpartition("-")
                self.console.print(f"  {task}  {init}, seed {seed} done  ({number} of {self.trials_per_task})", highlight=False)

    def _trials(self, task: str) -> list[str]:
        names = (self.finetune / task / "trials").children()
        return [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def human(value: float | None) -> str:
    """`12.3k`, `4.56M`."""
    if value is None:
        return "-"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float | None) -> str:
    """`1:20`, `2:03:10`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
