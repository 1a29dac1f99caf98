"""`status --watch`: what is shown while a run goes on, on a terminal and elsewhere, and how watching ends."""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.errors import ExitCode
from data_pipeline.storage import Location
from launcher import cli, verbs_status
from launcher.config import dump_yaml
from launcher.lease import Lease
from trainer.config import RunConfig
from trainer.runlog import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of ten steps, in the storage that is looked in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASKWRIGHT_STORAGE", raising=False)
    run = RunFolder(Location.at(tmp_path / "runs/tiny"))
    run.config.write_bytes(dump_yaml(RunConfig.model_validate({"name": "tiny", "schedule": {"steps": 10, "warmup_steps": 1}})))
    return run


def between_looks(monkeypatch: pytest.MonkeyPatch, *happens: Callable[[], object]) -> None:
    """What happens in each pause between two looks, in order; nothing is waited for."""
    left = iter(happens)
    monkeypatch.setattr("launcher.verbs_status.time.sleep", lambda _: next(left)())


def driven(run: RunFolder) -> tuple[Lease, Sequence[Callable[[], object]]]:
    """A run that is driven, and what becomes of it: two steps of one tenth each, nothing, and an end."""
    lease = Lease.acquire(run)
    lease.beat(stage="pretrain")

    def step(number: int) -> Callable[[], object]:
        return lambda: run.append_metrics({"step": number, "attempt": 1, "mlm_loss": 7.5, "nsp_loss": None, "tokens_per_s": 1000.0})

    def end() -> None:
        lease.__exit__()
        run.append_event("finished", attempt=1, step=10)

    return lease, (step(0), step(1), lambda: None, end)


def invoke(*options: str) -> int:
    return cli.run(["status", "tiny", "--watch", *options], debug=False)


def test_without_a_terminal_a_line_tells_each_change(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, happens = driven(run)
    between_looks(monkeypatch, *happens)
    assert invoke("--exit-code") == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "running (pretrain)  step 0/10",
        "running (pretrain)  step 1/10  mlm 7.5000  1k tokens/s",
        "running (pretrain)  step 2/10  mlm 7.5000  1k tokens/s",
        "finished  step 2/10  mlm 7.5000  1k tokens/s",
    ]
    assert lines[-1] == "next: maskwright report tiny"


def test_json_is_an_object_for_each_change(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, happens = driven(run)
    between_looks(monkeypatch, *happens)
    assert invoke("--json") == ExitCode.OK
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["state"], each["step"]) for each in found] == [("running", 0), ("running", 1), ("running", 2), ("finished", 2)]


def test_a_terminal_shows_all_of_it_ever_anew(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(verbs_status, "console", lambda: Console(file=screen, force_terminal=True, width=100))
    _, happens = driven(run)
    between_looks(monkeypatch, *happens)
    assert invoke() == ExitCode.OK
    for word in ("running (pretrain)", "0 of 10", "2 of 10", "finished"):
        assert word in screen.getvalue()
    assert "finished" in capsys.readouterr().out, "what stays on the screen is the last status"


def test_a_run_that_has_ended_is_not_waited_for(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.append_event("failed", attempt=1, exit_code=int(ExitCode.DIVERGED), cause="the loss is not finite", remedy="r")
    assert invoke("--exit-code") == ExitCode.DIVERGED
    assert capsys.readouterr().out.startswith("failed  step 0/10  the loss is not finite\n")
    assert invoke() == ExitCode.OK


@pytest.mark.parametrize(("unheard_s", "states"), [(31.0, ["running", "running", "interrupted"]), (91.0, ["interrupted"])])
def test_a_driver_elsewhere_is_given_up_later_than_its_lease(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unheard_s: float, states: Sequence[str]
) -> None:
    """Its storage may be slow; whoever watches would otherwise go home while it trains."""
    lease = Lease.acquire(run)
    run.append_event("command_started", attempt=0)

    def unheard(seconds: float) -> Callable[[], object]:
        state = replace(lease.state, machine="elsewhere", host="there", stage="pretrain", time=time.time() - seconds)
        return lambda: run.lease.write_json(asdict(state))

    unheard(unheard_s)()
    between_looks(monkeypatch, unheard(0.0), unheard(91.0))
    assert invoke("--json", "--exit-code") == ExitCode.INTERRUPTED
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["state"] for each in found] == states
    assert all("there" in each["cause"] for each in found[:1] if each["state"] == "running")


def test_ctrl_c_ends_watching_and_nothing_else(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lease, _ = driven(run)

    def interrupt() -> None:
        raise KeyboardInterrupt

    between_looks(monkeypatch, interrupt)
    assert invoke("--exit-code") == ExitCode.CTRL_C
    assert capsys.readouterr().err == "not watched any more: run tiny goes on\n"
    lease.require_held()
    assert not run.stop_request.exists()
