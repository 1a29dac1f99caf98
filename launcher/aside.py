"""Calls that may never return, such as those to storage on a dead mount: made on a thread, with a limit to the wait."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """A function that is called on a thread of its own, one call at a time: one that hangs costs who asks no more than the wait, and one thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._call: _Call[T] | None = None

    def ask(self, within_s: float) -> T:
        """The answer of the function, called now or, if an earlier call is still under way, then.

        Raises:
            TimeoutError: it does not answer within `within_s` seconds; ask again, or leave it. Also whatever the function raises.
        """
        call = self._call or _Call(self._function)
        self._call = call if not call.ended_within(within_s) else None
        if self._call is not None:
            raise TimeoutError(f"no answer within {within_s:g} s")
        return call.answer()


class _Call(Generic[T]):
    """A call under way."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._answers: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="aside")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answers.append(self._function())
        except BaseException as error:  # noqa: BLE001 - raised again for who asks
            self._error = error

    def ended_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def answer(self) -> T:
        if self._error is not None:
            raise self._error
        return self._answers[0]
