"""`Save`, one save in the background of one rank: written and hashed from a snapshot, committed by rank 0 once every rank has left its receipt.

Nothing here is a collective, so nothing interleaves with training's. Ranks hear of a failure in the training loop: `Save.error`.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, sleep_using_event, stop_after_attempt, wait_random_exponential

from data_pipeline.errors import ConflictError, MaskwrightError
from data_pipeline.storage import Location
from trainer.checkpoint_store import Checkpoints, checkpoints_of, name_of
from trainer.config import CheckpointConfig, RunConfig
from trainer.manifest import Circumstances, Manifest, nothing
from trainer.receipts import RECEIPTS, Receipt, new_receipts
from trainer.retention import superfluous
from trainer.runlog import RunFolder
from trainer.snapshot import Snapshot
from trainer.state import TrainState
from trainer.writing import as_known, is_worth_a_retry, write_files

T = TypeVar("T")

COMMIT_TIMEOUT_S = 600.0
_ATTEMPTS = 4
_LONGEST_PAUSE_S = 10.0
_POLL_S = (0.02, 0.5)
"""Pause between two looks for receipts: the first, and the longest."""
_LOOK_S = 1.0
_CLEAN_UP_S = 3.0
_TOLD_RANKS = 8
"""A failure that all ranks share is recorded of no more than this many."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveRequest:
    """What a rank's background has to know of a save."""

    run: RunFolder
    config: RunConfig
    state: TrainState
    circumstances: Circumstances
    attempt: int
    rank: int
    require_current: Callable[[], None]
    """Raises ConflictError once a newer attempt has begun (R10); asked by rank 0 right before the commit."""
    before_commit: Callable[[], None] = nothing
    """What rank 0 does before it commits, and again where it fails for now."""
    validation_loss: float | None = None
    """Measured at this step."""
    stall_s: float = 0.0
    """Seconds for which training stood still for it."""
    timeout_s: float = COMMIT_TIMEOUT_S
    """How long rank 0 waits for the others' receipts."""


class SaveCancelledError(Exception):
    """Training has ended; what is half-written goes."""


class _OtherRankFailedError(Exception):
    """Rank 0 has read of another rank's failure for good."""

    def __init__(self, receipt: Receipt) -> None:
        self.receipt = receipt


