"""Options that verbs share, and how they print (writes to the console)."""

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launcher import completing

_NEEDS_RUN = {"status", "logs", "stop", "resume", "export", "report", "profile"}
_COMMAND = re.compile(rf"`maskwright ({'|'.join(sorted(_NEEDS_RUN))}|list|submit|finetune|evaluate|clean|run|prepare|inspect)\b((?: [^`]*)?)`")

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a run YAML.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run id (looked for in the storage), or the run's folder or URL.", autocompletion=completing.runs)
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. schedule.steps=1000; the value is YAML. Repeatable.")
]
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="PATH|URL", help="Where corpora and runs lie. Else as CONFIG says, else $MASKWRIGHT_STORAGE, else ./runs."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout (`maskwright schema --answers` says which), and no text for people.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="PATH|NAME",
        help="Cluster YAML, or the name of a built-in one.",
        show_default="local",
        autocompletion=completing.clusters,
    ),
]


class _Console(Console):
    """A run goes on when nobody reads its output any more, as in `maskwright run … | head` or after its terminal was closed."""

    def on_broken_pipe(self) -> None:  # rich would end the process
        discard_output()

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            discard_output()  # that is what a closed terminal answers


def discard_output() -> None:
    """Print to nowhere from now on: who read our output has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


_LONG_CELL = 60


def console() -> Console:
    """Where human output goes. Paths must not be broken when nobody looks at a screen."""
    return _Console() if sys.stdout.isatty() else _Console(width=160, soft_wrap=True)


def human_output(*, as_json: bool) -> AbstractContextManager[Any]:
    """Around work that tells people what it does: with --json they read it on stderr, and stdout is left to the answer."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def print_json(value: Any) -> None:
    """One JSON document on one line, so that several make JSON lines."""
    print(json.dumps(value), flush=True)


def say(text: str) -> None:
    """A line for people."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


def command(verb: str, *arguments: object, overrides: Iterable[str] | None = None, storage: str | None = None, cluster: str | None = None) -> str:
    """A command that can be pasted into a shell, with the options that the present one was given."""
    options = [("--set", override) for override in overrides or ()]
    options += [(name, value) for name, value in (("--storage", storage), ("--cluster", cluster)) if value is not None]
    return shlex.join(["maskwright", verb, *map(str, arguments), *(word for option in options for word in option)])


def completed(remedy: str, *, run: str | None = None, storage: str | None = None) -> str:
    """A remedy whose commands name the run, and the storage where the present command was given one."""

    def complete(match: re.Match[str]) -> str:
        verb, arguments = match[1], match[2]
        if run is not None and not arguments and verb in _NEEDS_RUN:
            arguments = f" {shlex.quote(run)}"
        if storage is not None and "/" not in arguments and "--storage" not in arguments:
            arguments += f" --storage {shlex.quote(storage)}"
        return f"`maskwright {verb}{arguments}`"

    return _COMMAND.sub(complete, remedy)


def next_command(*commands: str) -> None:
    """What one would do next."""
    say("\n".join(f"{'next:' if index == 0 else '     '} {command}" for index, command in enumerate(commands)))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table without ornament. Long cells take several lines, so that none crowds its neighbours out."""
    cells = [[str(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for nth, column in enumerate(columns):
        longest = max((len(row[nth]) for row in cells), default=0)
        table.add_column(column, no_wrap=longest <= _LONG_CELL, max_width=max(longest, len(column)) if longest <= _LONG_CELL else None)
    for row in cells:
        table.add_row(*row)
    console().print(table, soft_wrap=False)


def fields_table(fields: Mapping[str, Any]) -> Table:
    """Names and values, those that have one."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in fields.items():
        if value not in (None, ""):
            table.add_row(name, str(value))
    return table


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print names and values, those that have one."""
    console().print(fields_table(fields))
