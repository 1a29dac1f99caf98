"""What the shell offers when somebody presses Tab: runs, and built-in clusters (reads storage, bounded in time; loads no torch or Ray)."""

from contextlib import suppress

import typer

from data_pipeline.errors import MaskwrightError
from launcher.config import example_configs
from launcher.runs import resolve_storage, run_ids

_ANSWER_S = 2.0
"""Who has pressed a key waits no longer; a store may be slow, and a mount dead."""


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """Ids of the runs that begin so, in the storage that the line names so far; none where storage does not answer. A path is the shell's affair."""
    if "/" in incomplete:
        return []
    from launcher.aside import Aside

    storage: str | None = context.params.get("storage")
    known: list[str] = []
    with suppress(MaskwrightError, OSError):  # a complaint in the middle of a line that is being typed would only be in the way
        known = Aside(lambda: run_ids(resolve_storage(storage))).ask(_ANSWER_S)
    return [run for run in known if run.startswith(incomplete)]


def clusters(incomplete: str) -> list[str]:
    """Names of the built-in clusters that begin so."""
    return sorted(file.stem for file in (example_configs() / "clusters").glob("*.yaml") if file.stem.startswith(incomplete))
