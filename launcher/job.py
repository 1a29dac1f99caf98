"""`Job`, a run being driven by this process, and what its stages hand back."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from data_pipeline.storage import Location
from launcher.clusters.local import Workers
from launcher.lease import Lease
from launcher.progress import TrainingProgress
from launcher.supervision import RayOnDemand
from trainer.config import RunConfig
from trainer.runlog import RunFolder


@dataclass
class Job:
    """A run being driven by this process."""

    config: RunConfig
    run: RunFolder
    lease: Lease
    ray: RayOnDemand
    console: Console
    progress: TrainingProgress
    model: Location
    """The model folder that fine-tuning starts from."""
    resumed: bool
    """By `resume`: the corpus of the run is taken as it is, sources are not looked at."""
    stage: str = ""
    attempt: int = 0
    workers: Workers | None = None
    """The worker group of the stage's newest attempt."""
    home: str = field(default_factory=os.getcwd)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: what is where, and whether it did anything."""

    text: str
    worked: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    work: Callable[[Job], Outcome]
