"""Contexts for tests of the trainer."""

from trainer.context import LocalContext


class StoppingContext(LocalContext):
    """Asks for a stop before step `at`; on the last rank only, so that the ranks have to agree."""

    def __init__(self, rank: int, world_size: int, at: int) -> None:
        super().__init__(rank, world_size)
        self.at = at
        self.step = 0

    def heartbeat(self, step: int, phase: str) -> None:
        self.step = step

    def stop_requested(self) -> bool:
        return self.rank == self.world_size - 1 and self.step >= self.at
