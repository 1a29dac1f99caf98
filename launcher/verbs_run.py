"""Verbs about a run: run, resume, logs."""

import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import NotFoundError, UsageError
from data_pipeline.storage import Location
from launcher.attempts import attempt_folder, last_attempt
from launcher.cluster_config import Cluster as AnyCluster
from launcher.cluster_config import LocalCluster
from launcher.config import load_cluster_config, load_run_config, override_run_config
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
    print_json,
)
from launcher.run_status import pretrains, read_status
from launcher.runs import find_run, read_cluster, read_config, reference
from launcher.submission import driving_submission, waiting_submission
from launcher.verbs_submit import job_log, submit_again
from launcher.watching import endings
from trainer.config import RunConfig
from trainer.runlog import RunFolder
from trainer.tracking_config import require_installed

if TYPE_CHECKING:
    from launcher.answers.runs import LogLine

_READ_BYTES = 8 << 20


def run(config: ConfigArgument, overrides: Set = None, storage: Storage = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Run all stages from this machine: prepare, pretrain, export, finetune, report. Run it again and it continues.

    Example: maskwright run my.yaml --set schedule.steps=2000
    """
    with human_output(as_json=as_json):
        finished = _drive(load_run_config(config, overrides or (), storage), load_cluster_config(cluster or "local"), "run")
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
    events = folder.read_events()
    if not pretrains(events):
        raise UsageError(f"run {folder.root.name} only fine-tunes a model, it has nothing to pretrain", "Give the same `maskwright finetune` again.")
    if cluster is None and (last := driving_submission(folder, events)) is not None:
        submit_again(folder, last, overrides or ())
        return
    config = override_run_config(read_config(folder), overrides or ())
    where = load_cluster_config(cluster) if cluster else read_cluster(folder) or LocalCluster()
    _drive(config, where, "resume", deliberate=bool(overrides))


def _drive(config: RunConfig, where: AnyCluster, verb: str, *, deliberate: bool = False) -> RunFolder:
    from launcher.jobs import run_job

    require_trackers(config, where)
    finished = run_job(config, where, console(), verb=verb, deliberate=deliberate)
    _say_finished(finished)
    return finished


def require_trackers(config: RunConfig, where: AnyCluster) -> None:
    """Refuse trackers that are not installed, where rank 0 runs on this machine; elsewhere it looks itself, before step 1 (`Saver.open`)."""
    if isinstance(where, LocalCluster):
        require_installed(config.tracking)


def _say_finished(run: RunFolder) -> None:
    report = [shlex.join(["open", str(run.report)])] if run.report.exists() else []
    next_command(*report, command("status", reference(run)))


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
    if attempt is None and number > 1 and not as_json and folder.rank_log(number, rank).exists():
        print(f"attempt {number}; --attempt shows those before", file=sys.stderr)
    shown, ends = 0, endings(folder)
    while True:
        ended = not follow or next(ends)  # asked before the log is read, so that nothing is missed that was written until then
        newest = _newest_attempt(folder, before) if follow and attempt is None else number
        log = folder.rank_log(number, rank)
        if log.exists():
            shown = _print_log(log, shown, number, rank, as_json=as_json, whole=ended or newest > number)
        elif ended and newest == number:
            if number == 0 and (printed := job_log(folder)) is not None:
                _show(printed, 0, 0, as_json=as_json)
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


def _print_log(log: Location, shown: int, attempt: int, rank: int, *, as_json: bool, whole: bool) -> int:
    """Print what is new and return how far it goes; only whole lines while the log grows."""
    data = b""
    while part := log.read_range(shown + len(data), shown + len(data) + _READ_BYTES):
        data += part
    end = len(data) if whole else data.rfind(b"\n") + 1
    _show(data[:end].decode(errors="replace"), attempt, rank, as_json=as_json)
    return shown + end


def _show(text: str, attempt: int, rank: int, *, as_json: bool) -> None:
    if as_json:
        for line in text.splitlines():
            answer: LogLine = {"attempt": attempt, "rank": rank, "line": line}
            print_json(answer)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def _no_log(run: RunFolder, attempt: int, rank: int) -> NotFoundError:
    if attempt == 0:
        return NotFoundError(f"run {run.root.name} has not trained yet, so it has no rank's log", f"See `maskwright status {run.root.name}`.")
    there = [name for name in attempt_folder(run, attempt).children() if name.startswith("rank-")]
    return NotFoundError(f"attempt {attempt} of run {run.root.name} has no log of rank {rank}", f"There: {', '.join(there) or 'none'}.")


VERBS = (run, resume, logs)
