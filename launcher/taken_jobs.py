"""What clusters that take jobs have in common: the request for a job, and what they tell of it (pure)."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

R_contra = TypeVar("R_contra", contravariant=True)


@dataclass(frozen=True)
class JobState:
    """What a cluster knows of a job."""

    state: Literal["waiting", "running", "ended", "unknown"]
    was_stopped: bool = False
    was_lost: bool = False
    """Ended by the cluster, as for its time limit; nothing is wrong with the command."""
    exit_code: int | None = None
    """Of its command, if that has ended by itself."""
    message: str = ""
    """What its command has printed last; of one that waits, why."""

    @property
    def is_alive(self) -> bool:
        """Whether something may still come of it."""
        return self.state in {"waiting", "running"}


class Request(Protocol):
    """A job as its cluster is asked for it."""

    @property
    def artefact(self) -> str | None:
        """The file that the cluster is given, such as a script; None where it is given the words of `to_json`."""
        ...

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        ...


class Jobs(Protocol[R_contra]):
    """The jobs of a cluster that answers. Every method raises UnreachableError when it does not."""

    @property
    def place(self) -> str:
        """Where it is, for people."""
        ...

    def post(self, request: R_contra, package: bytes) -> None:
        """Hand a job over, with our packages."""
        ...

    def look(self, job: str) -> JobState:
        """What became of a job."""
        ...

    def log(self, job: str) -> str:
        """Everything that the job's command has printed."""
        ...

    def end(self, job: str) -> None:
        """End a job: its command is given time to save."""
        ...
