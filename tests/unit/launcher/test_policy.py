"""The retry policy: each kind that another attempt can cure within its own budget, the rest never."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ExitCode, InterruptedRunError, RetriesSpentError
from launcher.policy import MAX_FAILURES_WITHOUT_PROGRESS, WINDOW_S, Budgets, Failure, FailureKind, GiveUp, History, Retry, blame_newcomers, decide

CURABLE = (FailureKind.INFRASTRUCTURE, FailureKind.PREEMPTION, FailureKind.NUMERIC)
MANY = Budgets(100, 100, 100)


def failure(kind: FailureKind, code: ExitCode = ExitCode.FAILED) -> Failure:
    return Failure(kind, "cause", "remedy", code)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind not in {*CURABLE, FailureKind.GROWTH}])
@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.STORAGE, ExitCode.DIVERGED, ExitCode.INTERRUPTED])
def test_what_would_fail_again_ends_with_its_own_code(kind: FailureKind, code: ExitCode) -> None:
    decision = decide(failure(kind, code), History().after(failure(kind), 0.0, progressed=True), MANY)
    assert isinstance(decision, GiveUp)
    assert (decision.error.exit_code, decision.error.cause, decision.error.remedy) == (code, "cause", "remedy")


@given(st.lists(st.tuples(st.sampled_from(CURABLE), st.booleans()), min_size=1, max_size=60), st.tuples(*[st.integers(0, 10)] * 3))
def test_a_run_never_fails_more_often_than_its_budgets(failures: list[tuple[FailureKind, bool]], limits: tuple[int, int, int]) -> None:
    history, budgets, counts, in_a_row = History(), Budgets(*limits), dict.fromkeys(CURABLE, 0), 0
    for kind, progressed in failures:
        history = history.after(failure(kind), 0.0, progressed=progressed)
        counts[kind] += 1
        in_a_row = 1 if progressed else in_a_row + 1
        decision = decide(failure(kind), history, budgets)
        within = counts[kind] <= limits[CURABLE.index(kind)] and in_a_row <= MAX_FAILURES_WITHOUT_PROGRESS
        assert isinstance(decision, Retry) == within
        if isinstance(decision, GiveUp):
            return
        assert 0 <= decision.delay_s <= 30


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (FailureKind.INFRASTRUCTURE, ExitCode.RETRIES_SPENT),
        (FailureKind.PREEMPTION, ExitCode.INTERRUPTED),
        (FailureKind.NUMERIC, ExitCode.DIVERGED),
    ],
)
def test_a_spent_budget_ends_the_run_in_its_own_way(kind: FailureKind, code: ExitCode) -> None:
    last = failure(kind, ExitCode.DIVERGED if kind is FailureKind.NUMERIC else ExitCode.FAILED)
    decision = decide(last, History().after(last, 0.0, progressed=True), Budgets(0, 0, 0))
    assert isinstance(decision, GiveUp)
    assert decision.error.exit_code == code
    assert "cause" in decision.error.cause
    assert isinstance(decision.error, InterruptedRunError) == (kind is FailureKind.PREEMPTION)


def test_the_breaker_covers_all_that_is_retried() -> None:
    history = History()
    for number, kind in enumerate((*CURABLE, FailureKind.PREEMPTION), 1):
        history = history.after(failure(kind), 0.0, progressed=False)
        decision = decide(failure(kind), history, MANY)
        assert isinstance(decision, Retry) == (number <= MAX_FAILURES_WITHOUT_PROGRESS)
        if isinstance(decision, GiveUp):
            assert isinstance(decision.error, RetriesSpentError)


@given(st.sampled_from([FailureKind.INFRASTRUCTURE, FailureKind.PREEMPTION]), st.integers(1, 4), st.integers(5, 30))
def test_a_run_that_loses_a_machine_now_and_then_goes_on_for_ever(kind: FailureKind, budget: int, num_failures: int) -> None:
    """As many as the budget within any day, however long the run; the next within the day ends it."""
    history, pause_s = History(), WINDOW_S / (budget - 0.5)
    for number in range(num_failures):
        history = history.after(failure(kind), 1000.0 + number * pause_s, progressed=True)
        assert isinstance(decide(failure(kind), history, Budgets(budget, budget, 0)), Retry)
        assert len(history.failures) <= budget, "what no longer counts is not kept"
    for _ in range(budget + 1):
        history = history.after(failure(kind), 1000.0 + num_failures * pause_s, progressed=True)
    assert isinstance(decide(failure(kind), history, Budgets(budget, budget, 0)), GiveUp)


def test_numeric_trouble_is_not_forgotten() -> None:
    """It is the model's, not a machine's, and its budget is that of the run."""
    trouble, history = failure(FailureKind.NUMERIC), History()
    for number in range(4):
        history = history.after(trouble, number * 10 * WINDOW_S, progressed=True)
        assert isinstance(decide(trouble, history, Budgets(0, 0, 3)), Retry) == (number < 3)


def test_what_fails_only_since_nodes_have_come_is_their_fault() -> None:
    grown, lost = failure(FailureKind.GROWTH), failure(FailureKind.INFRASTRUCTURE)
    for kind in FailureKind:
        found = failure(kind)
        blamed = blame_newcomers(found, grown, progressed=False)
        if kind in {FailureKind.KNOWN, FailureKind.BUG, FailureKind.INFRASTRUCTURE}:
            assert blamed is not None
            assert blamed.kind is FailureKind.INFRASTRUCTURE
            assert blamed.cause.startswith("cause (since nodes have come")
        else:
            assert blamed is None
        assert blame_newcomers(found, grown, progressed=True) is None
        assert blame_newcomers(found, lost, progressed=False) is blame_newcomers(found, None, progressed=False) is None
    assert blame_newcomers(replace(lost, rank=1), grown, progressed=False) is None, "a rank is lost anywhere"


def test_growth_costs_nothing_and_the_first_retry_is_immediate() -> None:
    history = History().after(failure(FailureKind.GROWTH), 0.0, progressed=True)
    assert history == History()
    assert decide(failure(FailureKind.GROWTH), history, Budgets(0, 0, 0)) == Retry(0.0)
    lost = failure(FailureKind.INFRASTRUCTURE)
    assert decide(lost, history.after(lost, 0.0, progressed=True), MANY) == Retry(0.0)
