"""Which checkpoints are kept: the last, every so many steps, the best; the one just committed always."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import CheckpointConfig
from trainer.retention import committed_by, superfluous

LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 1.5}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, {50}),
        ({"keep_last": 2}, {40, 50}),
        ({"keep_last": 9}, {10, 20, 30, 40, 50}),
        ({"keep_last": 1, "keep_every": 20}, {20, 40, 50}),
        ({"keep_last": 1, "keep_best": True}, {20, 50}),
        ({"keep_last": 2, "keep_every": 30, "keep_best": True}, {20, 30, 40, 50}),
    ],
)
def test_what_is_kept(settings: dict[str, int | bool], kept: set[int]) -> None:
    config = CheckpointConfig.model_validate(settings)
    assert LOSSES.keys() - set(superfluous(LOSSES, 50, config)) == kept


def test_without_a_validation_none_is_the_best() -> None:
    config = CheckpointConfig(keep_last=1, keep_best=True)
    assert superfluous({10: None, 20: math.nan, 30: None}, 30, config) == [10, 20]
    assert superfluous({10: 2.0, 20: 2.0, 30: None}, 30, config) == [10]  # of equal ones the newer


@given(
    committed=st.dictionaries(st.integers(1, 50), st.none() | st.floats(0, 9), min_size=1),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 9),
    keep_best=st.booleans(),
    data=st.data(),
)
def test_the_one_just_committed_is_never_removed(
    committed: dict[int, float | None], keep_last: int, keep_every: int | None, keep_best: bool, data: st.DataObject
) -> None:
    newest = data.draw(st.sampled_from(sorted(committed)))
    gone = superfluous(committed, newest, CheckpointConfig(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best))
    assert newest not in gone
    assert len(committed) - len(gone) >= min(keep_last, len(committed))
    assert gone == sorted(set(gone) & committed.keys())


def event(kind: str, attempt: int, step: int, **details: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "step": step, **details}


def test_what_must_still_be_there_by_the_events() -> None:
    events = [
        event("checkpoint_committed", 1, 10, removed=[]),
        event("checkpoint_committed", 1, 20, removed=[]),
        event("checkpoint_committed", 1, 30, removed=[10]),
        event("resumed", 2, 20),  # went back behind 30
        event("checkpoint_committed", 2, 25, removed=[]),
    ]
    assert committed_by([]) == {}
    assert committed_by(events[:3]) == {20: 1, 30: 1}
    assert committed_by(events) == {20: 1, 25: 2}
    assert committed_by([*events, event("checkpoint_damaged", 3, 25)]) == {20: 1}
    assert committed_by([*events, event("checkpoint_committed", 3, 25, removed=[20])]) == {25: 3}


def test_events_of_older_releases_vouch_for_the_newest_only() -> None:
    events = [event("checkpoint_committed", 1, 10), event("checkpoint_committed", 1, 20)]
    assert committed_by(events) == {20: 1}
    assert committed_by([*events, event("checkpoint_committed", 2, 30, removed=[10])]) == {20: 1, 30: 2}
