"""The verb clean: what lies in a storage and serves nothing any more, with bytes; removed when asked to."""

from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ConflictError, MaskwrightError
from data_pipeline.storage import Location
from launcher import completing
from launcher.options import Json, Storage, command, next_command, print_json, print_table, say
from launcher.runs import find_run, resolve_storage

if TYPE_CHECKING:
    from launcher.answers.runs import Cleaned, LeftoverAnswer
    from launcher.cleaning import Found


def clean(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Only this run's; else the whole storage's.", show_default=False, autocompletion=completing.runs),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed; without it nothing is.")] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """List what serves nothing any more, and remove it with --yes: unfinished saves, damaged checkpoints, torn files, caches, unused corpora.

    Committed checkpoints, and whatever belongs to a run that runs, stay.

    Example: maskwright clean demo --yes
    """
    root, whose, found = _find(run, storage)
    kept = _remove(found, root) if yes else {}
    total = sum(leftover.bytes for leftover in found.leftovers if leftover.location.url not in kept)
    if as_json:
        rows: list[LeftoverAnswer] = [
            {"path": each.location.url, "kind": each.kind, "bytes": each.bytes, "removed": yes and each.location.url not in kept}
            for each in found.leftovers
        ]
        answer: Cleaned = {"leftovers": rows, "bytes": total, "removed": yes, "passed_over": found.passed_over | kept}
        print_json(answer)
    else:
        _show(found)
        if yes:
            say(f"removed {total:,} bytes from {whose}")
        elif found.leftovers:
            say(f"{total:,} bytes; nothing was removed, --yes removes what is listed")
            next_command(f"{command('clean', *([run] if run else []), storage=storage)} --yes")
        else:
            say(f"there is nothing to remove in {whose}")
    if kept:
        path, why = next(iter(kept.items()))
        raise ConflictError(f"{len(kept)} of {len(found.leftovers)} could not be removed; {path}: {why}", "Run `maskwright clean` again later.")


def _find(run: str | None, storage: str | None) -> "tuple[Location, str, Found]":
    """The storage, what was looked through, in words, and what it has."""
    from launcher.cleaning import Found, find_in_run, find_in_storage, in_use

    if run is None:
        root = resolve_storage(storage)
        return root, str(root), find_in_storage(root)
    folder = find_run(run, storage)
    if in_use(folder):
        remedy = f"Stop it first: `maskwright stop {run}`; or wait for the end of `maskwright profile`."
        raise ConflictError(f"run {folder.root.name} runs, is profiled, or waits on a cluster: nothing of it can be removed", remedy)
    return folder.root.parent, f"run {folder.root}", Found(find_in_run(folder), {})


def _remove(found: "Found", root: Location) -> dict[str, str]:
    """What could not be removed, and why."""
    from launcher.cleaning import remove

    kept: dict[str, str] = {}
    for leftover in found.leftovers:
        try:
            remove(leftover, root)
        except MaskwrightError as error:
            kept[leftover.location.url] = error.cause
    return kept


def _show(found: "Found") -> None:
    from launcher.cleaning import WHY

    if found.leftovers:
        print_table(("bytes", "what", "where"), ((f"{each.bytes:,}", WHY[each.kind], each.location) for each in found.leftovers))
    for name, why in found.passed_over.items():
        say(f"passed over: {name}: {why}")


VERBS = (clean,)
