"""The way to the first step, part by part: the parts add up, whatever the clocks say, and say nothing before there is a step."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launcher.start_up import PARTS, start_up, tell_start_up

STARTED = 1000.0


def event(kind: str, time: float, **details: Any) -> dict[str, Any]:
    return {"kind": kind, "time": time, "attempt": details.pop("attempt", 0), "step": None, **details}


def submitted_run(driver: float = 0.0, rank: float = 0.0) -> list[dict[str, Any]]:
    """Events of a run whose driver and rank 0 have clocks that go so much before the submitter's."""
    return [
        event("submitted", STARTED + 4.0, submission="job-1", command_s=2.5, packing_s=0.5, upload_s=1.0),
        event("command_started", STARTED + driver + 10.0, submission="job-1", process_s=2.0),
        event("stage_finished", STARTED + driver + 11.0, stage="prepare"),
        event("attempt_started", STARTED + driver + 15.0, attempt=1, stage="pretrain", cluster_s=3.0),
        event("group_started", STARTED + rank + 22.0, attempt=1, imports_s=4.0),
        event("first_step", STARTED + rank + 24.0, attempt=1, step_s=0.5),
    ]


def test_the_way_of_a_submitted_run() -> None:
    parts = start_up(submitted_run())
    assert parts == {
        "command": 2.5,
        "packing": 0.5,
        "upload": 1.0,
        "job": 4.0,
        "driver": 2.0,
        "prepare": 2.0,
        "cluster": 3.0,
        "earlier_attempts": 0.0,
        "workers": 3.0,
        "imports": 4.0,
        "engine": 1.5,
        "first_step": 0.5,
    }
    assert list(parts) == list(PARTS)
    assert tell_start_up(parts).startswith("24.0 s to the first step: command 2.5, packing 0.5, upload 1.0, job 4.0,")
    assert "earlier" not in tell_start_up(parts)


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_clocks_that_differ_make_no_part_negative(driver: float, rank: float) -> None:
    parts = start_up(submitted_run(driver, rank))
    assert min(parts.values()) >= 0
    if driver >= -4.0 and rank >= driver - 3.0:
        assert abs(sum(parts.values()) - (24.0 + rank)) < 0.01


def test_a_run_that_was_not_submitted_begins_with_its_command() -> None:
    own = submitted_run()[1:]
    del own[0]["submission"]
    parts = start_up(own)
    assert "job" not in parts
    assert (parts["driver"], sum(parts.values())) == (2.0, 16.0)


def test_before_the_first_step_there_are_no_parts() -> None:
    assert start_up([]) == start_up(submitted_run()[:-1]) == {}
    resubmitted = event("command_started", STARTED + 50.0, submission="job-2", process_s=1.0)
    assert start_up([*submitted_run(), resubmitted]) == {}, "the step is another command's"
    assert tell_start_up({}) == ""


def test_attempts_without_a_step_are_a_part() -> None:
    first, events = event("attempt_started", STARTED + 12.0, attempt=1, stage="pretrain", cluster_s=1.0), submitted_run()
    later = [{**event, "attempt": 2} if event["attempt"] else event for event in events]
    parts = start_up([*later[:3], first, *later[3:]])
    assert (parts["prepare"], parts["cluster"], parts["earlier_attempts"], parts["workers"]) == (1.0, 1.0, 3.0, 3.0)


def test_events_of_an_older_release_give_what_they_have() -> None:
    kept = [each for each in submitted_run()[1:] if each["kind"] != "group_started"]
    old = [{key: value for key, value in each.items() if key not in {"process_s", "cluster_s"}} for each in kept]
    assert start_up(old) == {"driver": 0.0, "prepare": 5.0, "cluster": 0.0, "earlier_attempts": 0.0, "engine": 8.5, "first_step": 0.5}
