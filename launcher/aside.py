"""Calls that storage may spoil: one that never returns, as on a dead mount, costs a limited wait; one that fails for now is made again."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from data_pipeline.errors import StorageUnreachableError
from data_pipeline.remote import is_passing

T = TypeVar("T")

OUTAGE_S = 900.0
"""How long storage may be away before a run that cannot go on without it ends."""
_LONGEST_PAUSE_S = 30.0


def through_outages(function: Callable[[], T]) -> T:
    """Call `function`, again while storage is away. An outage ends attempts, but not who starts the next one.

    Raises:
        StorageUnreachableError: it is still away after OUTAGE_S seconds. Also whatever else the function raises.
    """
    retrying = Retrying(
        retry=retry_if_exception(_is_outage),
        stop=stop_after_delay(OUTAGE_S),
        wait=wait_random_exponential(multiplier=1.0, max=_LONGEST_PAUSE_S),
        reraise=True,
    )
    try:
        return retrying(function)
    except OSError as error:
        if not is_passing(error):
            raise
        raise StorageUnreachableError(f"the run's storage fails: {error}", "Check the storage, then `maskwright resume` the run.") from error


def _is_outage(error: BaseException) -> bool:
    return isinstance(error, StorageUnreachableError) or (isinstance(error, OSError) and is_passing(error))


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
