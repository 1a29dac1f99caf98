"""What to do after a failed attempt (pure): retry what another attempt can cure, each kind within its own budget, never what would fail alike."""

from dataclasses import dataclass, replace
from enum import Enum

from data_pipeline.errors import ExitCode, InterruptedRunError, MaskwrightError, RetriesSpentError


class FailureKind(Enum):
    """Who is to blame for the end of an attempt; each kind has a budget of its own."""

    INFRASTRUCTURE = "infrastructure"
    """A worker, node or connection was lost, stopped or hung: another attempt can succeed."""
    PREEMPTION = "preemption"
    """A node was taken away, as announced: another attempt can succeed where there are others."""
    NUMERIC = "numeric"
    """Numeric trouble whose policy wants another attempt from an earlier checkpoint."""
    GROWTH = "growth"
    """The cluster has grown: the attempt has saved, and the next has more ranks. Not a failure."""
    DATA = "data"
    """Text, shards or an index that are damaged: they stay so."""
    KNOWN = "known"
    """An error with a cause and a remedy (configuration, storage, divergence): another attempt fails alike."""
    INTERRUPTED = "interrupted"
    """Somebody asked the run to stop, and it saved."""
    BUG = "bug"
    """An exception nobody foresaw: deterministic code raises it again."""


@dataclass(frozen=True)
class Failure:
    """How an attempt ended, as seen by the driver."""

    kind: FailureKind
    cause: str
    remedy: str
    exit_code: ExitCode
    rank: int | None = None
    traceback: str = ""
    """Of a rank's exception, or what Ray said of a rank that died: for the log."""
    node: str | None = None
    """Host of the rank, where known; likewise what it was at."""
    phase: str | None = None
    step: int | None = None

    def to_error(self) -> MaskwrightError:
        """The failure as an exception that carries its own exit code."""
        error = MaskwrightError(self.cause, self.remedy)
        error.exit_code = self.exit_code
        return error


@dataclass(frozen=True)
class Budgets:
    """How many failures of each kind that another attempt can cure are retried (of machines: in any WINDOW_S); other kinds have none."""

    infrastructure: int
    preemption: int
    numeric: int

    def of(self, kind: FailureKind) -> int | None:
        """The budget of a kind; None where another attempt fails alike."""
        return {
            FailureKind.INFRASTRUCTURE: self.infrastructure,
            FailureKind.PREEMPTION: self.preemption,
            FailureKind.NUMERIC: self.numeric,
        }.get(kind)


def blame_newcomers(failure: Failure, last: Failure | None, *, progressed: bool) -> Failure | None:
    """The failure as one of the nodes that came with growth: the ranks before them had no such trouble. None when they are not to blame.

    A node that comes may lack a mount or have other packages: a rank there fails by an error that would else end the run, or the group
    never starts. The loss of a rank is no such thing.
    """
    if last is None or last.kind is not FailureKind.GROWTH or progressed:
        return None
    never_started = failure.kind is FailureKind.INFRASTRUCTURE and failure.rank is None
    if failure.kind not in {FailureKind.KNOWN, FailureKind.BUG} and not never_started:
        return None
    return replace(failure, kind=FailureKind.INFRASTRUCTURE, cause=f"{failure.cause} (since nodes have come, which are left out now)")


WINDOW_S = 24 * 3600.0
"""Failures of machines that lie further back no longer count: a budget is a rate, so that a long run may lose nodes now and then (as YARN's
`attempt-failures-validity-interval` and Flink's failure-rate restarts have it)."""

_OF_MACHINES = {FailureKind.INFRASTRUCTURE, FailureKind.PREEMPTION}


@dataclass(frozen=True)
class History:
    """Failed attempts of one `run` or `resume` command, as far as they count."""

    failures: tuple[tuple[FailureKind, float], ...] = ()
    """Each with its instant in seconds, by a clock that only goes forward; including the one being decided."""
    without_progress: int = 0
    """Failures in a row since the newest committed checkpoint last moved, including this one."""

    def after(self, failure: Failure, at_s: float, *, progressed: bool) -> "History":
        """The history with one more failed attempt, which ended at `at_s`; `progressed` when it committed a checkpoint."""
        if failure.kind is FailureKind.GROWTH:
            return self
        recent = [(kind, then_s) for kind, then_s in self.failures if kind not in _OF_MACHINES or at_s - then_s <= WINDOW_S]
        return History((*recent, (failure.kind, at_s)), 1 if progressed else self.without_progress + 1)

    def count(self, kind: FailureKind) -> int:
        """Failures of a kind that count."""
        return sum(each is kind for each, _ in self.failures)


@dataclass(frozen=True)
class Retry:
    """Start another attempt after `delay_s` seconds."""

    delay_s: float


@dataclass(frozen=True)
class GiveUp:
    """End the run with `error`."""

    error: MaskwrightError


MAX_FAILURES_WITHOUT_PROGRESS = 3
"""A run whose newest checkpoint has not moved in so many restarts stops, whatever its budgets."""


def decide(failure: Failure, history: History, budgets: Budgets) -> Retry | GiveUp:
    """Retry within the budget of the failure's kind, and while checkpoints move; everything else ends the run with its own error."""
    if failure.kind is FailureKind.GROWTH:
        return Retry(0.0)
    budget = budgets.of(failure.kind)
    if budget is None:
        return GiveUp(failure.to_error())
    if history.count(failure.kind) > budget:
        return GiveUp(_spent(failure, history.count(failure.kind), budget))
    if history.without_progress > MAX_FAILURES_WITHOUT_PROGRESS:
        return GiveUp(
            RetriesSpentError(
                f"no new checkpoint in {MAX_FAILURES_WITHOUT_PROGRESS} restarts; the last failure: {failure.cause}",
                "Commit checkpoints more often (checkpoint.every_steps) or repair what kills the workers, then `maskwright resume`.",
            )
        )
    if failure.kind is not FailureKind.INFRASTRUCTURE:
        return Retry(0.0)
    return Retry(delay_s=min(30.0, 2.0 ** (history.without_progress - 1) - 1.0))


def _spent(failure: Failure, count: int, budget: int) -> MaskwrightError:
    """What a run ends with that has had more failures of a kind than its budget: each in its own way."""
    if failure.kind is FailureKind.PREEMPTION:
        return InterruptedRunError(failure.cause, "Run `maskwright resume` when there are machines again.")
    if failure.kind is FailureKind.NUMERIC:
        return failure.to_error()
    return RetriesSpentError(
        f"{count} infrastructure failures in {WINDOW_S / 3600:.0f} hours, more than max_failures {budget}; the last: {failure.cause}",
        "Look at the machines, then `maskwright resume` continues from the newest checkpoint.",
    )
