"""A real corpus, two epochs, three world sizes, ranks killed at a random step: every chunk is used exactly once an epoch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.chunks import cut_chunks
from data_pipeline.config import BatchConfig, CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.order import lane_bounds
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location
from tests.support.ledger import digest

pytestmark = pytest.mark.full

LENGTH = 64
BATCH = BatchConfig(global_batch_size=96, micro_batch_size=16, sequence_length=LENGTH)
LANES = 6


@pytest.fixture(scope="module", params=[2_500, pytest.param(20_000, marks=pytest.mark.timeout(400))])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CorpusIndex:
    corpus = CorpusConfig(source="python-docs", max_documents=request.param)
    storage = Location.at(tmp_path_factory.mktemp("ledger"))
    return CorpusIndex.open(prepare(corpus, TokenizerConfig(vocab_size=4096), (LENGTH,), storage, InProcessExecutor(), lambda _: None).folder)


class Attempt:
    """`world_size` ranks in processes of their own, from `first_step` on."""

    def __init__(self, index: CorpusIndex, folder: Path, steps: int, first_step: int, world_size: int, workers: int) -> None:
        self.ledgers = [folder / f"{first_step:05d}-{world_size}-{rank}.jsonl" for rank in range(world_size)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, ledger in enumerate(self.ledgers):
            settings = {
                "corpus": str(index.folder), "batch": BATCH.model_dump(), "steps": steps, "first_step": first_step,
                "rank": rank, "world_size": world_size, "workers": workers, "ledger": str(ledger),
            }  # fmt: skip
            command = [sys.executable, "-m", "tests.support.ledger", json.dumps(settings)]
            self.processes.append(subprocess.Popen(command, start_new_session=True))

    def kill_after(self, step: int) -> int:
        """SIGKILL all ranks once they have passed `step`; return the first step that some rank has not completed."""
        try:
            deadline = time.monotonic() + 90
            while min(map(self._completed, self.ledgers)) <= step:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            self.kill()
        return min(map(self._completed, self.ledgers))

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self) -> None:
        try:
            assert [process.wait(90) for process in self.processes] == [0] * len(self.processes)
        finally:
            self.kill()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for ledger in self.ledgers for line in _lines(ledger)]

    @staticmethod
    def _completed(ledger: Path) -> int:
        lines = _lines(ledger)
        return json.loads(lines[-1])["step"] + 1 if lines else 0


def _lines(ledger: Path) -> list[str]:
    text = ledger.read_text() if ledger.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def test_every_chunk_once_an_epoch_through_kills_and_other_world_sizes(index: CorpusIndex, tmp_path: Path) -> None:
    num_samples = index.num_samples("train", LENGTH)
    steps = 2 * num_samples // BATCH.global_batch_size + 2  # two epochs and a little
    seed = int(os.environ.get("MASKWRIGHT_KILL_SEED", random.randrange(10**6)))
    generator = random.Random(seed)
    print(f"MASKWRIGHT_KILL_SEED={seed}, {num_samples} chunks, {steps} steps")

    surviving: dict[int, list[str]] = {}
    first_step = 0
    for world_size, share, workers in [(2, 0.2, 0), (4, 0.6, 1), (3, 1.0, 0)]:
        attempt = Attempt(index, tmp_path, steps, first_step, world_size, workers)
        if share < 1:
            done = attempt.kill_after(generator.randrange(max(first_step, int((share - 0.15) * steps)), int(share * steps)))
            after = done - generator.randrange(min(done - first_step, 10))  # resumed from the last checkpoint, a few steps back
        else:
            attempt.wait()
            after = steps
        for record in attempt.records():
            if record["step"] < after:
                assert not surviving.keys() & {int(number) for number in record["seen"]}
                surviving |= {int(number): seen for number, seen in record["seen"].items()}
        first_step = after

    assert sorted(surviving) == list(range(steps * LANES))
    expected = _chunks(index)
    for epoch in (0, 1):
        seen: Counter[str] = Counter()
        for lane in range(LANES):
            low, high = lane_bounds(num_samples, LANES, lane)
            stream = [chunk for number in range(lane, steps * LANES, LANES) for chunk in surviving[number]]
            seen.update(stream[epoch * (high - low) : (epoch + 1) * (high - low)])
        assert seen == expected


def _chunks(index: CorpusIndex) -> Counter[str]:
    chunks: Counter[str] = Counter()
    for record in index.blocks("train"):
        block = index.read_block(record)
        cut = cut_chunks(block.sentence_ends, block.document_ends, LENGTH)
        bounds = zip(cut.token_start(cut.first_piece), cut.token_start(cut.stop_piece), strict=True)
        chunks.update(digest(block.ids[start:stop].astype("<u4").tobytes()) for start, stop in bounds)
    assert sum(chunks.values()) == index.num_samples("train", LENGTH)
    return chunks
