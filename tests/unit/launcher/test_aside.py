"""Calls that may hang: nobody waits for them longer than the limit, and never two are under way."""

import errno
import threading
import time

import pytest

from data_pipeline.errors import NotFoundError, StorageUnreachableError
from launcher import aside
from launcher.aside import Aside, through_outages


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


def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait.wait_random_exponential.__call__", lambda *_: 0.01)


def test_an_outage_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pause(monkeypatch)
    outage = [StorageUnreachableError("a", "b"), OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]

    def ask() -> str:
        if outage:
            raise outage.pop()
        return "answer"

    assert through_outages(ask) == "answer"


@pytest.mark.parametrize("error", [NotFoundError("a", "b"), FileNotFoundError("a"), OSError(errno.EROFS, "Read-only file system"), KeyError("a")])
def test_what_is_no_outage_is_raised_at_once(error: Exception) -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        through_outages(ask)
    assert calls == [1]


def test_an_outage_that_lasts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pause(monkeypatch)
    monkeypatch.setattr(aside, "OUTAGE_S", 0.1)

    def ask() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageUnreachableError, match="Input/output error"):
        through_outages(ask)
