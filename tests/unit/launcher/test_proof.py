"""The proof panel: a run's records against its corpus, honest and forged."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import BatchConfig, ObjectiveConfig, PhaseConfig
from data_pipeline.inspection import inspect_steps
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream
from launcher import proof
from launcher.history import History
from launcher.proof import Proof, batch_digests, prove, steps_to_check
from tests.support.corpus import small_corpus

STEPS = 12
PHASES = BatchConfig(
    global_batch_size=8, micro_batch_size=4, sequence_length=32, phases=(PhaseConfig(from_step=6, global_batch_size=16),)
).phases_until(STEPS)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> MicroBatchStream:
    mixture = Mixture.open(Location.at(small_corpus(tmp_path_factory.mktemp("proof"))))
    return MicroBatchStream(mixture, ObjectiveConfig(), PHASES, seed=3)


@pytest.fixture(scope="module")
def digests(stream: MicroBatchStream) -> list[str]:
    """What two ranks see."""
    return [batch["digest"] for batch in inspect_steps(stream, PHASES, 0, STEPS, 2, None)]


def resumed(attempt: int, step: int) -> dict[str, Any]:
    return {"time": 0.0, "kind": "resumed", "attempt": attempt, "step": step}


def records(digests: list[str], *attempts: tuple[int, range]) -> list[dict[str, Any]]:
    return [{"step": step, "attempt": attempt, "batch_digest": digests[step]} for attempt, steps in attempts for step in steps]


def proven(stream: MicroBatchStream | None, found: list[dict[str, Any]], *events: dict[str, Any], all_steps: bool = False) -> Proof:
    return prove(History.of(found, events), events, PHASES, stream, all_steps=all_steps, why="the corpus is gone")


def test_a_run_that_lost_steps_and_repeated_them_is_proven(stream: MicroBatchStream, digests: list[str]) -> None:
    found = proven(stream, records(digests, (1, range(8)), (2, range(5, 12))), resumed(2, 5))
    assert found == Proof(12, 0, 0, (), 0, 12, (), "")
    assert found.holds
    assert found.verdict() == (
        "micro-batches repeated 0, skipped 0 in the 12 steps of the surviving history; 12 of 12 batches computed anew from the corpus, all the same"
    )


def test_another_batch_is_found(stream: MicroBatchStream, digests: list[str]) -> None:
    forged = records(digests, (1, range(12)))
    forged[7]["batch_digest"] = digests[8]
    found = proven(stream, forged)
    assert (found.different, found.holds) == ((7,), False)
    assert "1 DIFFER: steps 7" in found.verdict()


def test_a_resume_one_step_too_late_skips_and_one_too_early_repeats(stream: MicroBatchStream, digests: list[str]) -> None:
    late = proven(stream, records(digests, (1, range(8)), (2, range(7, 12))), resumed(2, 6))
    assert (late.repeated, late.skipped, late.wrong_steps, late.holds) == (0, 4, (6,), False)
    early = proven(stream, records(digests, (1, range(8)), (2, range(4, 12))), resumed(2, 5))
    assert (early.repeated, early.skipped, early.wrong_steps, early.holds) == (2, 0, (4,), False)


def test_deliberate_skips_are_listed_apart(stream: MicroBatchStream, digests: list[str]) -> None:
    kept = [record for record in records(digests, (1, range(12))) if record["step"] != 3]
    event = {"time": 0.0, "kind": "batch_skipped", "attempt": 1, "step": 3}
    found = proven(stream, kept, event)
    assert (found.skipped, found.deliberate, found.checked, found.holds) == (0, 1, 11, True)


def test_without_a_corpus_or_digests_nothing_is_proven(stream: MicroBatchStream, digests: list[str]) -> None:
    found = proven(None, records(digests, (1, range(12))))
    assert (found.repeated, found.skipped, found.checked, found.holds) == (0, 0, 0, False)
    assert "batches were not compared: the corpus is gone" in found.verdict()
    assert not proven(stream, records([""] * 12, (1, range(12)))).holds


def test_a_long_run_is_sampled_evenly_and_around_resumes(stream: MicroBatchStream, digests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_to_check(1_000_000, 8, [400_001])
    assert (steps[0], steps[-1]) == (0, 999_999)
    assert {399_999, 400_000, 400_001, 400_002, 400_003} <= set(steps)
    assert len(steps) == 250 + 5
    assert len(steps_to_check(1_000_000, 3_000, range(1000, 90_000, 1000))) == 3 + 5, "a report must not hold a thousand GPUs for an hour"
    monkeypatch.setattr(proof, "ALL_UP_TO_SAMPLES", 0)
    monkeypatch.setattr(proof, "_MOST", 3)
    monkeypatch.setattr(proof, "_FEWEST", 3)
    assert proven(stream, records(digests, (1, range(12)))).checked == 3
    assert proven(stream, records(digests, (1, range(12))), all_steps=True).checked == 12


def test_lanes_in_groups_add_up(stream: MicroBatchStream, digests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_LANES_AT_ONCE", 3)
    assert [f"{digest:016x}" for digest in batch_digests(stream, PHASES, range(STEPS)).values()] == digests


def test_steps_beyond_the_configured_end_are_no_part_of_it(stream: MicroBatchStream, digests: list[str], tmp_path: Path) -> None:
    found = proven(stream, records([*digests, "1"], (1, range(13))))
    assert (found.steps, found.holds) == (12, True)
