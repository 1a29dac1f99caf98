"""What a run does, did, or needs, derived from what lies in its folder (reads storage; loads no torch)."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import with_config

from data_pipeline.errors import ExitCode
from launcher.answers.shape import SHAPE
from launcher.attempts import last_attempt
from launcher.control import is_signal
from launcher.lease import LeaseState, holder
from launcher.options import completed
from launcher.runs import read_config, reference
from launcher.start_up import start_up
from launcher.submission import Submission, driving_submission, newest_submission
from trainer.manifest import MANIFEST
from trainer.runlog import RunFolder

State = Literal["running", "finished", "stopped", "failed", "interrupted", "created", "submitted"]
"""`submitted`: given to a cluster, and nobody drives it yet; what became of the job, the cluster knows (`submitting.asked_status`)."""

_LOOKS = 3
_LOOK_S = 0.3
_TERMINAL = {"finished", "failed", "stopped"}


@with_config(SHAPE)
@dataclass(frozen=True)
class RunStatus:
    """A run at one moment; `--json` prints it as it is."""

    id: str
    folder: str
    state: State
    exit_code: int
    """Of the run's last command; 20 while it runs, or waits to."""
    stage: str
    stages: dict[str, float]
    """Seconds of each finished stage."""
    attempt: int
    pretrains: bool
    """False of a run that only fine-tunes a model folder: it counts no steps."""
    pretrain_attempts: int
    """Starts of the workers for pretraining."""
    step: int
    """Optimizer steps done."""
    steps: int
    loss: float | None
    mlm_loss: float | None
    nsp_loss: float | None
    losses: dict[str, float | None]
    """Those that the objective has, by its own names: `mlm` or `clm`, then `nsp` or `sop` where there are pairs."""
    tokens_per_s: float | None
    seconds_left: float | None
    """Of pretraining, at the pace of the last steps."""
    last_checkpoint: int | None
    recoveries: int
    """Times that training resumed from a checkpoint."""
    steps_lost: int
    blocks_skipped: int
    """Damaged blocks that pretraining went on without."""
    batches_skipped: int
    """Steps whose batch was left out for numeric trouble."""
    cause: str
    remedy: str
    pid: int | None
    host: str
    submission: str
    """The job that drives or drove the run on a cluster; empty where a command does."""
    start_up: dict[str, float]
    """Seconds between the newest command, or its submission, and its first step, by part (`start_up.PARTS`); empty until then."""
    started_at: float | None
    updated_at: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


def read_status(run: RunFolder) -> RunStatus:
    """The status of a run from its lease, events, metrics and checkpoints."""
    waiting, lease, events = _read_driver(run)
    config, newest = read_config(run), run.newest_metrics()
    submission = waiting or driving_submission(run, events)
    state, exit_code, last = ("submitted", ExitCode.RUNNING, {}) if waiting else _state(lease, events)
    resumed = [event for event in events if event["kind"] == "resumed"]
    times = [event["time"] for event in events if event["kind"] != "submitted"]
    step = int(newest["step"]) + 1 if newest else 0
    return RunStatus(
        id=run.root.name,
        folder=run.root.url,
        state=state,
        exit_code=int(exit_code),
        stage=lease.stage if lease else "",
        stages={event["stage"]: event["elapsed_s"] for event in events if event["kind"] == "stage_finished"},
        attempt=last_attempt(run),
        pretrains=pretrains(events),
        pretrain_attempts=len([event for event in events if event["kind"] == "attempt_started" and event.get("stage") == "pretrain"]),
        step=step,
        steps=config.schedule.steps,
        loss=newest.get("loss"),
        mlm_loss=newest.get("mlm_loss"),
        nsp_loss=newest.get("nsp_loss"),
        losses={name: newest.get(key) for key, name in config.objective.losses.items()},
        tokens_per_s=newest.get("tokens_per_s"),
        seconds_left=_seconds_left(events, newest, config.schedule.steps, time.time()) if lease else None,
        last_checkpoint=max(committed_steps(run), default=None),
        recoveries=len(resumed),
        steps_lost=sum(int(event.get("steps_lost") or 0) for event in resumed),
        blocks_skipped=len({(e["corpus"], e["shard"], e["block"]) for e in events if e["kind"] == "data_skipped"}),
        batches_skipped=len({event["step"] for event in events if event["kind"] == "batch_skipped"}),
        cause=str(last.get("cause", "")),
        remedy=completed(str(last.get("remedy", "")), run=reference(run)),
        pid=lease.pid if lease else None,
        host=lease.host if lease else "",
        submission=submission.job if submission else "",
        start_up=start_up(events),
        started_at=min(times, default=None),
        updated_at=max([*times, *([lease.time] if lease else [])], default=None),
    )


