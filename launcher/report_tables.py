"""The tables of a run's report: facts, data, attempts, goodput, scores, versions (reads the run's manifest and corpus)."""

import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.errors import MaskwrightError
from data_pipeline.mixture import MIXTURE
from data_pipeline.storage import Location
from launcher.goodput import Goodput, lost_parts
from launcher.history import Attempt, Events, History
from launcher.scores import SYSTEMS, spread
from launcher.step_phases import StepPhases
from trainer.redaction import redacted
from trainer.runlog import RunFolder

Rows = list[tuple[str, str]]
_DATA_ROWS = (
    ("documents", "documents read"),
    ("duplicates", "exact duplicates dropped"),
    ("empty", "empty documents dropped"),
    ("train_documents", "documents for training"),
    ("validation_documents", "documents for validation"),
    ("train_sentences", "sentences for training"),
    ("train_tokens", "tokens for training"),
    ("validation_tokens", "tokens for validation"),
)


def facts(events: Events, history: History, manifest: Mapping[str, Any]) -> Rows:
    """How much was trained on what, and how long each stage took. `history` has each step once."""
    rows = [("optimizer steps", f"{len(history):,}")] if len(history) else []
    state = manifest.get("train_state", {})
    if state.get("tokens_seen"):
        rows.append(("tokens seen", f"{state['tokens_seen']:,}"))
    speeds = history.values["tokens_per_s"]
    if not np.isnan(speeds).all():
        rows.append(("median tokens per second", f"{np.nanmedian(speeds):,.0f}"))
    for name, text in (("mfu", "median MFU, of a measured matrix product"), ("mfu_stated", "median MFU, of the stated peak")):
        if not np.isnan(history.values[name]).all():
            rows.append((text, f"{np.nanmedian(history.values[name]):.1%}"))
    if manifest:
        shape = f"{manifest.get('world_size')} ranks, ZeRO {manifest.get('zero_stage')}, {manifest.get('precision')}, {manifest.get('device')}"
        rows.append(("trained on", shape))
    stages: dict[str, float] = {}
    for event in events:
        if event["kind"] == "stage_finished":
            stages[event["stage"]] = stages.get(event["stage"], 0.0) + event.get("elapsed_s", 0.0)
    return [*rows, *((f"time for {stage}", duration(seconds)) for stage, seconds in stages.items())]


def data(events: Events) -> Rows:
    """What went in, from corpus.json; of a mixture each corpus. Empty when there is no corpus yet or it is gone."""
    folder = next((Location(event["corpus"]) for event in reversed(events) if event["kind"] == "stage_finished" and event.get("corpus")), None)
    if folder is None or not (folder / MIXTURE).exists():
        return list(_corpus_rows(folder)) if folder is not None else []
    parts: list[dict[str, Any]] = (folder / MIXTURE).read_json()["corpora"]
    whole = sum(part["weight"] for part in parts)
    rows = [("mixture", folder.name)]
    for part in parts:
        rows.append(("share of samples", f"{part['weight'] / whole:.1%} (weight {part['weight']:g}) from:"))
        rows += _corpus_rows(folder.parent / part["corpus"])
    return rows


def _corpus_rows(folder: Location) -> Iterator[tuple[str, str]]:
    if not (folder / "corpus.json").exists():
        return
    corpus: dict[str, Any] = (folder / "corpus.json").read_json()
    counts: dict[str, Any] = corpus.get("counts", {})
    yield "corpus", folder.name
    yield "sources", redacted(", ".join(str(source.get("name", source)) for source in corpus.get("sources", ())))
    yield from ((text, f"{counts[key]:,}") for key, text in _DATA_ROWS if key in counts)
    if "vocabulary" in corpus:
        yield "vocabulary", f"{corpus['vocabulary']['size']:,} tokens"
    if "unigram_entropy" in corpus:
        yield "unigram entropy", f"{corpus['unigram_entropy']:.3f} nats"


def attempt_rows(attempts: Sequence[Attempt]) -> list[tuple[str, ...]]:
    """Number, ranks, ZeRO stage, start, length, steps, end, cause; as `ATTEMPT_COLUMNS` name them."""
    return [
        (
            str(each.number),
            "" if each.world_size is None else f"{each.world_size} {each.device}",
            "" if each.zero_stage is None else str(each.zero_stage),
            moment(each.started_at),
            "" if each.ended_at is None else duration(each.ended_at - each.started_at),
            "none" if each.first_step is None else f"{each.first_step} to {each.last_step}",
            each.ended,
            redacted(each.cause),
        )
        for each in attempts
    ]


ATTEMPT_COLUMNS = ("attempt", "ranks", "ZeRO", "started", "took", "steps", "ended", "cause")


def goodput_rows(found: Goodput) -> list[dict[str, str]]:
    """Each cause that took time: its key, what it means, how long, and its share in per cent."""
    return [
        {"cause": part["cause"], "text": part["text"], "time": duration(part["seconds"]), "percent": f"{100 * part['share']:.2f}"}
        for part in lost_parts(found)
    ]


def phase_rows(found: StepPhases | None) -> list[dict[str, str]]:
    """Each phase of a step that took time: its key, what it means, its mean, and its share in per cent."""
    if found is None:
        return []
    return [
        {"phase": part.phase, "text": part.text, "time": f"{1000 * part.seconds:,.1f} ms", "percent": f"{100 * part.share:.2f}"}
        for part in found.parts
    ]


def score_rows(results: Mapping[str, Any]) -> dict[str, Any]:
    """One task: each system's scores, the best marked."""
    best = max(SYSTEMS, key=lambda system: results[system]["mean"])
    rows = [
        {
            "system": name,
            "accuracy": spread(results[system]),
            "macro_f1": spread(results[system]["macro_f1"]),
            "seeds": ", ".join(f"{value:.3f}" for value in results[system]["seeds"]),
            "best": system == best,
        }
        for system, name in SYSTEMS.items()
    ]
    num_rows: dict[str, int] = results.get("num_rows", {})
    sizes = ", ".join(f"{num_rows[split]:,} {split}" for split in ("train", "dev", "test") if split in num_rows)
    return {
        "task": results["task"],
        "rows": rows,
        "sizes": f"{len(results.get('labels', ()))} labels; rows: {sizes}; always the most common label: {results.get('most_common_label', 0):.3f}",
    }


def newest_manifest(run: RunFolder) -> dict[str, Any]:
    """The manifest of the newest committed checkpoint; empty when there is none to be read."""
    for name in reversed([name for name in run.checkpoints.children() if re.fullmatch(r"step-\d+", name)]):
        try:
            return (run.checkpoints / name / "MANIFEST.json").read_json()
        except (MaskwrightError, ValueError):
            continue
    return {}


def versions(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of Python here, and of the libraries that trained."""
    found: Iterable[tuple[str, Any]] = manifest.get("versions", {}).items()
    return [("python", platform.python_version()), ("platform", platform.platform()), *((name, str(version)) for name, version in found)]


def moment(seconds: float) -> str:
    """A time of day, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """`2 h 3 min`, `4 min 5 s`, `6.7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
