"""What a resume says of the end before it: its cause, and the time and the steps that were lost; times are seconds after the run's start."""

from typing import Any

import pytest

from trainer.interruption import Interruption


def told(time: float, kind: str, attempt: int = 1, step: int | None = None, **details: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind, "attempt": attempt, "step": step, **details}


BEGIN = [told(0.0, "command_started", 0), told(1.0, "attempt_started", stage="pretrain"), told(50.0, "checkpoint_committed", step=10)]
FINISHED = [*BEGIN, told(60.0, "stage_finished", stage="pretrain", elapsed_s=59.0)]
AGAIN = [told(1000.0, "command_started", 0), told(1001.0, "attempt_started", 9, stage="pretrain")]
MORE = "the run had ended, and was given more steps"


@pytest.mark.parametrize(
    ("events", "reached", "cause", "seconds"),
    [
        ([*BEGIN, told(55.0, "worker_failed", cause="killed")], 10, "killed", 955.0),
        ([*BEGIN, told(55.0, "worker_failed", cause="killed")], 13, "killed", 960.0),
        ([*BEGIN, told(999.0, "worker_failed", cause="the command was killed", seen_at=55.0), *AGAIN], 10, "the command was killed", 955.0),
        ([*BEGIN, told(55.0, "stopped", cause="requested"), *AGAIN], 10, "requested", 10.0),
        ([*BEGIN, told(55.0, "stopped", cause="Ctrl-C twice"), *AGAIN], 13, "Ctrl-C twice", 15.0),
        ([*BEGIN, told(55.0, "stopped", cause="requested"), told(56.0, "attempt_started", 2, stage="pretrain")], 10, "requested", 955.0),
        ([*FINISHED, told(90.0, "finished"), *AGAIN], 10, MORE, 10.0),
        ([told(0.0, "worker_failed", cause="an old one"), *FINISHED, *AGAIN], 10, MORE, 10.0),
        ([*FINISHED, told(70.0, "attempt_started", 2, stage="finetune"), told(80.0, "worker_failed", 2, cause="its own"), *AGAIN], 10, MORE, 10.0),
        ([*FINISHED, told(80.0, "failed", stage="export", cause="its own"), *AGAIN], 10, MORE, 10.0),
        ([], 0, "not recorded", 0.0),
    ],
)
def test_time_is_lost_while_the_run_wanted_to_go_on(events: list[dict[str, Any]], reached: int, cause: str, seconds: float) -> None:
    found = Interruption.before_resume(events, reached=reached, resumed_at=10, now=1010.0)
    assert found == Interruption(cause, max(0, reached - 10), seconds)
