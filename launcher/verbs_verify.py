"""The verb verify: is a corpus, a checkpoint or a model, on any storage, still what was written?"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_pipeline.errors import DataCorruptError, MaskwrightError, NoCheckpointError, NotFoundError
from data_pipeline.storage import Location
from launcher.options import Json, next_command, print_fields, print_json, say
from trainer.runlog import RunFolder

_CORPUS, _MIXTURE, _CHECKPOINT, _MODEL = "corpus.json", "mixture.json", "MANIFEST.json", "lineage.json"

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class _Verdict:
    """What was found; `fields` count what was read."""

    problems: list[str]
    fields: dict[str, Any]


def verify(
    path: Annotated[str, typer.Argument(metavar="CORPUS|CHECKPOINT|MODEL", help="Folder or URL, such as runs/demo/checkpoints/step-00001000.")],
    as_json: Json = False,
) -> None:
    """Re-hash everything in a corpus, a checkpoint or a model; exit code 14 (of a checkpoint 13) when it is damaged.

    Example: maskwright verify runs/corpora/python-docs-0123456789ab
    """
    folder = Location.at(path)
    kind, check = _recognise(folder)
    with _progress(quiet=as_json) as on_bytes:
        verdict = check(folder, on_bytes)
    if as_json:
        print_json({"path": folder.url, "kind": kind, "intact": not verdict.problems, "problems": verdict.problems, **verdict.fields})
    else:
        print_fields({"path": folder, "kind": kind, **verdict.fields})
        for problem in verdict.problems:
            say(f"  {problem}")
    if verdict.problems:
        raise _damaged(kind, folder, verdict.problems)
    if not as_json:
        say(f"{folder} is intact")
        next_command(_next(kind, folder))


def _recognise(folder: Location) -> tuple[str, Callable[[Location, OnBytes], _Verdict]]:
    kinds = {_CORPUS: ("corpus", _check_corpus), _MIXTURE: ("mixture", _check_mixture)}
    kinds |= {_CHECKPOINT: ("checkpoint", _check_checkpoint), _MODEL: ("model", _check_model)}
    found = next((kind for name, kind in kinds.items() if (folder / name).exists()), None)
    if found is not None:
        return found
    if folder.name.startswith("step-") and folder.exists():
        raise NoCheckpointError(f"{folder} has no {_CHECKPOINT}: it is not a committed checkpoint", "Give the folder of a committed checkpoint.")
    if (run := RunFolder(folder)).config.exists():
        raise NotFoundError(
            f"{folder} is a run, of which each part is verified by itself", f"Give one of {run.checkpoints}/step-*, {run.models}/* or the corpus."
        )
    if folder.is_local and not folder.exists():
        raise NotFoundError(f"{folder} does not exist", "Give the folder of a corpus, a checkpoint or an exported model.")
    files = ", ".join(kinds)
    raise NotFoundError(f"{folder} holds none of {files}", "Give the folder of a corpus, a checkpoint or an exported model.")


def _check_corpus(folder: Location, on_bytes: OnBytes) -> _Verdict:
    from data_pipeline.config import DataConfig
    from data_pipeline.verification import verify_corpus

    found = verify_corpus(folder, DataConfig(cache_bytes=0), on_bytes)  # what lies there, not this node's copy of it
    return _Verdict(found.problems, {"shards": found.shards, "blocks": found.blocks, "bytes": found.bytes, **found.counts})


def _check_mixture(folder: Location, on_bytes: OnBytes) -> _Verdict:
    """Each corpus of it, and that it is still the one that was mixed."""
    import hashlib

    problems: list[str] = []
    parts: list[dict[str, Any]] = (folder / _MIXTURE).read_json()["corpora"]
    for part in parts:
        corpus = folder.parent / part["corpus"]
        problems += _check_corpus(corpus, on_bytes).problems
        if hashlib.sha256((corpus / _CORPUS).read_bytes()).hexdigest() != part["fingerprint"]:
            problems.append(f"{corpus} is not the corpus that {folder / _MIXTURE} names")
    return _Verdict(problems, {"corpora": len(parts)})


def _check_checkpoint(folder: Location, on_bytes: OnBytes) -> _Verdict:
    from trainer.verification import verify_checkpoint

    return _Verdict([str(problem) for problem in verify_checkpoint(folder, on_bytes)], {})


def _check_model(folder: Location, on_bytes: OnBytes) -> _Verdict:
    from trainer.verification import verify_model

    return _Verdict([str(problem) for problem in verify_model(folder, on_bytes)], {})


def _damaged(kind: str, folder: Location, problems: list[str]) -> MaskwrightError:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    cause = f"{kind} {folder} is damaged: {problems[0]}{more}"
    if kind == "checkpoint":
        return NoCheckpointError(cause, "Resume the run: it falls back to the checkpoint before, by itself.")
    if kind == "model":
        return DataCorruptError(cause, "Export it again: `maskwright export RUN`, or restore it from a copy.")
    return DataCorruptError(cause, "Restore what is damaged from a copy, or remove the corpus folder and run `maskwright prepare` again.")


def _next(kind: str, folder: Location) -> str:
    if kind == "checkpoint":
        return f"maskwright export {folder.parent.parent}"
    return f"maskwright evaluate {folder} --text 'Some [MASK] text.'" if kind == "model" else f"maskwright report {folder}"


@contextmanager
def _progress(*, quiet: bool) -> Generator[OnBytes]:
    """A bar over bytes, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("verify"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


VERBS = (verify,)
