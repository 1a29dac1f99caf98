"""A save that fails on one rank while the others are inside DeepSpeed's collectives."""

import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import MaskwrightError
from tests.support.checkpoints import run_config, run_folder
from tests.support.neighbours import Neighbours, Table
from trainer.context import LocalContext
from trainer.saving import Saver
from trainer.state import TrainState


class Engine:
    """Rank 0 waits in a collective for rank 1, which has no memory left."""

    def __init__(self, rank: int, over: threading.Event) -> None:
        self._rank, self._over = rank, over

    def snapshot(self, into: Any) -> None:
        if self._rank == 1:
            raise MemoryError("no room for a copy")
        self._over.wait(30)
        raise RuntimeError("connection closed by peer")


def save(rank: int, root: Path, table: Table, over: threading.Event) -> None:
    saver = Saver(run_folder(root), run_config(1), LocalContext(rank, 2), 1, None)
    saver._ranks = Neighbours(rank, table)
    engine: Any = Engine(rank, over)
    saver.save(engine, TrainState(step=5))


def test_a_rank_that_cannot_copy_its_part_does_not_wait_for_those_that_wait_for_it(tmp_path: Path) -> None:
    """It raises, which ends the group; the agreement of all ranks would never come about."""
    table, over = Table(2), threading.Event()

    def wait() -> None:
        with pytest.raises(MaskwrightError, match="connection closed by peer"):
            save(0, tmp_path, table, over)

    other = threading.Thread(target=wait)
    other.start()
    try:
        with pytest.raises(MaskwrightError, match="rank 1 could not copy its part of the checkpoint: MemoryError: no room for a copy"):
            save(1, tmp_path, table, over)
        assert not over.is_set()
        assert other.is_alive()
    finally:
        over.set()
        other.join(30)