def _read_driver(run: RunFolder) -> tuple[Submission | None, LeaseState | None, list[dict[str, Any]]]:
    """The submission that waits to drive a run, or who drives it, and the run's events; a job that begins between two reads is not missed.

    Who waits is asked first. Who has just begun has a lease's number before its lease, and its event last: there it is looked again.
    """
    for looks_left in reversed(range(_LOOKS)):
        submission = newest_submission(run)
        waiting = submission if submission is not None and submission.waits(run) else None
        lease, events = holder(run), run.read_events()
        if lease or waiting or submission is None or not looks_left or _has_begun(submission, events):
            return None if lease else waiting, lease, events
        time.sleep(_LOOK_S)
    raise AssertionError("it returns at the last look")


def _has_begun(submission: Submission, events: list[dict[str, Any]]) -> bool:
    """Whether its job, or another command since, has said in the run's events that it drives it."""
    begun = [event for event in events if event["kind"] == "command_started"]
    return any(event.get("submission") == submission.job or event["time"] > submission.time for event in begun)


def _state(lease: LeaseState | None, events: list[dict[str, Any]]) -> tuple[State, ExitCode, dict[str, Any]]:
    """Who holds a lease runs; otherwise the last word counts, unless work began after it and nobody said how it ended."""
    if lease is not None:
        return "running", ExitCode.RUNNING, {}
    told = [event for event in events if event["kind"] in _TERMINAL or event["kind"] in {"command_started", "attempt_started"}]
    if not told:
        return "created", ExitCode.INTERRUPTED, {}
    last = told[-1]
    if last["kind"] == "finished":
        return "finished", ExitCode.OK, last
    if last["kind"] == "stopped":
        return "stopped", ExitCode.INTERRUPTED, last
    if last["kind"] == "failed":
        return "failed", ExitCode(last.get("exit_code", ExitCode.FAILED)), last
    cause = {"cause": "the command that ran it was killed", "remedy": "Run `maskwright resume`."}
    return "interrupted", ExitCode.INTERRUPTED, cause


def may_begin_anew(events: list[dict[str, Any]]) -> bool:
    """Whether a cluster that begins jobs anew may do so with the run's: who drove it last did not say how it ended, or had to by a signal."""
    state, _, last = _state(None, events)
    if state == "stopped":  # without an exit code it is the word of a rank, and the driver was killed after it
        return is_signal(str(last.get("by", ""))) or "exit_code" not in last
    return state == "interrupted"


def record_lost_driver(run: RunFolder) -> None:
    """Call when taking over a run: says in its events that the command before was killed, if nobody said how it ended."""
    events = run.read_events()
    state, _, told = _state(None, events)
    if state == "interrupted":
        seen_at = max([run.newest_metrics().get("time", 0.0), *(event["time"] for event in events if event["kind"] != "submitted")])
        run.append_event("worker_failed", attempt=last_attempt(run), failure="infrastructure", rank=None, cause=told["cause"], seen_at=seen_at)


def pretrains(events: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a run with these events pretrains, as all do but those that `finetune` begins for a model folder."""
    begun = next((event for event in events if event["kind"] == "command_started"), {})
    return begun.get("verb") != "finetune"


def has_trained(run: RunFolder) -> bool:
    """Whether a step was taken; until then everything about a run may still be changed."""
    return bool(run.newest_metrics() or committed_steps(run))


def committed_steps(run: RunFolder) -> list[int]:
    """Steps of the committed checkpoints, ascending (a checkpoint is committed when its manifest exists)."""
    names = run.checkpoints.children()
    plain = [name for name in names if name.startswith("step-") and name.removeprefix("step-").isdigit()]
    return [int(name.removeprefix("step-")) for name in plain if (run.checkpoints / name / MANIFEST).exists()]


def _seconds_left(events: Iterable[dict[str, Any]], newest: dict[str, Any], steps: int, now: float) -> float | None:
    """Steps left at the mean pace of the present attempt, its set-up included."""
    own = [event for event in events if newest and event["attempt"] == newest["attempt"]]
    started_at = next((event["time"] for event in own if event["kind"] == "attempt_started"), None)
    if started_at is None:
        return None
    first = next((event["step"] for event in own if event["kind"] == "resumed"), 0)
    return (steps - 1 - newest["step"]) * (now - started_at) / max(1, newest["step"] + 1 - first)
