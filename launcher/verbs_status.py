"""Verbs that show where runs are: list and status."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.live import Live

from data_pipeline.errors import ExitCode, MaskwrightError
from launcher.options import Json, RunArgument, Storage, command, console, fields_table, next_command, print_fields, print_json, print_table, say
from launcher.progress import clock, human
from launcher.run_status import RunStatus, read_status
from launcher.runs import find_run, resolve_storage, run_ids
from launcher.start_up import tell_start_up
from launcher.watching import status_of, statuses
from trainer.runlog import RunFolder

_LOOK_S = 1.0
_REMOTE_LOOK_S = 10.0
Show = Callable[[RunStatus], None]


def list_(storage: Storage = None, as_json: Json = False) -> None:
    """List the runs in a storage, as they tell it: no cluster is asked.

    Example: maskwright list --storage /data/runs
    """
    root = resolve_storage(storage)
    found: list[RunStatus] = []
    for name in run_ids(root):
        try:
            found.append(read_status(RunFolder(root / name)))
        except MaskwrightError as error:  # one run that cannot be read must not hide the others
            print(f"{name}: {error.cause}", file=sys.stderr)
    if as_json:
        print_json([status.to_json() for status in found])
        return
    if not found:
        say(f"no runs in {root}")
        next_command(f"{command('run', 'CONFIG', storage=storage)}")
        return
    rows = ((s.id, s.state, _steps(s), _first_loss(s), human(s.tokens_per_s), s.recoveries, _ago(s.updated_at)) for s in found)
    print_table(("run", "state", "step", "loss", "tokens/s", "recoveries", "updated"), rows)
    newest = max(found, key=lambda status: status.updated_at or 0.0)
    next_command(command("status", newest.id, storage=storage))


def status(
    run: RunArgument,
    storage: Storage = None,
    as_json: Json = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 0 finished, 20 running, otherwise the code the run ended with.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until the run ends; Ctrl-C leaves it alone.")] = False,
) -> None:
    """Show where a run is: stage, step, losses, speed, checkpoints, recoveries, and how it ended.

    Example: maskwright status demo --watch --exit-code
    """
    folder = find_run(run, storage)
    found = _watch(folder, as_json=as_json) if watch else status_of(folder)
    if as_json and not watch:
        print_json(found.to_json())
    elif not as_json:
        print_fields(_fields(found))
        next_command(_after(found, run, storage))
    if exit_code:
        raise typer.Exit(found.exit_code)


def _watch(run: RunFolder, *, as_json: bool) -> RunStatus:
    """Show a run until it has ended: on a terminal all of it and ever anew, elsewhere a line for each change. Returns its end."""
    try:
        with _showing(as_json=as_json) as show:
            looks = statuses(run)
            show(found := next(looks))
            while found.exit_code == ExitCode.RUNNING:
                time.sleep(_LOOK_S if run.root.is_local else _REMOTE_LOOK_S)
                show(found := next(looks))
            return found
    except KeyboardInterrupt:
        print(f"not watched any more: run {run.root.name} goes on", file=sys.stderr)
        raise typer.Exit(int(ExitCode.CTRL_C)) from None


@contextmanager
def _showing(*, as_json: bool) -> Generator[Show]:
    screen = console()
    if as_json:
        yield _OnChange(lambda status: print_json(status.to_json()))
    elif not screen.is_terminal:
        yield _OnChange(lambda status: say(_line(status)))
    else:
        with Live(console=screen, auto_refresh=False, transient=True) as live:
            yield lambda status: live.update(fields_table(_fields(status)), refresh=True)


@dataclass
class _OnChange:
    """Shows a status that differs from the one shown before in what counts; of steps, each tenth of them."""

    show: Show
    _shown: tuple[object, ...] = ()

    def __call__(self, status: RunStatus) -> None:
        counts = (status.state, status.stage, status.cause, status.attempt, status.last_checkpoint, 10 * status.step // max(1, status.steps))
        if counts != self._shown:
            self._shown = counts
            self.show(status)


def _line(status: RunStatus) -> str:
    losses = [f"{name} {_rounded(value)}" for name, value in status.losses.items() if value is not None]
    speed = [f"{human(status.tokens_per_s)} tokens/s"] if status.tokens_per_s is not None else []
    saved = [] if status.last_checkpoint is None else [f"checkpoint of step {status.last_checkpoint}"]
    steps = [f"step {_steps(status)}"] if status.pretrains else []
    return "  ".join([_state(status), *steps, *losses, *speed, *saved, *([status.cause] if status.cause else [])])


def _fields(status: RunStatus) -> dict[str, Any]:
    return {
        "run": status.id,
        "folder": status.folder,
        "state": _state(status),
        "cause": status.cause,
        "remedy": status.remedy,
        "stages": ", ".join(f"{name} {clock(seconds)}" for name, seconds in status.stages.items()),
        **(_training(status) if status.pretrains else {}),
        "time left": clock(status.seconds_left) if status.seconds_left else None,
        "checkpoint": None if status.last_checkpoint is None else f"step {status.last_checkpoint}",
        "attempts": _attempts(status),
        "left out": _left_out(status),
        "start-up": tell_start_up(status.start_up),
        "process": f"{status.pid} on {status.host}" if status.pid else None,
        "job": status.submission,
        "updated": _ago(status.updated_at),
    }


def _training(status: RunStatus) -> dict[str, Any]:
    losses = {f"{name} loss": _rounded(value) for name, value in status.losses.items()}
    return {"step": f"{status.step} of {status.steps}", **losses, "tokens/s": human(status.tokens_per_s)}


def _state(status: RunStatus) -> str:
    return f"{status.state} ({status.stage})" if status.stage else status.state


def _attempts(status: RunStatus) -> str:
    if not status.pretrain_attempts:
        return ""
    return f"{status.pretrain_attempts} of pretraining, {status.recoveries} resumed, {status.steps_lost} steps lost"


def _left_out(status: RunStatus) -> str:
    """What the model did not see, on purpose."""
    parts = ((status.blocks_skipped, "damaged blocks"), (status.batches_skipped, "batches in numeric trouble"))
    return ", ".join(f"{number} {what}" for number, what in parts if number)


def _after(status: RunStatus, run: str, storage: str | None) -> str:
    if status.state == "failed" and not status.attempt:  # no rank has a log; the cause is above
        return command("resume", run, storage=storage)
    verb = {"running": "logs", "submitted": "logs", "finished": "report", "failed": "logs"}.get(status.state, "resume")
    return command(verb, run, *(["-f"] if verb == "logs" and status.state != "failed" else []), storage=storage)


def _steps(status: RunStatus) -> str:
    return f"{status.step}/{status.steps}" if status.pretrains else "-"


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


VERBS = (list_, status)