@dataclass
class Save:
    """A save under way on this rank. `start` it; then `is_done` says that it has come to an end, and `error` how."""

    request: SaveRequest
    snapshot: Snapshot
    error: MaskwrightError | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)
    _started_at: float = field(default_factory=time.monotonic)
    _moves: int = 0
    """Pieces written, and looks for the others' receipts."""

    def start(self) -> "Save":
        """Begin, in a thread: hashing and writing large pieces hold no GIL."""
        threading.Thread(target=self.run, daemon=True, name="checkpoint").start()
        return self

    @property
    def is_done(self) -> bool:
        """Whether this rank's part has come to an end: its files are written, on rank 0 the checkpoint is committed, or it has failed."""
        return self._done.is_set()

    def wait(self, timeout_s: float, on_progress: Callable[[], None] = nothing) -> None:
        """Wait for the end. `on_progress` is called now and then, as long as it gets on: a slow save is no hang.

        Raises:
            MaskwrightError: it failed, or did not end in time.
        """
        deadline, seen = time.monotonic() + timeout_s, self._moves
        while not self._done.wait(max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise MaskwrightError(
                    f"the checkpoint of step {self.request.state.step} was not committed in {timeout_s:.0f} s",
                    "Check the storage's speed and the other ranks' logs, then `maskwright resume` the run.",
                )
            if self._moves != seen:
                seen = self._moves
                on_progress()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Give up what is not committed yet, soon."""
        self._cancelled.set()

    def run(self) -> None:
        """All of it, in this thread."""
        try:
            files = self._do("write its part of the checkpoint", lambda: write_files(self.snapshot, self._part, self._go_on))
            own = Receipt(self.request.rank, files)
            if self.request.rank == 0:
                self._commit(own)
            else:
                self._do("leave its receipt", lambda: own.leave(self._part))
        except SaveCancelledError:
            self._give_up(self._failure(MaskwrightError(f"rank {self.request.rank} ended before it had saved", "See its log.")))
        except _OtherRankFailedError as other:
            self.error = other.receipt.error
            self._give_up(other.receipt)
        except Exception as error:
            log.exception("the checkpoint of step %d is given up", self.request.state.step)
            self.error = as_known(error, self._could_not("save"))
            self._give_up(self._failure(self.error))
        finally:
            self._done.set()

    @property
    def _checkpoints(self) -> Checkpoints:
        return checkpoints_of(self.request.run)

    @property
    def _part(self) -> Location:
        return self._checkpoints.part(self.request.state.step, self.request.attempt)

    def _go_on(self) -> None:
        self._moves += 1
        if self._cancelled.is_set():
            raise SaveCancelledError

    def _do(self, what: str, action: Callable[[], T]) -> T:
        """Run `action`, several times where that may help.

        Raises:
            MaskwrightError: it failed; names the rank and `what` it could not do.
        """
        retrying = Retrying(
            retry=retry_if_exception(is_worth_a_retry),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
            sleep=sleep_using_event(self._cancelled),
            before_sleep=lambda state: self._say_retry(what, state),
            reraise=True,
        )
        try:
            return retrying(action)
        except (SaveCancelledError, ConflictError):
            raise
        except Exception as error:
            raise as_known(error, self._could_not(what)) from error

    def _failure(self, error: MaskwrightError, is_final: bool = True) -> Receipt:
        return Receipt(self.request.rank, {}, error, is_final)

    def _could_not(self, what: str) -> str:
        return f"rank {self.request.rank} could not {what}"

    def _say_retry(self, what: str, state: RetryCallState) -> None:
        reason = state.outcome and state.outcome.exception()
        if isinstance(reason, Exception):
            self._tell(self._failure(as_known(reason, self._could_not(what)), is_final=False))

    def _tell(self, receipt: Receipt) -> None:
        """Let rank 0, and through it the run, know of a failure; the storage may be what failed."""
        log.warning("the checkpoint of step %d: %s%s", self.request.state.step, receipt.error, "" if receipt.is_final else "; it is tried again")
        with suppress(Exception):
            if self.request.rank == 0:
                self._record_failure(receipt)
            else:
                receipt.leave(self._part)

    def _record_failure(self, receipt: Receipt) -> None:
        assert receipt.error is not None
        self.request.run.append_event(
            "checkpoint_failed",
            attempt=self.request.attempt,
            step=self.request.state.step,
            rank=receipt.rank,
            cause=receipt.error.cause,
            retried=not receipt.is_final,
        )

    def _commit(self, own: Receipt) -> None:
        """Rank 0's part: everybody's receipts, the manifest, the rename, then what follows from it."""
        request = self.request
        receipts = self._collect(own)
        files = {name: file for rank in sorted(receipts) for name, file in sorted(receipts[rank].files.items())}
        manifest = Manifest(
            request.attempt, request.circumstances, files, request.state, request.config.model_dump(mode="json"), request.validation_loss
        )
        with suppress(Exception):  # they have served, and are not in the manifest
            (self._part / RECEIPTS).remove()

        def record_steps() -> None:
            self._go_on()
            request.before_commit()

        def commit() -> None:
            self._go_on()
            request.require_current()  # asked each time: a newer attempt may have begun while this one waited for storage
            self._checkpoints.publish(manifest)

        self._do("record the steps of the checkpoint", record_steps)
        self._do("commit the checkpoint", commit)
        try:
            self._after(manifest)
        except Exception:  # it is committed, and the next save tries again to remove the old ones
            log.exception("the checkpoint of step %d is committed, but its event or the removal of old ones failed", manifest.step)

    def _collect(self, own: Receipt) -> dict[int, Receipt]:
        """The receipt of every rank. A rank that tries again is recorded once for each cause."""
        receipts, told = {own.rank: own}, set[str]()
        deadline, pause_s = time.monotonic() + self.request.timeout_s, _POLL_S[0]
        while True:
            for receipt in self._do("look for receipts", lambda: list(new_receipts(self._part, set(receipts)))):
                if receipt.error is None:
                    receipts[receipt.rank] = receipt
                elif receipt.is_final:
                    raise _OtherRankFailedError(receipt)
                elif receipt.error.cause not in told and len(told) < _TOLD_RANKS:
                    told.add(receipt.error.cause)
                    self._record_failure(receipt)
            missing = sorted(set(range(self.request.circumstances.world_size)) - receipts.keys())
            if not missing:
                return receipts
            if time.monotonic() > deadline:
                raise MaskwrightError(
                    f"no receipt of rank {missing[0]} and {len(missing) - 1} others after {self.request.timeout_s:.0f} s",
                    "See that rank's log; storage that not all workers share looks like this, too.",
                )
            self._cancelled.wait(pause_s)
            self._go_on()
            pause_s = min(2 * pause_s, _POLL_S[1])

    def _after(self, manifest: Manifest) -> None:
        """The event, then the removal of what is not kept: what is gone without an event that says so was lost."""
        request, seconds = self.request, time.monotonic() - self._started_at
        doomed = self._not_kept(manifest)
        request.run.append_event(
            "checkpoint_committed",
            attempt=manifest.attempt,
            step=manifest.step,
            name=name_of(manifest.step),
            bytes=manifest.num_bytes,
            seconds=round(request.stall_s + seconds, 3),
            stall_s=round(request.stall_s, 3),
            write_s=round(seconds, 3),
            removed=doomed,
        )
        for step in doomed:
            self._checkpoints.remove(name_of(step), manifest.attempt)

    def _not_kept(self, manifest: Manifest) -> list[int]:
        try:
            return not_kept(self._checkpoints, manifest, self.request.config.checkpoint)
        except Exception:
            log.exception("the checkpoint of step %d is committed, but which old ones to remove is not known", manifest.step)
            return []

    def _give_up(self, failure: Receipt) -> None:
        """Remove what this rank has written and say why; rank 0 removes the folder, once nobody writes into it any more."""
        for name in self.snapshot.sizes:
            with suppress(Exception):
                (self._part / name).remove()
        if not isinstance(failure.error, ConflictError):
            self._tell(failure)
        if self.request.rank == 0:
            with suppress(Exception):
                self._wait_for_others(_CLEAN_UP_S)
                self._part.remove()

    def _wait_for_others(self, timeout_s: float) -> None:
        """Until every rank has ended its part, one way or another."""
        deadline, ended = time.monotonic() + timeout_s, {0}
        while time.monotonic() < deadline:
            ended |= {receipt.rank for receipt in new_receipts(self._part, ended) if receipt.is_final}
            if len(ended) >= self.request.circumstances.world_size:
                return
            time.sleep(_POLL_S[1])


def not_kept(checkpoints: Checkpoints, newest: Manifest, config: CheckpointConfig) -> list[int]:
    """Steps of the committed checkpoints that the configuration does not keep."""
    losses: dict[int, float | None] = {}
    for entry in checkpoints.committed():
        manifest = checkpoints.read(entry.name) if config.keep_best else None
        losses[entry.step] = manifest.validation_loss if isinstance(manifest, Manifest) else None
    return superfluous(losses, newest.step, config)
