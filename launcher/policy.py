"""What to do after a failed attempt (pure): retry infrastructure within a budget, never what would fail the same way again."""

from dataclasses import dataclass
from enum import Enum

from data_pipeline.errors import ExitCode, MaskwrightError, RetriesSpentError


class FailureKind(Enum):
    """Who is to blame for the end of an attempt; each kind has a budget of its own."""

    INFRASTRUCTURE = "infrastructure"
    """A worker, node or connection was lost: another attempt can succeed."""
    KNOWN = "known"
    """An error with a cause and a remedy (configuration, storage, data, divergence): another attempt fails alike."""
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

    def to_error(self) -> MaskwrightError:
        """The failure as an exception that carries its own exit code."""
        error = MaskwrightError(self.cause, self.remedy)
        error.exit_code = self.exit_code
        return error


@dataclass(frozen=True)
class History:
    """Attempts of one `run` or `resume` command so far."""

    infrastructure_failures: int = 0
    """Including the one being decided."""
    failures_without_progress: int = 0
    """Infrastructure failures in a row since the newest committed checkpoint last moved, including this one."""

    def after(self, failure: Failure, *, progressed: bool) -> "History":
        """The history with one more failed attempt; `progressed` when it committed a checkpoint."""
        if failure.kind is not FailureKind.INFRASTRUCTURE:
            return self
        return History(self.infrastructure_failures + 1, 1 if progressed else self.failures_without_progress + 1)


@dataclass(frozen=True)
class Retry:
    """Start another attempt after `delay_s` seconds."""

    delay_s: float


@dataclass(frozen=True)
class GiveUp:
    """End the run with `error`."""

    error: MaskwrightError


MAX_FAILURES_WITHOUT_PROGRESS = 3
"""A run whose newest checkpoint has not moved in so many restarts stops, whatever its budget."""


def decide(failure: Failure, history: History, max_failures: int) -> Retry | GiveUp:
    """Retry infrastructure failures within `max_failures`; everything else ends the run with its own error."""
    if failure.kind is not FailureKind.INFRASTRUCTURE:
        return GiveUp(failure.to_error())
    if history.infrastructure_failures > max_failures:
        return GiveUp(
            RetriesSpentError(
                f"{history.infrastructure_failures} infrastructure failures, more than max_failures {max_failures}; the last: {failure.cause}",
                "Look at the machines, then `maskwright resume` continues from the newest checkpoint.",
            )
        )
    if history.failures_without_progress > MAX_FAILURES_WITHOUT_PROGRESS:
        return GiveUp(
            RetriesSpentError(
                f"no new checkpoint in {MAX_FAILURES_WITHOUT_PROGRESS} restarts; the last failure: {failure.cause}",
                "Commit checkpoints more often (checkpoint.every_steps) or repair what kills the workers, then `maskwright resume`.",
            )
        )
    return Retry(delay_s=min(30.0, 2.0 ** (history.failures_without_progress - 1) - 1.0))
