"""The verb submit, and what other verbs do with a run that was submitted (imports Ray where it talks to a cluster)."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ExitCode, MaskwrightError, UnreachableError
from launcher.config import load_cluster_config, load_run_config
from launcher.options import ConfigArgument, Json, Set, Storage, command, human_output, next_command, print_json, say
from launcher.run_status import has_trained
from launcher.runs import reference
from launcher.submission import Submission, newest_submission, require_ours, submission_folder
from launcher.watching import SILENCE_S
from trainer.runlog import RunFolder

if TYPE_CHECKING:
    from launcher.answers.runs import Submitted
    from launcher.submitting import Prepared
    from launcher.taken_jobs import Jobs, JobState

_LOOK_S = 1.0
_BYTES_PER_S = 256 << 10
"""A job's log is fetched as a whole, and the more seldom the longer it is."""


def submit(
    config: ConfigArgument,
    cluster: Annotated[str, typer.Option("--cluster", metavar="PATH|NAME", help="Cluster YAML, or the name of a built-in one.")],
    overrides: Set = None,
    storage: Storage = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show what it prints until it ends, and exit as it does; Ctrl-C leaves it alone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the cluster would be given, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Hand a run over to a cluster: all stages, driven by a job there. Submit it again and it continues.

    Example: maskwright submit my.yaml --cluster ray.yaml --follow
    """
    from launcher.submitting import prepare_submission

    where = load_cluster_config(cluster)
    prepared = prepare_submission(load_run_config(config, overrides or (), storage), where, verb="run")
    if dry_run:
        _print_request(prepared, as_json=as_json)
        return
    with human_output(as_json=as_json):
        jobs = _submit(prepared)
    if as_json:
        run = prepared.run.root
        answer: Submitted = {"run": run.name, "folder": run.url, "submission": prepared.submission.job, "cluster": jobs.place}
        print_json(answer)
    if follow:
        with human_output(as_json=as_json):
            raise typer.Exit(_follow(jobs, prepared.run, prepared.submission))
    if not as_json:
        _say_what_next(prepared.run)


def _print_request(prepared: "Prepared", *, as_json: bool) -> None:
    request, submission = prepared.request, prepared.submission
    if request.artefact is not None and not as_json:
        sys.stdout.write(request.artefact)
    else:
        print_json({"dashboard": submission.dashboard, **request.to_json(), "command": submission.arguments})


def submit_again(run: RunFolder, last: Submission, overrides: Sequence[str]) -> None:
    """Hand a run over to the cluster that its submission `last` was for, to be resumed there; one that nobody has driven since, as it was meant.

    A job that waits to begin anew may have trained: then what is changed is a change of a run, whatever its first command was.
    """
    from launcher.submitting import prepare_submission

    require_ours(run, last)
    folder, verb, source = submission_folder(run, last.number), "resume", run.config
    if last.waits(run):
        source, overrides = folder / "run.yaml", [*last.overrides, *overrides]
        verb = "resume" if overrides and has_trained(run) else last.arguments[0]
    config = load_run_config(str(source), overrides, storage=run.root.parent.url)
    where = load_cluster_config(str(folder / "cluster.yaml"))
    if getattr(where, "dashboard", None) is not None:
        where = where.model_copy(update={"dashboard": last.dashboard})
    _submit(prepare_submission(config, where, verb=verb, overrides=overrides))
    _say_what_next(run)


def _submit(prepared: "Prepared") -> "Jobs[Any]":
    from launcher.submitting import submit as hand_over

    jobs = hand_over(prepared, say)
    say(f"run {prepared.run.root.name} submitted to {jobs.place} as job {prepared.submission.job}")
    return jobs


def _say_what_next(run: RunFolder) -> None:
    name = reference(run)
    next_command(command("logs", name, "-f"), command("status", name), command("stop", name))


def _follow(jobs: "Jobs[Any]", run: RunFolder, submission: Submission) -> int:
    """Print what the job prints until it ends; its exit code, or that of Ctrl-C, which does not end it."""
    from launcher.submitting import end_of

    try:
        state = _print_until_ended(jobs, submission)
    except KeyboardInterrupt:
        say(f"detached: run {run.root.name} goes on at {jobs.place}")
        _say_what_next(run)
        return int(ExitCode.CTRL_C)
    end = end_of(submission, state)
    if state.exit_code not in {int(code) for code in ExitCode}:  # else its command has said how it ended
        print(f"error: {end.cause}\n{end.remedy}", file=sys.stderr)
    next_command(command("status", reference(run)))
    return end.exit_code


def _print_until_ended(jobs: "Jobs[Any]", submission: Submission) -> "JobState":
    shown, heard_at = 0, time.monotonic()
    while True:
        state = None
        try:
            state = jobs.look(submission.job)  # before the log, so that nothing is missed that was printed until then
            text = jobs.log(submission.job)
            heard_at = time.monotonic()
        except UnreachableError:  # of a log alone, too: its node may have gone, and the job with it
            if state is not None and not state.is_alive:
                return state
            if time.monotonic() - heard_at > SILENCE_S:
                raise
        else:
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
            if not state.is_alive:
                return state
        time.sleep(max(_LOOK_S, shown / _BYTES_PER_S))


def job_log(run: RunFolder) -> str | None:
    """What the job of a run's newest submission has printed; None where there is none, or its cluster does not know it any more."""
    submission = newest_submission(run)
    if submission is None:
        return None
    from launcher.submitting import jobs_of

    try:
        return jobs_of(run, submission).log(submission.job)
    except MaskwrightError:
        return None


VERBS = (submit,)
