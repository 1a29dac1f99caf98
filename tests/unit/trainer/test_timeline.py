"""Where time goes: by the host's clock, and by a device that is behind its host."""

import pytest

from trainer import timeline
from trainer.context import LocalContext
from trainer.timeline import Timeline


class Clock:
    """The host's clock, and a device that comes to what it is given when it has done what it was given before."""

    def __init__(self) -> None:
        self.now = 100.0
        self.done_at = 0.0

    def monotonic(self) -> float:
        return self.now

    def give(self, seconds: float) -> None:
        """Work for the device."""
        self.done_at = max(self.done_at, self.now) + seconds

    def wait(self) -> None:
        """Until the device is done."""
        self.now = max(self.now, self.done_at)


class DeviceEvent:
    """An instant on the device, which may be read only when the device has come to it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self._clock.now, self._clock.done_at)

    def elapsed_time(self, end_event: "DeviceEvent", /) -> float:
        assert self._clock.now >= end_event.at, "not yet"
        return 1000 * (end_event.at - self.at)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timeline, "time", clock)
    return clock


def test_on_a_cpu_phases_last_until_the_next(clock: Clock) -> None:
    line = Timeline(LocalContext(), None)
    for phase, seconds in (
        ("set-up", 50.0),
        ("data", 1.0),
        ("agree", 2.0),
        ("forward", 3.0),
        ("backward", 4.0),
        ("forward", 5.0),
        ("optimizer", 6.0),
    ):
        line.heartbeat(7, phase)
        clock.now += seconds
    assert line.take() == {"set-up": 50.0, "data": 1.0, "agree": 2.0, "forward": 8.0, "backward": 4.0, "optimizer": 6.0}
    clock.now += 0.5  # records are written
    line.heartbeat(8, "validation")
    clock.now += 9.0
    line.heartbeat(8, "data")
    assert line.take() == {"": 0.5, "validation": 9.0, "data": 0.0}


def test_a_device_that_is_behind_is_timed_by_its_own_instants(clock: Clock) -> None:
    """The host hands out two seconds' work in a tenth of a second each, and waits for the device when the losses are agreed on."""
    line = Timeline(LocalContext(), lambda: DeviceEvent(clock))
    started_at = clock.now
    line.heartbeat(0, "data")
    clock.now += 1.0
    for phase, seconds in (("forward", 2.0), ("backward", 4.0), ("forward", 2.0), ("backward", 4.0), ("reduce", 1.0), ("backward", 0.0)):
        line.heartbeat(0, phase)
        clock.give(seconds)
        clock.now += 0.1
    line.heartbeat(0, "agree")
    clock.wait()
    clock.now += 0.25  # for the other ranks
    line.heartbeat(0, "optimizer")
    clock.now += 0.5
    seconds = line.take()
    assert seconds == pytest.approx({"data": 1.0, "forward": 4.0, "backward": 8.0, "reduce": 1.0, "agree": 0.25, "optimizer": 0.5})
    assert sum(seconds.values()) == pytest.approx(clock.now - started_at)


@pytest.mark.parametrize(("read_s", "waited_s"), [(3.0, 0.0), (9.0, 1.2)])
def test_data_that_is_read_while_the_device_computes_is_waited_for_as_long_as_it_takes_longer(clock: Clock, read_s: float, waited_s: float) -> None:
    line = Timeline(LocalContext(), lambda: DeviceEvent(clock))
    started_at = clock.now
    for phase, seconds in (("forward", 3.0), ("backward", 5.0)):
        line.heartbeat(0, phase)
        clock.give(seconds)
        clock.now += 0.1
    line.heartbeat(0, "data")
    clock.now += read_s
    line.heartbeat(0, "agree")
    clock.wait()
    clock.now += 0.25
    line.heartbeat(0, "optimizer")
    seconds = line.take()
    assert seconds == pytest.approx({"forward": 3.0, "backward": 5.0, "data": waited_s, "agree": 0.25, "optimizer": 0.0})
    assert sum(seconds.values()) == pytest.approx(clock.now - started_at)


def test_a_host_that_is_slower_than_its_device_is_not_counted_twice(clock: Clock) -> None:
    line = Timeline(LocalContext(), lambda: DeviceEvent(clock))
    started_at = clock.now
    for phase in ("forward", "backward"):
        line.heartbeat(0, phase)
        clock.give(0.1)
        clock.now += 2.0
    line.heartbeat(0, "agree")
    clock.now += 0.5
    line.heartbeat(0, "optimizer")
    assert line.take() == pytest.approx({"forward": 2.0, "backward": 2.0, "agree": 0.5, "optimizer": 0.0})
    assert clock.now - started_at == pytest.approx(4.5)


def test_other_ranks_keep_nothing_and_pass_everything_on() -> None:
    said: list[tuple[int, str]] = []

    class Listening(LocalContext):
        def heartbeat(self, step: int, phase: str) -> None:
            said.append((step, phase))

        def stop_requested(self) -> bool:
            return True

    line = Timeline(Listening(1, 4), None)
    line.heartbeat(3, "forward")
    assert said == [(3, "forward")]
    assert (line.rank, line.world_size, line.stop_requested()) == (1, 4, True)
    assert line.take() == {}
