"""Calls that may hang: nobody waits for them longer than the limit, and never two are under way."""

import threading
import time

import pytest

from launcher.aside import Aside


def test_answers_and_errors_come_through() -> None:
    assert Aside(lambda: 7).ask(5.0) == 7
    with pytest.raises(ZeroDivisionError):
        Aside(lambda: 1 / 0).ask(5.0)


def test_a_call_that_hangs_is_waited_for_no_longer_than_the_limit_and_not_made_again() -> None:
    calls, over = list[int](), threading.Event()

    def hang() -> int:
        calls.append(len(calls))
        over.wait(20)
        return calls[-1]

    aside = Aside(hang)
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"0\.05 s"):
            aside.ask(0.05)
        assert time.monotonic() - began < 2
    assert calls == [0]
    over.set()
    assert aside.ask(5.0) == 0, "its answer, when it has come"
    assert aside.ask(5.0) == 1, "and then the next"
