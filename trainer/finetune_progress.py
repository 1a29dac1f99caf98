"""The state of an unfinished trial, saved with accelerate's `save_state` so that a killed fine-tune continues inside a trial.

Only on a local or shared folder; on object stores a killed fine-tune continues with the trials that are finished.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.storage import Location
from trainer.agreement import Ranks

_MARKER = "progress.json"


class StateSaver(Protocol):
    """What is needed of an `Accelerator`: save and load all that it prepared."""

    def save_state(self, output_dir: str, /) -> Any: ...

    def load_state(self, input_dir: str, /) -> Any: ...


@dataclass(frozen=True)
class Progress:
    """Where a trial is: between two optimizer steps."""

    step: int
    """Steps taken."""
    dev_accuracy: tuple[float, ...]
    """After each finished epoch."""
    elapsed_s: float
    """Over all attempts."""


@dataclass(frozen=True)
class ProgressFolder:
    """`<task folder>/progress/<trial>-<step>/`: complete when it has that name. Methods are collective calls."""

    task_folder: Location
    trial: str
    """Names what is trained; the state of another trial is never loaded."""
    accelerator: StateSaver
    ranks: Ranks

    def save(self, progress: Progress) -> None:
        """Save model and optimizer; the previous state is removed afterwards."""
        if not self.task_folder.is_local:
            return
        partial = self._folder / f"{self.trial}.partial"
        self.ranks.rank_zero_does("prepare a folder for the state", lambda: shutil.rmtree(partial, ignore_errors=True))
        self.ranks.all_do("save the state", lambda: self.accelerator.save_state(str(partial)))
        self.ranks.rank_zero_does("complete the state", lambda: self._complete(partial, progress))

    def load(self) -> Progress | None:
        """Load the newest complete state of this trial into what the accelerator prepared; None when there is none."""
        found = self.ranks.rank_zero_does("look for a saved state", self._newest)
        if found is None:
            return None
        folder, progress = found
        self.ranks.all_do("load the state", lambda: self.accelerator.load_state(str(folder)))
        return progress

    def clear(self) -> None:
        """Remove the states of all trials; called by rank 0 alone."""
        if self.task_folder.is_local:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self.task_folder.path / "progress"

    def _complete(self, partial: Path, progress: Progress) -> None:
        (Location.at(partial) / _MARKER).write_json(asdict(progress))
        complete = self._folder / f"{self.trial}-{progress.step:08d}"
        shutil.rmtree(complete, ignore_errors=True)
        partial.rename(complete)
        for other in self._folder.iterdir():
            if other != complete:
                shutil.rmtree(other, ignore_errors=True)

    def _newest(self) -> tuple[Path, Progress] | None:
        if not self.task_folder.is_local:
            return None
        complete = sorted(path for path in self._folder.glob(f"{self.trial}-*") if (path / _MARKER).exists())
        if not complete:
            return None
        found = (Location.at(complete[-1]) / _MARKER).read_json()
        return complete[-1], Progress(found["step"], tuple(found["dev_accuracy"]), found["elapsed_s"])
