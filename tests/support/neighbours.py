"""Ranks that are threads of this process and agree without a process group."""

import threading
from dataclasses import dataclass, field
from typing import Any

from trainer.agreement import Ranks


@dataclass
class Table:
    """Where threads put their words, and wait for each other's."""

    world_size: int
    words: dict[int, Any] = field(default_factory=dict[int, Any])

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world_size)


class Neighbours(Ranks):
    """The rank of a thread."""

    def __init__(self, rank: int, table: Table) -> None:
        super().__init__(rank, table.world_size, None, 60.0)
        object.__setattr__(self, "table", table)

    def _gather(self, outcome: Any, what: str, original: Exception | None) -> list[Any]:
        table: Table = self.table
        table.words[self.rank] = outcome
        table.barrier.wait(60)
        heard = [table.words[rank] for rank in range(table.world_size)]
        table.barrier.wait(60)
        return heard
