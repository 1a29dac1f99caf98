"""The retry policy: each kind that another attempt can cure within its own budget, the rest never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ExitCode, InterruptedRunError, RetriesSpentError
from launcher.policy import MAX_FAILURES_WITHOUT_PROGRESS, Budgets, Failure, FailureKind, GiveUp, History, Retry, decide

CURABLE = (FailureKind.INFRASTRUCTURE, FailureKind.PREEMPTION, FailureKind.NUMERIC)
MANY = Budgets(100, 100, 100)


def failure(kind: FailureKind, code: ExitCode = ExitCode.FAILED) -> Failure:
    return Failure(kind, "cause", "remedy", code)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind not in {*CURABLE, FailureKind.GROWTH}])
@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.STORAGE, ExitCode.DIVERGED, ExitCode.INTERRUPTED])
def test_what_would_fail_again_ends_with_its_own_code(kind: FailureKind, code: ExitCode) -> None:
    decision = decide(failure(kind, code), History().after(failure(kind), progressed=True), MANY)
    assert isinstance(decision, GiveUp)
    assert (decision.error.exit_code, decision.error.cause, decision.error.remedy) == (code, "cause", "remedy")


@given(st.lists(st.tuples(st.sampled_from(CURABLE), st.booleans()), min_size=1, max_size=60), st.tuples(*[st.integers(0, 10)] * 3))
def test_a_run_never_fails_more_often_than_its_budgets(failures: list[tuple[FailureKind, bool]], limits: tuple[int, int, int]) -> None:
    history, budgets, counts, in_a_row = History(), Budgets(*limits), dict.fromkeys(CURABLE, 0), 0
    for kind, progressed in failures:
        history = history.after(failure(kind), progressed=progressed)
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
    decision = decide(last, History().after(last, progressed=True), Budgets(0, 0, 0))
    assert isinstance(decision, GiveUp)
    assert decision.error.exit_code == code
    assert "cause" in decision.error.cause
    assert isinstance(decision.error, InterruptedRunError) == (kind is FailureKind.PREEMPTION)


def test_the_breaker_covers_all_that_is_retried() -> None:
    history = History()
    for number, kind in enumerate((*CURABLE, FailureKind.PREEMPTION), 1):
        history = history.after(failure(kind), progressed=False)
        decision = decide(failure(kind), history, MANY)
        assert isinstance(decision, Retry) == (number <= MAX_FAILURES_WITHOUT_PROGRESS)
        if isinstance(decision, GiveUp):
            assert isinstance(decision.error, RetriesSpentError)


def test_growth_costs_nothing_and_the_first_retry_is_immediate() -> None:
    history = History().after(failure(FailureKind.GROWTH), progressed=True)
    assert history == History()
    assert decide(failure(FailureKind.GROWTH), history, Budgets(0, 0, 0)) == Retry(0.0)
    lost = failure(FailureKind.INFRASTRUCTURE)
    assert decide(lost, history.after(lost, progressed=True), MANY) == Retry(0.0)
