"""The main thread over the stages: stop requests, lost leases, errors; the progress of training."""

import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.config import ObjectiveConfig
from data_pipeline.errors import ConflictError, InterruptedRunError, StorageError
from data_pipeline.storage import Location
from launcher import supervision
from launcher.cluster_config import ClusterConfig
from launcher.clusters.local import Machine, Workers
from launcher.control import GRACE_VARIABLE, Grace, StopRequest, clear_stop, read_stop, request_stop
from launcher.lease import Lease
from launcher.progress import Notices, RecordsTail, TrainingProgress, TrialProgress, clock, human
from launcher.supervision import CtrlCError, RayOnDemand, Supervisor
from tests.support.dead_storage import dead_storage
from trainer.runlog import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "run"))


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Test workers ignore it, and so would what is tested."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def supervise(run: RunFolder, lease: Lease, stages: Callable[[], str], *, saves: bool) -> str:
    ray = RayOnDemand(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
    return Supervisor(run, lease, ray, say=print, tick=lambda: None, saves_on_stop=lambda: saves).supervise(stages)


def test_result_and_error_of_the_stages_come_through(run: RunFolder) -> None:
    with Lease.acquire(run) as lease:
        assert supervise(run, lease, lambda: "done", saves=True) == "done"

        def fails() -> str:
            raise StorageError("full", "free some")

        with pytest.raises(StorageError, match="full"):
            supervise(run, lease, fails, saves=True)


def test_a_stage_that_saves_is_given_its_grace_and_others_are_not(run: RunFolder) -> None:
    never = threading.Event()

    def stages() -> str:
        never.wait(20)
        return "late"

    with Lease.acquire(run) as lease:
        request_stop(run, grace_s=1.0, save=True, by="test", lease=lease.state.token)
        started_at = time.monotonic()
        with pytest.raises(InterruptedRunError):
            supervise(run, lease, stages, saves=True)
        assert time.monotonic() - started_at >= 0.7
        started_at = time.monotonic()
        clear_stop(run, "a later lease")
        request_stop(run, grace_s=60.0, save=True, by="test", lease=lease.state.token)
        with pytest.raises(InterruptedRunError, match="asked by test"):
            supervise(run, lease, stages, saves=False)
        assert time.monotonic() - started_at < 5
    never.set()


@pytest.mark.parametrize("clock_is_ahead_s", [-3600.0, 3600.0])
def test_the_grace_is_counted_by_the_clock_of_who_gives_it(run: RunFolder, clock_is_ahead_s: float) -> None:
    """`stop` may be given on another machine, whose clock is wrong."""
    never = threading.Event()
    with Lease.acquire(run) as lease:
        request = StopRequest(time.time() + clock_is_ahead_s, 1.0, True, "test", lease.state.token)
        run.stop_request.write_json(asdict(request))
        started_at = time.monotonic()
        with pytest.raises(InterruptedRunError):
            supervise(run, lease, lambda: str(never.wait(20)), saves=True)
        assert 0.9 <= time.monotonic() - started_at < 10
    never.set()


def interrupt(after_s: float) -> None:
    """Ctrl-C, as the terminal sends it."""
    threading.Timer(after_s, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_twice_ends_though_storage_hangs(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "ANSWER_S", 0.2)
    never, said = threading.Event(), list[str]()
    ray = RayOnDemand(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
    with Lease.acquire(run) as lease, dead_storage():
        supervisor = Supervisor(run, lease, ray, said.append, lambda: len(run.read_events()) and None, saves_on_stop=lambda: True)
        interrupt(0.5)
        interrupt(2.0)
        started_at = time.monotonic()
        with pytest.raises(CtrlCError, match="twice"):
            supervisor.supervise(lambda: never.wait(20))
        assert 1.9 <= time.monotonic() - started_at < 10
    never.set()
    assert "SIGINT: saving what was trained" in said[0]


def test_ctrl_c_when_all_is_done_stops_nothing(run: RunFolder) -> None:
    """As the last stage ends, and while Ray ends, which takes seconds."""

    assert interrupted_at_the_end(run, signals=1) == "done"


def interrupted_at_the_end(run: RunFolder, signals: int) -> str:
    """Supervise stages that are interrupted as they end, and `signals` times while Ray ends."""

    class RayIsUp(RayOnDemand):
        is_served = False

        def serve(self, stack: ExitStack) -> None:
            for _ in range(0 if self.is_served else signals):
                stack.callback(os.kill, os.getpid(), signal.SIGINT)
            self.is_served = True

    with Lease.acquire(run) as lease:
        ray = RayIsUp(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
        supervisor = Supervisor(run, lease, ray, print, lambda: None, saves_on_stop=lambda: False)
        return supervisor.supervise(lambda: time.sleep(0.1) or os.kill(os.getpid(), signal.SIGINT) or "done")


def test_ctrl_c_again_ends_a_command_whose_ray_does_not_end(run: RunFolder) -> None:
    command = multiprocessing.get_context("fork").Process(target=interrupted_at_the_end, args=(run, 2))
    command.start()
    command.join(30)
    assert command.exitcode == -signal.SIGINT


def test_who_started_the_driver_says_what_it_has_to_save_in(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Slurm it is the grace of the cluster file."""
    monkeypatch.setenv(GRACE_VARIABLE, "840")
    with Lease.acquire(run) as lease:
        interrupt(0.1)

        def stages() -> str:
            while read_stop(run) is None:
                time.sleep(0.01)
            return "saved"

        supervise(run, lease, stages, saves=True)
    request = read_stop(run)
    assert request is not None
    assert request.grace_s == 840.0


def test_a_signal_ends_the_run_in_time_though_storage_hangs(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "ANSWER_S", 0.2)
    monkeypatch.setattr(supervision, "SIGNAL_GRACE_S", 1.0)
    never = threading.Event()
    with Lease.acquire(run) as lease, dead_storage():
        interrupt(0.2)
        with pytest.raises(CtrlCError, match="storage did not take the request"):
            supervise(run, lease, lambda: str(never.wait(20)), saves=True)
    never.set()


def test_a_request_ends_the_run_in_time_though_storage_hangs_after_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "ANSWER_S", 0.2)
    never, dead = threading.Event(), ExitStack()

    def stages() -> str:
        time.sleep(0.7)
        dead.enter_context(dead_storage())
        return str(never.wait(20))

    with Lease.acquire(run) as lease, dead:
        request_stop(run, grace_s=2.0, save=True, by="test", lease=lease.state.token)
        started_at = time.monotonic()
        with pytest.raises(InterruptedRunError, match="asked by test"):
            supervise(run, lease, stages, saves=True)
        assert 1.9 <= time.monotonic() - started_at < 10
    never.set()


def test_a_request_to_a_command_that_has_hardly_begun_is_not_forgotten(run: RunFolder) -> None:
    request = request_stop(run, grace_s=1.0, save=True, by="test", lease="this")
    clear_stop(run, "this")
    assert read_stop(run) == request
    clear_stop(run, "the next")
    assert read_stop(run) is None


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_grace_is_counted_from_when_the_request_is_seen(run: RunFolder, skew_s: float) -> None:
    """The clock of who asks may be another machine's."""
    grace, asked = Grace(), StopRequest(time.time() + skew_s, 0.3, save=True, by="test")
    assert not grace.is_over(asked)
    time.sleep(0.35)
    assert grace.is_over(asked)
    assert not grace.is_over(replace(asked, lease="of another request"))
    assert grace.is_over(replace(asked, save=False))
    request_stop(run, grace_s=60.0, save=True, by="test", lease="this")
    assert run.stop_request.read_json()["grace_s"] == 60.0


def test_storage_that_fails_for_a_moment_does_not_end_the_run(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def fails(what: str) -> None:
        looks.append(what)
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(supervision, "read_stop", lambda _: fails("stop"))
    with Lease.acquire(run) as lease:
        ray = RayOnDemand(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
        supervisor = Supervisor(run, lease, ray, say=print, tick=lambda: fails("tick"), saves_on_stop=lambda: True)
        assert supervisor.supervise(lambda: time.sleep(0.6) or "done") == "done"
    assert {"stop", "tick"} <= set(looks)


def test_lost_lease_ends_the_command(run: RunFolder) -> None:
    with Lease.acquire(run) as lease:
        lease.lost.set()
        with pytest.raises(ConflictError, match="taken over"):
            supervise(run, lease, lambda: time.sleep(5) or "late", saves=True)


def test_a_stage_that_outlives_its_command_gets_no_ray(run: RunFolder) -> None:
    """When the command ends, so does Ray, and the stage sees a lost worker group: it must not begin another attempt."""
    ray = RayOnDemand(ClusterConfig(), Workers(1, 1, False), Machine(1, 0))
    ended, told = threading.Event(), list[BaseException]()

    def stages() -> None:
        ended.wait(20)
        try:
            ray.scratch()
        except BaseException as error:  # noqa: BLE001  # whatever it is, on this thread
            told.append(error)

    with Lease.acquire(run) as lease:
        lease.lost.set()
        supervisor = Supervisor(run, lease, ray, say=print, tick=lambda: None, saves_on_stop=lambda: True)
        with pytest.raises(ConflictError):
            supervisor.supervise(stages)
    ended.set()
    deadline = time.monotonic() + 10
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert isinstance(told[0], InterruptedRunError)


def test_torn_stop_request_is_none(run: RunFolder) -> None:
    run.stop_request.write_bytes(b'{"time": 1')
    assert read_stop(run) is None


def test_a_line_for_each_trial_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.progress._TRIALS_POLL_S", 0.0)
    out, folder = io.StringIO(), Location.at(tmp_path)
    (folder / "sst2" / "trials" / "pretrained-0.json").write_json({})
    progress = TrialProgress(Console(file=out, width=200), folder, ("sst2", "news"), trials_per_task=6)
    progress.update()
    assert out.getvalue() == ""  # of an earlier attempt
    (folder / "sst2" / "trials" / "pretrained-1.json").write_json({})
    (folder / "news" / "trials" / "scratch-2.json").write_json({})
    progress.update()
    progress.update()
    assert out.getvalue() == "  sst2  pretrained, seed 1 done  (2 of 6)\n  news  scratch, seed 2 done  (1 of 6)\n"
    for seed in (0, 1):  # between two looks
        (folder / "sst2" / "trials" / f"scratch-{seed}.json").write_json({})
    progress.update()
    assert out.getvalue().endswith("  sst2  scratch, seed 0 done  (3 of 6)\n  sst2  scratch, seed 1 done  (4 of 6)\n")


def test_progress_prints_ten_lines_and_survives_a_resume() -> None:
    out = io.StringIO()
    progress = TrainingProgress(Console(file=out, width=200), steps=100)
    for step in [*range(60), *range(50, 100)]:
        progress.update([{"step": step, "attempt": 1, "mlm_loss": 7.0, "nsp_loss": 0.69, "tokens_per_s": 12345.0}])
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 14
    assert lines[-1].strip() == "step 100/100  mlm 7.000  nsp 0.690  12.3k tokens/s"


@pytest.mark.parametrize(
    ("objective", "losses"),
    [("clm", "clm 7.000"), ({"sentence_objective": "none"}, "mlm 7.000"), ({"sentence_objective": "sop"}, "mlm 7.000  sop 0.690")],
)
def test_progress_names_the_losses_of_the_objective(objective: Any, losses: str) -> None:
    progress = TrainingProgress(Console(), 100, ObjectiveConfig.model_validate(objective))
    record = {"mlm_loss": 7.0, "nsp_loss": 0.69 if "sop" in losses else None, "tokens_per_s": 1.0}
    assert progress.describe(record, 1) == f"{losses}  1 tokens/s"


def test_a_slow_run_says_something_every_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("launcher.progress.time.monotonic", lambda: now[0])
    progress = TrainingProgress(Console(file=out, width=200), steps=10_000)
    for step in range(13):
        now[0] += 10.0
        progress.update([{"step": step, "attempt": 1, "mlm_loss": 7.0, "nsp_loss": 0.69, "tokens_per_s": 12345.0}])
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10000", "5/10000", "9/10000", "13/10000"]


def test_the_time_left_counts_what_comes_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, a save after every 50 steps fifty more."""
    now = [1000.0]
    monkeypatch.setattr("launcher.progress.time.monotonic", lambda: now[0])
    progress = TrainingProgress(Console(file=io.StringIO()), steps=300, paced_over=50)
    record = {"attempt": 1, "mlm_loss": 7.0, "nsp_loss": 0.69, "tokens_per_s": 12345.0}
    for step in range(200):
        now[0] += 1.0 if step % 50 else 51.0
        progress.update([{"step": step, **record}])
    assert progress.describe(record, 200).endswith("  3:20 left")
    for step in (200, 201):  # of an attempt whose start took an hour
        now[0] += 3600.0 if step == 200 else 2.0
        progress.update([{"step": step, **record, "attempt": 2}])
    assert progress.describe(record, 202).endswith("  3:16 left")


def test_what_ranks_record_is_said_once(run: RunFolder) -> None:
    out = io.StringIO()
    run.append_event("resumed", attempt=1, step=1)
    notices, tail = Notices(Console(file=out, width=40), run), RecordsTail(run.events).skip_old()
    run.append_event("data_skipped", attempt=1, step=4, corpus="docs-0123", shard="train-000001.tar", block=7, samples=93, cause="its digest differs")
    run.append_event("checkpoint_committed", attempt=1, step=5)
    for _ in range(2):
        notices.update(tail.read())
    assert out.getvalue() == "  damaged block 7 of docs-0123/train-000001.tar left out, 93 samples: its digest differs\n"


def test_tail_waits_for_whole_lines(run: RunFolder) -> None:
    tail = RecordsTail(run.metrics)
    assert tail.read() == []
    run.metrics.write_bytes(b'{"step": 0}\n{"st')
    assert tail.read() == [{"step": 0}]
    run.metrics.write_bytes(b'{"step": 0}\n{"step": 1}\n')
    assert tail.read() == [{"step": 1}]


def test_a_spoilt_record_is_passed_over(run: RunFolder) -> None:
    """A full disk or a crash cuts a line; `append_line` closes it. Neither a resume nor a running command may stumble over it."""
    tail = RecordsTail(run.metrics)
    run.metrics.write_bytes(b'{"step": 0}\n{"st\n\0\0\xff\n{"step": 1}\n{"ste')
    assert tail.read() == [{"step": 0}, {"step": 1}]
    resumed = RecordsTail(run.metrics).skip_old()
    run.append_metrics({"step": 2})
    assert resumed.read() == tail.read() == [{"step": 2}]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (3.14159, "3.14"), (12345.0, "12.3k"), (4.5e6, "4.5M"), (7e9, "7G")])
def test_human(value: float | None, text: str) -> None:
    assert human(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (7.4, "0:07"), (80, "1:20"), (7390, "2:03:10")])
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_a_closed_terminal_does_not_make_what_is_said_fail() -> None:
    """SIGHUP comes with the terminal's end: what is printed from then on has nowhere to go."""
    ours, theirs = os.openpty()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(theirs, 1)
        os.close(ours)
        os.close(theirs)
        signal.signal(signal.SIGHUP, lambda *_: supervision._leave_terminal())
        time.sleep(0.5)
        try:
            os.write(1, b"said to nobody")
        except OSError:
            os._exit(1)
        os._exit(0)
    os.close(theirs)
    os.close(ours)
    time.sleep(0.1)
    os.kill(child, signal.SIGHUP)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_who_works_with_ray_is_told_before_it_ends() -> None:
    ray, told = RayOnDemand(ClusterConfig(), Workers(1, 1, False), Machine(1, 0)), list[str]()
    with ray.before_end(lambda: told.append("first")):
        pass
    with ray.before_end(lambda: told.append("second")):
        ray.require_open()
        assert ray.close()
    assert told == ["second"]
    assert not ray.close(), "nobody is left to wait for"
    with pytest.raises(InterruptedRunError):
        ray.require_open()
    with pytest.raises(InterruptedRunError), ray.before_end(lambda: told.append("late")):
        pytest.fail("a stage that comes late must not start workers")
    assert told == ["second"]
