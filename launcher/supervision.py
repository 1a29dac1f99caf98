"""The main thread of a run: starts Ray when a stage wants it, shows progress, and obeys stop requests, signals and the lease."""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from data_pipeline.errors import ExitCode, InterruptedRunError, UnreachableError
from launcher.aside import Aside
from launcher.cluster_config import Cluster
from launcher.clusters.local import Machine, Workers
from launcher.clusters.opening import OpenCluster, open_cluster
from launcher.control import GRACE_VARIABLE, Grace, StopRequest, read_stop, request_stop
from launcher.elastic import Pace, Work
from launcher.lease import Lease
from trainer.runlog import RunFolder

T = TypeVar("T")

POLL_S, _EARLY_POLL_S = 0.5, 0.1
"""Between two looks; while Ray is not there, and a stage may wait for it."""
ANSWER_S = 2.0
"""How long the main thread waits for storage at a time: longer than any healthy one takes, and signals are obeyed while a dead one hangs."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEAVE_S = 5.0
"""For a stage at work to let go of Ray before it ends: a call that finds it half gone ends this process. A round of polls of a thousand ranks of
which one is silent takes nearly as long."""
SIGNAL_GRACE_S = 60.0
"""What a run has to save in after a signal, where the environment says nothing else."""


class CtrlCError(InterruptedRunError):
    """Ctrl-C ended the run; it can be resumed."""

    exit_code = ExitCode.CTRL_C


def signal_grace_s() -> float:
    """What a run has to save in after a signal: as whoever started its driver says, who knows how long that may live on."""
    return float(os.environ.get(GRACE_VARIABLE, SIGNAL_GRACE_S))


def nothing_left() -> Sequence[Work]:
    """What remains of a run that is not known."""
    return ()


def never() -> bool:
    """Nobody asks for a stop."""
    return False


@dataclass
class RayOnDemand:
    """Ray, started or joined when a stage first asks. Stages ask on their own thread; it starts on the main one (see `local_cluster`)."""

    config: Cluster
    workers: Workers | None
    """Every worker group of a local cluster; None where each attempt is sized by what there is."""
    machine: Machine
    work: Callable[[], Sequence[Work]] = nothing_left
    """What remains of the run: decides how many ranks pay."""
    stopped: Callable[[], bool] = never
    """Whether somebody wants the run to end."""
    _wanted: threading.Event = field(default_factory=threading.Event)
    _answered: threading.Event = field(default_factory=threading.Event)
    _cluster: OpenCluster | None = None
    _error: BaseException | None = None
    _before_end: Callable[[], object] | None = None

    def scratch(self) -> Path:
        """Wait for Ray and return its scratch folder; raises what starting it raised."""
        return self._open().scratch

    def workers_now(self) -> Workers:
        """The worker group of the next attempt: on a cluster as many ranks as pay, after waiting for the minimum.

        Raises:
            TooFewWorkersError: the cluster has no room for the minimum. InterruptedRunError: the run was asked to stop meanwhile.
        """
        sizing = self._open().sizing if self.workers is None else None
        if sizing is None:
            assert self.workers is not None
            return self.workers
        return sizing.workers_now()

    def larger_workers(self, current: Workers, pace: Pace) -> Workers | None:
        """The worker group worth an interruption of `current`, which is at work; None when there is none. Cheap."""
        sizing = self._open().sizing if self.workers is None else None
        return None if sizing is None else sizing.larger_workers(current, pace)

    def keep_to(self, node_ids: Set[str]) -> None:
        """Place no rank of a later attempt on any other node that is there now."""
        if (sizing := self._open().sizing) is not None:
            sizing.keep_to(node_ids)

    @property
    def is_open(self) -> bool:
        """Whether Ray is there."""
        return self._cluster is not None and self._error is None

    def _open(self) -> OpenCluster:
        self._wanted.set()
        self._answered.wait()
        if self._error is not None:
            raise self._error
        assert self._cluster is not None
        return self._cluster

    def serve(self, stack: ExitStack) -> None:
        """Start Ray if somebody waits for it; `stack` ends it."""
        if not self._wanted.is_set() or self._answered.is_set():
            return
        try:
            self._cluster = stack.enter_context(open_cluster(self.config, self.workers, self.machine, self.work, self.stopped))
        except Exception as error:  # noqa: BLE001  # the stage raises it
            self._error = error
        self._answered.set()

    def require_open(self) -> None:
        """Refuse whoever goes by what has become of workers: they went with Ray. Raises InterruptedRunError."""
        if self._answered.is_set():
            self._open()

    @contextmanager
    def before_end(self, function: Callable[[], object]) -> Generator[None]:
        """For a block that works with workers: `function` is called, on another thread, if Ray is about to end under it.

        Raises:
            InterruptedRunError: it is so already.
        """
        self._before_end = function
        try:
            self.require_open()
            yield
        finally:
            self._before_end = None

    def close(self) -> bool:
        """Call before Ray ends: a stage that is still at work, and sees its workers go, must not start others.

        Returns whether one is at work, and now lets go of Ray.
        """
        self._error = InterruptedRunError("the command that ran this has ended", "Run `maskwright resume`.")
        self._answered.set()
        if (before_end := self._before_end) is None:
            return False
        before_end()
        return True


@dataclass
class _Work(Generic[T]):
    """A function on a thread, and how it ended."""

    function: Callable[[], T]
    result: list[T] = field(default_factory=list)
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result.append(self.function())
        except BaseException as error:  # noqa: BLE001  # raised again on the main thread
            self.error = error


@dataclass
class Supervisor:
    """Runs the stages of a run on a thread and watches over them from the main thread."""

    run: RunFolder
    lease: Lease
    ray: RayOnDemand
    say: Callable[[str], None]
    tick: Callable[[], None]
    saves_on_stop: Callable[[], bool]
    """Whether the present stage saves by itself when asked to stop; other stages are simply ended."""
    _signals: list[int] = field(default_factory=list)
    _signalled_at: float | None = None
    _request: StopRequest | None = None
    """The newest that storage has told of."""
    _grace: Grace = field(default_factory=Grace)
    _ends: bool = False

    def __post_init__(self) -> None:
        self._ticks, self._requests, self._held = Aside(self.tick), Aside(self._find_request), Aside(self.lease.require_held)

    def supervise(self, stages: Callable[[], T]) -> T:
        """Run `stages` to their end, then end Ray. Who asks for a stop when they are done is too late.

        Raises:
            CtrlCError, InterruptedRunError: the run was asked to stop. ConflictError: another command took the run.
            Whatever `stages` raises.
        """
        work = _Work(stages)
        thread = threading.Thread(target=work.run, daemon=True, name="stages")
        try:
            with self._catch_signals(), ExitStack() as stack:
                thread.start()
                try:
                    self._follow(thread, stack)
                finally:
                    self._ends = True
                    if self.ray.close():
                        thread.join(_LEAVE_S)
        except InterruptedRunError:
            if not work.result:
                raise
        if work.error is not None:
            raise self._as_ctrl_c(work.error)
        return work.result[0]

    def _follow(self, thread: threading.Thread, stack: ExitStack) -> None:
        """Serve the stages, show what they do and obey who asks for a stop, until they are done."""
        while thread.is_alive():
            thread.join(POLL_S if self.ray.is_open else _EARLY_POLL_S)
            self.ray.serve(stack)
            self._look(lambda: self._ticks.ask(ANSWER_S))
            self._look(self._obey)
        for _ in range(2):  # the first may be one that began before the end
            self._look(lambda: self._ticks.ask(ANSWER_S))

    def _look(self, at: Callable[[], None]) -> None:
        """Storage or a terminal that fails for a moment must not end a run whose ranks are at work; the next look is soon."""
        with suppress(OSError, UnreachableError):
            at()

    def _obey(self) -> None:
        if self._signals:
            self._obey_signals()
        if self.lease.lost.is_set():
            self._held.ask(ANSWER_S)
        with suppress(OSError, UnreachableError):
            self._request = self._requests.ask(ANSWER_S)
        request = self._request
        if request is None:
            return
        if self._grace.is_over(request) or not self.saves_on_stop():
            raise self._as_ctrl_c(_stopped(request))

    def _obey_signals(self) -> None:
        """The first asks for a stop, by way of storage, and a second Ctrl-C waits for nothing."""
        if self._signals.count(signal.SIGINT) > 1:
            raise CtrlCError("Ctrl-C twice: ended without saving", f"Run `maskwright resume {self.run.root.name}`.")
        if self._request is not None:
            return
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            if self.saves_on_stop():
                self.say(f"{self._signal_name()}: saving what was trained, then stopping (Ctrl-C again ends at once)")
        if time.monotonic() > self._signalled_at + signal_grace_s():
            cause = f"{self._signal_name()}: ended without saving, because storage did not take the request"
            raise self._as_ctrl_c(InterruptedRunError(cause, "Run `maskwright resume`."))

    def _find_request(self) -> StopRequest | None:
        """What somebody has asked for; a signal asks in the same way, so that everybody who looks for a request finds it."""
        request = read_stop(self.run)
        if request is None and self._signals:
            return request_stop(self.run, grace_s=signal_grace_s(), save=True, by=self._signal_name(), lease=self.lease.state.token)
        return request

    def _signal_name(self) -> str:
        return signal.Signals(self._signals[0]).name

    def _as_ctrl_c(self, error: BaseException) -> BaseException:
        interrupted = getattr(error, "exit_code", None) == ExitCode.INTERRUPTED
        if interrupted and signal.SIGINT in self._signals:
            return CtrlCError(getattr(error, "cause", str(error)), getattr(error, "remedy", ""))
        return error

    @contextmanager
    def _catch_signals(self) -> Generator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            del frame
            self._signals.append(number)
            if self._ends:  # Ray does, which may hang: the next signal ends the command
                signal.signal(number, signal.SIG_DFL)
            if number == signal.SIGHUP:
                _leave_terminal()

        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
            before = {number: signal.signal(number, note) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave_terminal() -> None:
    """The terminal is gone or going, and what is written to it would fail; the run's own records stay."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        try:
            gone = os.isatty(descriptor) or os.write(descriptor, b"") < 0
        except OSError:
            gone = True
        if gone:
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _stopped(request: StopRequest) -> InterruptedRunError:
    how = "without saving" if not request.save else "between checkpoints"
    return InterruptedRunError(f"stopped {how}, asked by {request.by}", "Run `maskwright resume`.")
