"""Stop requests, left in the run folder for whoever drives the run (reads and writes the run folder)."""

import time
from dataclasses import asdict, dataclass, field

from data_pipeline.errors import NotFoundError
from trainer.runlog import RunFolder

GRACE_VARIABLE = "MASKWRIGHT_GRACE_S"
"""In the environment of a driver: seconds that it has to save in when a signal tells it to end."""


@dataclass(frozen=True)
class StopRequest:
    """Somebody wants the run to end."""

    time: float
    grace_s: float
    save: bool
    by: str
    lease: str = ""
    """Token of the lease whose holder is asked."""

    @property
    def allowed_s(self) -> float:
        """Seconds to save in."""
        return self.grace_s if self.save else 0.0

    @property
    def by_signal(self) -> bool:
        """Whether no person asked by a verb, but whoever sent the driver a signal."""
        return is_signal(self.by)


def is_signal(by: str) -> bool:
    """Whether that is how a signal is called, and no verb."""
    return by.startswith("SIG")


@dataclass
class Grace:
    """Counts a request's seconds from when its driver first sees it: the clock of who asks may be another machine's."""

    _seen_at: dict[StopRequest, float] = field(default_factory=dict[StopRequest, float])

    def is_over(self, request: StopRequest) -> bool:
        """Whether everything has to end now, saved or not."""
        seen_at = self._seen_at.setdefault(request, time.monotonic())
        return time.monotonic() - seen_at >= request.allowed_s


def request_stop(run: RunFolder, *, grace_s: float, save: bool, by: str, lease: str) -> StopRequest:
    """Ask the run to save (unless `save` is False) and end within `grace_s` seconds."""
    request = StopRequest(time.time(), grace_s, save, by, lease)
    run.stop_request.write_json(asdict(request))
    return request


def read_stop(run: RunFolder) -> StopRequest | None:
    """The pending request; None when nobody asks."""
    try:
        return StopRequest(**run.stop_request.read_json())
    except (NotFoundError, ValueError, TypeError):
        return None


def clear_stop(run: RunFolder, lease: str) -> None:
    """Forget a request addressed to an earlier driver; one to the holder of `lease`, which has hardly begun, stays."""
    request = read_stop(run)
    if request is None or request.lease != lease:
        run.stop_request.remove()
