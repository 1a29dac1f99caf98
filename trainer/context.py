"""What the trainer needs from whoever runs it: `RunContext`, implemented on Ray by the launcher (pure)."""

from typing import Protocol


class RunContext(Protocol):
    """One rank's view of the job that runs it. torch.distributed is initialised before the trainer is called."""

    @property
    def rank(self) -> int:
        """This rank, 0 .. world_size-1."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def stop_requested(self) -> bool:
        """Whether the run should save and end (stop, SIGTERM, drain). Cheap: called at every step boundary."""
        ...

    def heartbeat(self, step: int, phase: str) -> None:
        """Say where this rank is. Cheap: called several times a step.

        `phase` is set-up, data, agree (waiting for the other ranks' counts or losses), forward, backward, reduce, optimizer, checkpoint,
        validation or trace (a profile is gathered and written). Ranks say the same things in the same order, so that who is behind can be
        told; said again within a long phase, it is progress.
        """
        ...

    def require_current(self) -> None:
        """Look whether this attempt still is the newest of the run; asked before anything is committed (R10).

        Raises:
            ConflictError: a newer attempt has taken over; this one must not write any more.
        """
        ...


class ForwardingContext:
    """A context that passes everything on to another; who is told of phases overrides `heartbeat`."""

    def __init__(self, context: RunContext) -> None:
        self.rank = context.rank
        self.world_size = context.world_size
        self._context = context

    def stop_requested(self) -> bool:
        """See `RunContext.stop_requested`."""
        return self._context.stop_requested()

    def heartbeat(self, step: int, phase: str) -> None:
        """See `RunContext.heartbeat`."""
        self._context.heartbeat(step, phase)

    def require_current(self) -> None:
        """See `RunContext.require_current`."""
        self._context.require_current()


class LocalContext:
    """A context for tests and single processes: never stops, says nothing."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    def stop_requested(self) -> bool:
        return False

    def heartbeat(self, step: int, phase: str) -> None:
        del step, phase

    def require_current(self) -> None:
        """Nobody else drives what a test drives."""
