"""The seam to accelerate's trackers: rank 0's records on TensorBoard, Weights & Biases and others (a thread each: none holds up or ends a run)."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import Any, Protocol, Self, cast

from data_pipeline.storage import Location
from trainer.config import RunConfig
from trainer.redaction import redacted, without_values
from trainer.runlog import RunFolder

MOST_WAITING = 10_000
"""Records that wait for a tracker; one that takes them more slowly than they come misses some."""
FINISH_S = 10.0
"""How long the end of an attempt waits for all trackers together."""
FAILED_S = 2.0
"""The same of one that failed, after which the next is to begin."""
_RECORD_S = 2.0
"""How long it waits for storage to take what became of a tracker."""
_SETTINGS = ("seed", "objective", "model", "batch", "optimizer", "schedule", "precision", "zero")
"""What trackers are told of the configuration: what the curves depend on."""
_ADDRESSES = {"model": {"init_from"}}
"""Of those what may be an address, which trackers are not told."""
_NOTHING_ELSE: dict[str, Any] = {
    "console": "off",  # rank 0's log
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "host": "",
    "x_disable_meta": True,  # the machine, the command, the packages
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""What W&B sends of its own accord, unless it is told not to (`wandb.Settings`)."""
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A tracker that has begun: the part of accelerate's `GeneralTracker` that is used."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Show numbers of a step."""
        ...

    def finish(self) -> None:
        """Pass on what is held back."""
        ...


@dataclass
class Trackers:
    """The trackers of an attempt, which rank 0 has. They begin with the first record."""

    run: RunFolder
    config: RunConfig
    attempt: int
    first_step: int
    _feeds: list["Feed"] | None = None

    def log(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Show the numbers among `values`, below `group`. Never waits, never raises."""
        if self._feeds is None:
            self._feeds = [Feed.start(name, self._opener(name), self._record_failure) for name in self.config.tracking.trackers]
        numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, float) and name != "time"}
        for feed in self._feeds:
            feed.put(numbers, step)

    def close(self, *, failed: bool = False) -> None:
        """Let all of them finish, within `FINISH_S` seconds; of an attempt that failed within `FAILED_S`."""
        feeds, deadline = self._feeds or [], time.monotonic() + (FAILED_S if failed else FINISH_S)
        for feed in feeds:
            feed.end()
        for feed in feeds:
            feed.wait(deadline)

    def _opener(self, name: str) -> Callable[[], Tracker]:
        if name == "tensorboard":
            return lambda: _TensorBoard.open(self.run.tensorboard, self.first_step)
        return lambda: open_tracker(name, self.run, self.config)

    def _record_failure(self, name: str, cause: str) -> None:
        cause = redacted(without_values(cause, os.environ))  # libraries tell with which key they failed, or at which address
        _log.warning("tracker %s: %s", name, cause)
        with suppress(Exception):  # storage may have failed, too, which the run itself will find
            self.run.append_event("tracker_failed", attempt=self.attempt, tracker=name, cause=cause)


@dataclass
class Feed:
    """What one tracker is told, on a thread of its own. Whether it takes that, fails or hangs, who tells it goes on; a failure is told once."""

    name: str
    open_tracker: Callable[[], Tracker]
    failed: Callable[[str, str], None]
    """Takes the name and a cause, on a thread of its own: storage may hang."""
    _records: Queue[tuple[dict[str, float], int] | None] = field(default_factory=lambda: Queue(MOST_WAITING))
    _threads: list[threading.Thread] = field(default_factory=list[threading.Thread])
    """The one that feeds, and one that says how it failed."""

    @classmethod
    def start(cls, name: str, open_tracker: Callable[[], Tracker], failed: Callable[[str, str], None]) -> Self:
        """Begin to feed, as soon as the tracker has begun."""
        feed = cls(name, open_tracker, failed)
        feed._begin(feed._pass_on)
        return feed

    def put(self, values: dict[str, float], step: int) -> None:
        """Have numbers shown, some time."""
        try:
            self._records.put_nowait((values, step))
        except Full:
            self._tell(f"does not keep up: {MOST_WAITING} records wait, others are left out")

    def end(self) -> None:
        """Nothing more will come."""
        while True:
            with suppress(Full):
                self._records.put_nowait(None)
                break
            with suppress(Empty):
                self._records.get_nowait()

    def wait(self, deadline: float) -> None:
        """Wait until it has finished, or an instant of the monotonic clock; and a moment until a failure is recorded."""
        feeding, *_ = self._threads
        feeding.join(max(0.0, deadline - time.monotonic()))
        if feeding.is_alive():
            self._tell("did not finish in time: its last records are lost")
        for telling in self._threads[1:]:
            telling.join(_RECORD_S)

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True, name=f"tracker-{self.name}")
        self._threads.append(thread)
        thread.start()

    def _pass_on(self) -> None:
        try:
            tracker = self.open_tracker()
            while (record := self._records.get()) is not None:
                tracker.log(*record)
            tracker.finish()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever becomes of a tracker, the run goes on
            first = next(iter(str(error).splitlines()), "")
            self._tell(f"{type(error).__name__}: {first}")

    def _tell(self, cause: str) -> None:
        if len(self._threads) == 1:
            self._begin(lambda: self.failed(self.name, cause))


@dataclass
class _TensorBoard:
    """TensorBoard's event files. Not by accelerate, whose tracker cannot take back the steps that a resume repeats where they lie."""

    writer: Any

    @classmethod
    def open(cls, folder: Location, first_step: int) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(folder), purge_step=first_step))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def open_tracker(name: str, run: RunFolder, config: RunConfig) -> Tracker:
    """Begin a tracker of accelerate, and tell it the settings of the run.

    Raises whatever the tracker's own library raises.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # accelerate's trackers ask it who they are; it leaves threads alone where ranks have OMP_NUM_THREADS
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(config.tracking.project, **_ARGUMENTS[name](run))
    tracker.start()
    tracker.store_init_configuration(settings_of(config))
    return tracker


def _wandb(run: RunFolder) -> dict[str, Any]:
    """The same W&B run for all attempts, told nothing but what is logged; what it writes here lies in the run's folder, where that is a folder."""
    folder = {"dir": str(run.root.path)} if run.root.is_local else {}
    return {"name": run.root.name, "id": f"{run.root.name}-{_digest(run)}", "resume": "allow", "settings": _NOTHING_ELSE, **folder}


def _digest(run: RunFolder) -> str:
    """Tells runs of one name in several storages apart."""
    return hashlib.sha256(run.root.url.encode()).hexdigest()[:8]


_ARGUMENTS: dict[str, Callable[[RunFolder], dict[str, Any]]] = {
    "wandb": _wandb,
    "mlflow": lambda run: {"run_name": run.root.name},
    "trackio": lambda run: {"name": f"{run.root.name}-{_digest(run)}", "resume": "allow"},
}
"""What each tracker is begun with, besides the project."""


def settings_of(config: RunConfig) -> dict[str, bool | str | float | int]:
    """Settings by dotted name, as trackers take them."""
    dumped = config.model_dump(mode="json", include=set(_SETTINGS), exclude=_ADDRESSES)
    return dict(_leaves({name: dumped[name] for name in _SETTINGS}))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | str | float | int]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(cast(dict[str, Any], value), f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float) else redacted(str(value))
