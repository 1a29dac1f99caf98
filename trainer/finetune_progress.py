"""The state of an unfinished trial, saved with accelerate's `save_state` so that a killed fine-tune continues inside a trial.

Only on a local or shared folder; on object stores a killed fine-tune continues with the trials that are finished.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from data_pipeline.errors import MaskwrightError, StorageError
from data_pipeline.storage import Location
from trainer.agreement import Ranks

_MARKER = "progress.json"
_log = logging.getLogger(__name__)


class StateSaver(Protocol):
    """What is needed of an `Accelerator`: save and load all that it prepared."""

    def save_state(self, output_dir: str, /) -> Any: ...

    def load_state(self, input_dir: str, /) -> Any: ...


class StateDamagedError(MaskwrightError):
    """A saved state that could not be loaded; it has been removed, and the network may hold a part of it."""


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
        """Save model and optimizer; the previous state is removed afterwards.

        Raises:
            StorageError: the disk is full or the folder cannot be written, on any rank.
        """
        if not self.task_folder.is_local:
            return
        partial = self._folder / f"{self.trial}.partial"
        self.ranks.rank_zero_does("prepare a folder for the state", lambda: shutil.rmtree(partial, ignore_errors=True))
        self.ranks.all_do("save the state", lambda: _writing(partial, lambda: self.accelerator.save_state(str(partial))))
        self.ranks.rank_zero_does("complete the state", lambda: self._complete(partial, progress))

    def load(self) -> Progress | None:
        """Load the newest complete state of this trial into what the accelerator prepared; None when there is none.

        Raises:
            StateDamagedError: it could not be loaded. It is gone; the trial must be set up anew, since a part may have been loaded.
        """
        folder = self.ranks.rank_zero_does("look for a saved state", self._newest)
        if folder is None:
            return None
        try:
            return self.ranks.all_do("load the state", lambda: self._load(folder))[0]
        except MaskwrightError as error:
            damaged = StateDamagedError(f"{folder} could not be loaded and was removed: {error.cause}", "The trial starts again by itself.")
            self.ranks.rank_zero_does("remove a damaged state", lambda: self._discard(folder, damaged))
            raise damaged from error

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

    def _newest(self) -> Path | None:
        if not self.task_folder.is_local:
            return None
        complete = [path for path in self._folder.glob(f"{self.trial}-*") if (path / _MARKER).exists()]
        return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def _load(self, folder: Path) -> Progress:
        found = (Location.at(folder) / _MARKER).read_json()
        self.accelerator.load_state(str(folder))
        return Progress(found["step"], tuple(found["dev_accuracy"]), found["elapsed_s"])

    def _discard(self, folder: Path, why: StateDamagedError) -> None:
        _log.warning("%s %s", why.cause, why.remedy)
        shutil.rmtree(folder)


def _writing(folder: Path, write: Callable[[], object]) -> None:
    """Run `write`. torch and safetensors report a full disk as errors of their own types, which are no OSError."""
    try:
        write()
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in ("PytorchStreamWriter", "unexpected pos")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise StorageError(f"cannot write {folder}: {reason}", "Free space (`maskwright clean`) or check the storage.") from error
