"""Verbs about runs: run, resume, list, status, logs."""

import shlex
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from data_pipeline.errors import MaskwrightError, NotFoundError, UnreachableError, UsageError
from data_pipeline.storage import Location
from launcher.attempts import attempt_folder, last_attempt
from launcher.cluster_config import LocalCluster
from launcher.config import load_cluster_config, load_run_config, override_run_config
from launcher.lease import holder
from launcher.options import (
    Cluster,
    ConfigArgument,
    Json,
    RunArgument,
    Set,
    Storage,
    command,
    console,
    human_output,
    next_command,
    print_fields,
    print_json,
    print_table,
    say,
)
from launcher.progress import clock, human
from launcher.run_status import RunStatus, read_status
from launcher.runs import find_run, read_cluster, read_config, reference, resolve_storage, run_ids
from launcher.submission import driving_submission, waiting_submission
from launcher.verbs_submit import SILENCE_S, print_job_log, submit_again
from trainer.runlog import RunFolder

_READ_BYTES = 8 << 20
_GOES_ON = {"submitted", "running"}


def run(config: ConfigArgument, overrides: Set = None, storage: Storage = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Run all stages from this machine: prepare, pretrain, export, finetune, report. Run it again and it continues.

    Example: maskwright run my.yaml --set schedule.steps=2000
    """
    from launcher.jobs import run_job

    with human_output(as_json=as_json):
        finished = run_job(load_run_config(config, overrides or (), storage), load_cluster_config(cluster or "local"), console(), verb="run")
        _say_finished(finished)
    if as_json:
        print_json(read_status(finished).to_json())


def resume(run: RunArgument, overrides: Set = None, storage: Storage = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Continue a run from its newest checkpoint; with --set also with another learning rate, schedule or number of steps.

    One that was submitted is submitted again to its cluster; with --cluster this command drives it.

    Example: maskwright resume demo --set schedule.steps=5000
    """
    folder = find_run(run, storage)
    with human_output(as_json=as_json):
        _resume(folder, overrides, cluster)
    if as_json:
        print_json(read_status(folder).to_json())


def _resume(folder: RunFolder, overrides: list[str] | None, cluster: str | None) -> None:
    from launcher.jobs import run_job

    events = folder.read_events()
    begun = next((event for event in events if event["kind"] == "command_started"), {})
    if begun.get("verb") == "finetune":
        raise UsageError(f"run {folder.root.name} only fine-tunes a model, it has nothing to pretrain", "Give the same `maskwright finetune` again.")
    if cluster is None and (last := driving_submission(folder, events)) is not None:
        submit_again(folder, last, overrides or ())
        return
    config = override_run_config(read_config(folder), overrides or ())
    where = load_cluster_config(cluster) if cluster else read_cluster(folder) or LocalCluster()
    _say_finished(run_job(config, where, console(), verb="resume", deliberate=bool(overrides)))


def _say_finished(run: RunFolder) -> None:
    report = [shlex.join(["open", str(run.report)])] if run.report.exists() else []
    next_command(*report, command("status", reference(run)))


def list_(storage: Storage = None, as_json: Json = False) -> None:
    """List the runs in a storage, as they tell it: no cluster is asked.

    Example: maskwright list --storage /data/runs
    """
    root = resolve_storage(storage)
    statuses: list[RunStatus] = []
    for name in run_ids(root):
        try:
            statuses.append(read_status(RunFolder(root / name)))
        except MaskwrightError as error:  # one run that cannot be read must not hide the others
            print(f"{name}: {error.cause}", file=sys.stderr)
    if as_json:
        print_json([status.to_json() for status in statuses])
        return
    if not statuses:
        say(f"no runs in {root}")
        next_command(f"{command('run', 'CONFIG', storage=storage)}")
        return
    rows = ((s.id, s.state, f"{s.step}/{s.steps}", _first_loss(s), human(s.tokens_per_s), s.recoveries, _ago(s.updated_at)) for s in statuses)
    print_table(("run", "state", "step", "loss", "tokens/s", "recoveries", "updated"), rows)
    next_command(command("status", statuses[-1].id, storage=storage))


def status(
    run: RunArgument,
    storage: Storage = None,
    as_json: Json = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 0 finished, 20 running, otherwise the code the run ended with.")] = False,
) -> None:
    """Show where a run is: stage, step, losses, speed, checkpoints, recoveries, and how it ended.

    Example: maskwright status demo --exit-code
    """
    folder = find_run(run, storage)
    found = status_of(folder)
    if as_json:
        print_json(found.to_json())
    else:
        print_fields(_status_fields(found))
        next_command(_after_status(found, run, storage))
    if exit_code:
        raise typer.Exit(found.exit_code)


def status_of(run: RunFolder) -> RunStatus:
    """The status of a run; where it waits on a cluster, for the first time or anew, as that has it."""
    found = read_status(run)
    if found.state != "submitted" and not (found.state == "interrupted" and found.submission):
        return found
    from launcher.submitting import asked_status  # which takes Ray

    return asked_status(found, run)


def _status_fields(status: RunStatus) -> dict[str, Any]:
    return {
        "run": status.id,
        "folder": status.folder,
        "state": f"{status.state} ({status.stage})" if status.stage else status.state,
        "cause": status.cause,
        "remedy": status.remedy,
        "stages": ", ".join(f"{name} {clock(seconds)}" for name, seconds in status.stages.items()),
        "step": f"{status.step} of {status.steps}",
        **{f"{name} loss": _rounded(value) for name, value in status.losses.items()},
        "tokens/s": human(status.tokens_per_s),
        "time left": clock(status.seconds_left) if status.seconds_left else None,
        "checkpoint": None if status.last_checkpoint is None else f"step {status.last_checkpoint}",
        "attempts": _attempts(status),
        "left out": _left_out(status),
        "process": f"{status.pid} on {status.host}" if status.pid else None,
        "job": status.submission,
        "updated": _ago(status.updated_at),
    }


def _attempts(status: RunStatus) -> str:
    if not status.pretrain_attempts:
        return ""
    return f"{status.pretrain_attempts} of pretraining, {status.recoveries} resumed, {status.steps_lost} steps lost"


def _left_out(status: RunStatus) -> str:
    """What the model did not see, on purpose."""
    parts = ((status.blocks_skipped, "damaged blocks"), (status.batches_skipped, "batches in numeric trouble"))
    return ", ".join(f"{number} {what}" for number, what in parts if number)


def _after_status(status: RunStatus, run: str, storage: str | None) -> str:
    if status.state == "failed" and not status.attempt:  # no rank has a log; the cause is above
        return command("resume", run, storage=storage)
    verb = {"running": "logs", "submitted": "logs", "finished": "report", "failed": "logs"}.get(status.state, "resume")
    return command(verb, run, *(["-f"] if verb == "logs" and status.state != "failed" else []), storage=storage)


def logs(
    run: RunArgument,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Whose log.")] = 0,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Of which attempt.", show_default="the newest")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Print a rank's log; of a submitted run that has not trained yet, what its job has printed.

    Example: maskwright logs demo --rank 1 -f
    """
    folder = find_run(run, storage)
    before = last_attempt(folder) if attempt is None and waiting_submission(folder) is not None else 0
    number = attempt or _newest_attempt(folder, before)
    shown, endings = 0, _endings(folder)
    while True:
        ended = not follow or next(endings)  # asked before the log is read, so that nothing is missed that was written until then
        newest = _newest_attempt(folder, before) if follow and attempt is None else number
        log = folder.rank_log(number, rank)
        if log.exists():
            shown = _print_log(log, shown, number, rank, as_json=as_json, whole=ended or newest > number)
        elif ended and newest == number:
            if number == 0 and print_job_log(folder):
                return
            raise _no_log(folder, number, rank)
        if newest > number:
            number, shown = newest, 0
        elif ended:
            return
        else:
            time.sleep(0.5)


def _newest_attempt(run: RunFolder, before: int) -> int:
    """Number of the newest attempt after that of number `before`; 0 when there is none."""
    newest = last_attempt(run)
    return newest if newest > before else 0


def _endings(run: RunFolder) -> Iterator[bool]:
    """Whether a run has ended, each time that it is asked.

    Raises:
        UnreachableError: the cluster that it waits for has not answered for long.
    """
    heard_at = time.monotonic()
    while True:
        found = None if holder(run) else status_of(run)
        if found is None or not (found.state == "submitted" and found.cause):
            heard_at = time.monotonic()
        elif time.monotonic() - heard_at > SILENCE_S:
            raise UnreachableError(found.cause, found.remedy)
        yield found is not None and found.state not in _GOES_ON


def _print_log(log: Location, shown: int, attempt: int, rank: int, *, as_json: bool, whole: bool) -> int:
    """Print what is new and return how far it goes; only whole lines while the log grows."""
    data = b""
    while part := log.read_range(shown + len(data), shown + len(data) + _READ_BYTES):
        data += part
    end = len(data) if whole else data.rfind(b"\n") + 1
    text = data[:end].decode(errors="replace")
    if as_json:
        for line in text.splitlines():
            print_json({"attempt": attempt, "rank": rank, "line": line})
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
    return shown + end


def _no_log(run: RunFolder, attempt: int, rank: int) -> NotFoundError:
    if attempt == 0:
        return NotFoundError(f"run {run.root.name} has not trained yet, so it has no rank's log", f"See `maskwright status {run.root.name}`.")
    there = [name for name in attempt_folder(run, attempt).children() if name.startswith("rank-")]
    return NotFoundError(f"attempt {attempt} of run {run.root.name} has no log of rank {rank}", f"There: {', '.join(there) or 'none'}.")


def _first_loss(status: RunStatus) -> str:
    """`mlm 6.9012`: runs of one storage may differ in what they learn."""
    name, value = next(iter(status.losses.items()))
    return "-" if value is None else f"{name} {_rounded(value)}"


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ago(then: float | None) -> str:
    if then is None:
        return "-"
    seconds = max(0, round(time.time() - then))
    return f"{seconds} s ago" if seconds < 120 else f"{clock(seconds)} ago" if seconds < 86400 else time.strftime("%Y-%m-%d", time.localtime(then))


VERBS = (run, resume, list_, status, logs)
