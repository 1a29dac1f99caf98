"""The rules of numeric trouble."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import NumericsConfig
from trainer.numerics import Trouble, TroubleHistory, continuity, is_spike, loss_trouble, response, rewind_target, with_loss
from trainer.state import TrainState

LOSSES = st.lists(st.floats(0, 20), min_size=16, max_size=64)


def watching(threshold: float = 6.0, window: int = 32) -> NumericsConfig:
    return NumericsConfig(spike_threshold=threshold, spike_window=window)


@given(LOSSES, st.floats(1, 20), st.randoms(use_true_random=False))
def test_a_spike_is_far_above_the_median_whatever_the_order(losses: list[float], threshold: float, shuffler: random.Random) -> None:
    config = watching(threshold)
    median = statistics.median(losses)
    spread = statistics.median(abs(loss - median) for loss in losses)
    shuffled = losses[:]
    shuffler.shuffle(shuffled)
    for loss in (0.0, median, median + spread, median + 1.4 * threshold * spread, median + 1.6 * threshold * spread + 1e-6, 1e6):
        assert is_spike(loss, losses, config) == is_spike(loss, shuffled, config)
    assert not is_spike(median, losses, config)
    assert not is_spike(median + 1.4 * threshold * spread, losses, config)
    assert is_spike(median + 1.6 * threshold * spread + 1e-6, losses, config)


@given(st.lists(st.floats(1, 2), min_size=16, max_size=32), st.lists(st.floats(0, 1e9), max_size=7))
def test_some_wild_losses_in_the_window_do_not_hide_a_spike(losses: list[float], wild: list[float]) -> None:
    """Less than a third of the window may be anything: median and MAD stay within those of the rest, stretched by a bounded amount."""
    assert is_spike(100.0, losses + wild, watching(threshold=10.0)), "1 <= median <= 2, MAD <= 1"


@given(LOSSES)
def test_nothing_is_a_spike_where_nobody_asks_or_too_early(losses: list[float]) -> None:
    assert not is_spike(1e9, losses, NumericsConfig())
    assert not is_spike(1e9, losses[:15], watching())


@given(st.lists(st.floats(0, 20), max_size=100), st.integers(8, 64))
def test_the_window_holds_the_newest_losses_and_survives_a_checkpoint(losses: list[float], window: int) -> None:
    recent: tuple[float, ...] = ()
    for loss in losses:
        recent = with_loss(recent, loss, watching(window=window))
    assert recent == tuple(losses[-window:])
    state = TrainState(step=3, recent_losses=recent)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert with_loss(recent, 1.0, NumericsConfig()) == (1.0,)


def test_a_loss_that_is_not_finite_is_trouble_at_any_time() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        assert loss_trouble(loss, (), NumericsConfig()) == "non_finite_loss"
    assert loss_trouble(9.0, [1.0, 2.0] * 20, watching()) == "loss_spike"
    assert loss_trouble(2.5, [1.0, 2.0] * 20, watching()) is None


def test_policies() -> None:
    none, rewound, skipped = TroubleHistory(), TroubleHistory(rewound=(7,)), TroubleHistory(frozenset([7]), (7,))
    stop, skip, rewind = (NumericsConfig(policy=policy) for policy in ("stop", "skip_batch", "rewind:2"))
    assert [response(7, "non_finite_loss", stop, history) for history in (none, rewound, skipped)] == ["stop"] * 3
    assert [response(7, "non_finite_loss", skip, history) for history in (none, rewound, skipped)] == ["skip"] * 3
    assert [response(7, "non_finite_loss", rewind, history) for history in (none, rewound, skipped)] == ["rewind", "skip", "skip"]
    assert response(9, "non_finite_loss", rewind, skipped) == "rewind"
    assert response(8, "loss_spike", rewind, skipped) == "rewind"
    assert response(8, "non_finite_gradients", rewind, skipped) == "stop"  # the weights that failed on batch 7 fail on batch 8
    assert response(8, "non_finite_loss", skip, skipped) == "skip"


def test_bad_weights_are_rewound_once_and_never_skipped() -> None:
    none, rewound = TroubleHistory(), TroubleHistory(rewound=(7,))
    found = {policy: response(7, "non_finite_weights", NumericsConfig(policy=policy), none) for policy in ("stop", "skip_batch", "rewind:2")}
    assert found == {"stop": "stop", "skip_batch": "stop", "rewind:2": "rewind"}
    assert response(7, "non_finite_weights", NumericsConfig(policy="rewind:2"), rewound) == "stop"
    assert response(8, "non_finite_weights", NumericsConfig(policy="rewind:2", budget=1), rewound) == "stop"


def test_the_budget_counts_skips_and_rewinds_but_not_a_skip_that_is_repeated() -> None:
    config = NumericsConfig(policy="rewind:1", budget=2)
    spent = TroubleHistory(frozenset([7]), (7,))
    assert spent.spent == 2
    assert response(8, "non_finite_loss", config, spent) == "stop"
    assert response(7, "non_finite_loss", config, spent) == "skip"
    assert response(7, "non_finite_loss", NumericsConfig(policy="rewind:1", budget=0), TroubleHistory()) == "stop"


def test_history_is_read_from_events() -> None:
    def event(kind: str, attempt: int, step: int, **details: object) -> dict[str, object]:
        return {"kind": kind, "attempt": attempt, "step": step, **details}

    events = [
        event("checkpoint_committed", 1, 5),
        event("numeric_trouble", 1, 7, response="rewind", rewind_to=5),
        event("checkpoint_committed", 1, 10),  # was in flight when the trouble struck
    ]
    assert TroubleHistory.of(events) == TroubleHistory(rewound=(7,), resume_before=5)
    assert TroubleHistory.of([*events, event("attempt_started", 2, 0)]).resume_before == 5, "it died before it had resumed"
    events += [event("resumed", 2, 5)]
    assert TroubleHistory.of(events) == TroubleHistory(rewound=(7,))
    events += [event("numeric_trouble", 2, 7, response="skip", rewind_to=None), event("batch_skipped", 2, 7)]
    assert TroubleHistory.of(events) == TroubleHistory(frozenset([7]), (7,))
    from_the_start = [event("numeric_trouble", 1, 2, response="rewind", rewind_to=0)]
    assert TroubleHistory.of(from_the_start).resume_before == 0
    assert TroubleHistory.of([*from_the_start, event("checkpoint_committed", 2, 5)]).resume_before is None


@pytest.mark.parametrize(("step", "checkpoints", "target"), [(12, 1, 10), (12, 2, 5), (10, 1, 10), (9, 1, 5), (12, 9, 5), (4, 1, 0)])
def test_the_checkpoint_to_rewind_to(step: int, checkpoints: int, target: int) -> None:
    assert rewind_target([15, 5, 10], step, checkpoints) == target


def test_trouble_says_what_is_wrong() -> None:
    assert str(Trouble(7, "loss_spike", 11.25, (28, 31))) == "the loss of step 7 is a spike (11.25)"
    assert str(Trouble(7, "non_finite_loss", math.inf, (28, 31))) == "the loss of step 7 is not finite (inf)"
    assert "gradients of step 7 are not finite" in str(Trouble(7, "non_finite_gradients", math.inf, (28, 31)))


def test_policy_names() -> None:
    assert [NumericsConfig(policy=policy).rewind_checkpoints for policy in ("stop", "skip_batch", "rewind:12")] == [None, None, 12]
    for policy in ("rewind", "rewind:0", "rewind: 1", "skip"):
        with pytest.raises(ValidationError):
            NumericsConfig(policy=policy)


def test_the_first_loss_after_a_resume_is_compared() -> None:
    assert continuity(2.5, 2.5, 9.0) == {"loss": 2.5, "loss_before": 2.5, "same_step": True, "relative_difference": 0.0}
    assert continuity(2.0, None, 4.0) == {"loss": 2.0, "loss_before": 4.0, "same_step": False, "relative_difference": 0.5}
    for nothing in (continuity(2.0, None, None), continuity(None, 2.0, 1.0)):
        assert nothing["relative_difference"] is None
