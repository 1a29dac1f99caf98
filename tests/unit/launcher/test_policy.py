"""The retry policy: infrastructure within a budget, the rest never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ExitCode, RetriesSpentError
from launcher.policy import MAX_FAILURES_WITHOUT_PROGRESS, Failure, FailureKind, GiveUp, History, Retry, decide


def failure(kind: FailureKind, code: ExitCode = ExitCode.FAILED) -> Failure:
    return Failure(kind, "cause", "remedy", code)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.INFRASTRUCTURE])
@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.STORAGE, ExitCode.DIVERGED, ExitCode.INTERRUPTED])
def test_what_would_fail_again_ends_with_its_own_code(kind: FailureKind, code: ExitCode) -> None:
    decision = decide(failure(kind, code), History(), max_failures=100)
    assert isinstance(decision, GiveUp)
    assert (decision.error.exit_code, decision.error.cause, decision.error.remedy) == (code, "cause", "remedy")


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 10))
def test_a_run_never_fails_more_often_than_its_budgets(progress: list[bool], max_failures: int) -> None:
    history, lost = History(), failure(FailureKind.INFRASTRUCTURE)
    in_a_row = 0
    for number, progressed in enumerate(progress, 1):
        history = history.after(lost, progressed=progressed)
        in_a_row = 1 if progressed else in_a_row + 1
        decision = decide(lost, history, max_failures)
        within = number <= max_failures and in_a_row <= MAX_FAILURES_WITHOUT_PROGRESS
        assert isinstance(decision, Retry) == within
        if isinstance(decision, GiveUp):
            assert isinstance(decision.error, RetriesSpentError)
            return
        assert 0 <= decision.delay_s <= 30


def test_first_retry_is_immediate_and_other_kinds_do_not_count() -> None:
    history = History().after(failure(FailureKind.KNOWN), progressed=False)
    assert history == History()
    assert decide(failure(FailureKind.INFRASTRUCTURE), history.after(failure(FailureKind.INFRASTRUCTURE), progressed=True), 3) == Retry(0.0)
