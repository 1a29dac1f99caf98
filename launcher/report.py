"""The report of a run: one self-contained HTML page made from what the run folder holds, finished or not (reads the run, writes report.html)."""

import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import MaskwrightError
from data_pipeline.mixture import MIXTURE
from data_pipeline.storage import Location
from launcher.report_figures import attempt_starts, line_figure, mlm_figure, nsp_figure
from launcher.scores import SYSTEMS, spread, validation_verdict, verdict
from trainer.runlog import RunFolder

_TEMPLATE = "report_template.html.j2"
_MAX_EVENTS = 500
_QUIET_EVENTS = {"checkpoint_committed", "validation"}  # many, and shown elsewhere
_HIDDEN_DETAILS = {"time", "kind", "attempt", "step", "settings", "problems"}
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SIGNATURES = re.compile(r"(?i)([?&][\w.-]*(?:sig|signature|password|secret|token|key|credential)[\w.-]*=)[^&\s'\";]+")
_SECRET_LINES = re.compile(r"(?im)^(\s*[\w.-]*(?:password|secret|token|api_key|access_key|credential)s?\s*:\s*)\S.*$")
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


def write_report(run: RunFolder, target: Location | None = None) -> Location:
    """Write `report.html`, or another file, from what there is of the run: parts that are missing are left out. Returns where it lies."""
    page = target or run.report
    page.write_bytes(render(collect(run)).encode())
    return page


@dataclass(frozen=True)
class Report:
    """What the page shows; strings are plain text, the template escapes them."""

    name: str
    state: str
    verdicts: list[str]
    facts: list[tuple[str, str]]
    pictures: list[tuple[str, str]]
    """(what it shows, data URI)."""
    data: list[tuple[str, str]]
    scores: list[dict[str, Any]]
    recoveries: list[str]
    events: list[dict[str, str]]
    config: str
    versions: list[tuple[str, str]]
    written: str


def collect(run: RunFolder) -> Report:
    """Read the run folder and the corpus that it names."""
    events, metrics = run.read_events(), run.read_metrics()
    manifest, results = _newest_manifest(run), read_results_of(run)
    validations = [event for event in events if event["kind"] == "validation"]
    return Report(
        name=run.root.name,
        state=_state(events),
        verdicts=[*map(verdict, results), *([validation_verdict(validations[-1])] if validations else [])],
        facts=_facts(events, metrics, manifest),
        pictures=_pictures(metrics, validations),
        data=_data(events),
        scores=[_score_rows(result) for result in results],
        recoveries=[_recovery(event) for event in events if event["kind"] == "resumed"],
        events=_event_rows(events),
        config=_redacted(run.config.read_bytes().decode()) if run.config.exists() else "",
        versions=_versions(manifest),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def render(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("launcher", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(_TEMPLATE).render(report=report, systems=SYSTEMS)


def read_results_of(run: RunFolder) -> list[dict[str, Any]]:
    """results.json of every finished task, by name."""
    files = [run.finetune / task / "results.json" for task in run.finetune.children()]
    return [_redacted_values(file.read_json()) for file in files if file.exists()]


def _state(events: Sequence[Mapping[str, Any]]) -> str:
    """One line: how the run ended, or how far it is."""
    last = next((event for event in reversed(events) if event["kind"] in {"finished", "failed", "stopped", "interrupted"}), None)
    latest = max((index for index, event in enumerate(events) if event["kind"] in {"command_started", "attempt_started"}), default=-1)
    if last is None or events.index(last) < latest:
        stages = [event["stage"] for event in events if event["kind"] == "stage_finished"]
        return f"Not finished; stages done: {', '.join(dict.fromkeys(stages)) or 'none'}."
    if last["kind"] == "finished":
        return "Finished."
    return _redacted(f"{last['kind'].capitalize()}: {last.get('cause', 'cause not recorded')}")


def _facts(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("optimizer steps", f"{len(metrics):,}")] if metrics else []
    state = manifest.get("train_state", {})
    if state.get("tokens_seen"):
        facts.append(("tokens seen", f"{state['tokens_seen']:,}"))
    speeds = sorted(record["tokens_per_s"] for record in metrics if record.get("tokens_per_s"))
    if speeds:
        facts.append(("median tokens per second", f"{speeds[len(speeds) // 2]:,.0f}"))
    if manifest:
        shape = f"{manifest.get('world_size')} ranks, ZeRO {manifest.get('zero_stage')}, {manifest.get('precision')}, {manifest.get('device')}"
        facts.append(("trained on", shape))
    attempts = {event["attempt"] for event in events if event["kind"] == "attempt_started"}
    if attempts:
        facts.append(("worker groups started", str(len(attempts))))
    stages: dict[str, float] = {}
    for event in events:
        if event["kind"] == "stage_finished":
            stages[event["stage"]] = stages.get(event["stage"], 0.0) + event.get("elapsed_s", 0.0)
    return [*facts, *((f"time for {stage}", _duration(seconds)) for stage, seconds in stages.items())]


def _pictures(metrics: list[dict[str, Any]], validations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    starts = attempt_starts(metrics)
    drawn = {
        "Masked-LM loss over optimizer steps, training and validation": mlm_figure(metrics, validations),
        "Next-sentence loss over optimizer steps, training and validation": nsp_figure(metrics, validations),
        "Throughput over optimizer steps": line_figure("Throughput (real tokens per second)", "tokens_per_s", metrics, starts),
        "Learning rate over optimizer steps": line_figure("Learning rate", "lr", metrics),
        "Gradient norm over optimizer steps": line_figure("Gradient norm before clipping", "grad_norm", metrics, starts),
    }
    return [(text, picture) for text, picture in drawn.items() if picture]


def _data(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What went in, from corpus.json; empty when there is no corpus yet or it is gone."""
    folder = next((event["corpus"] for event in reversed(events) if event["kind"] == "stage_finished" and event.get("corpus")), None)
    if folder is not None and (Location(folder) / MIXTURE).exists():
        parts: list[dict[str, Any]] = (Location(folder) / MIXTURE).read_json()["corpora"]
        return [("mixture", Location(folder).name), *((str(part["corpus"]), f"weight {part['weight']:g}") for part in parts)]
    if folder is None or not (Location(folder) / "corpus.json").exists():
        return []
    corpus: dict[str, Any] = (Location(folder) / "corpus.json").read_json()
    sources = ", ".join(str(source.get("name", source)) for source in corpus.get("sources", ()))
    counts: dict[str, Any] = corpus.get("counts", {})
    rows = [("corpus", Location(folder).name), ("sources", _redacted(sources))]
    rows += [(text, f"{counts[key]:,}") for key, text in _DATA_ROWS if key in counts]
    if "vocabulary" in corpus:
        rows.append(("vocabulary", f"{corpus['vocabulary']['size']:,} tokens"))
    if "unigram_entropy" in corpus:
        rows.append(("unigram entropy", f"{corpus['unigram_entropy']:.3f} nats"))
    return rows


def _score_rows(results: Mapping[str, Any]) -> dict[str, Any]:
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


def _recovery(event: Mapping[str, Any]) -> str:
    exact = event.get("not_bit_exact_because")
    return _redacted(
        f"Attempt {event['attempt']} resumed at step {event['step']}: micro-batches repeated {event.get('repeated', 0)}, skipped "
        f"{event.get('skipped', 0)}; steps lost {event.get('steps_lost', 0)}, seconds lost {event.get('seconds_lost') or 0:.1f}; "
        f"cause: {event.get('cause', 'not recorded')}{f'; not bit-exact: {exact}' if exact else ''}"
    )


def _event_rows(events: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    shown = [event for event in events if event["kind"] not in _QUIET_EVENTS][-_MAX_EVENTS:]
    return [
        {
            "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])),
            "kind": event["kind"].replace("_", " "),
            "attempt": str(event["attempt"] or ""),
            "step": "" if event["step"] is None else str(event["step"]),
            "details": _redacted(
                "; ".join(f"{key} {value}" for key, value in event.items() if key not in _HIDDEN_DETAILS and value not in (None, []))
            ),
        }
        for event in shown
    ]


def _newest_manifest(run: RunFolder) -> dict[str, Any]:
    """The manifest of the newest committed checkpoint; empty when there is none to be read."""
    for name in reversed([name for name in run.checkpoints.children() if re.fullmatch(r"step-\d+", name)]):
        try:
            return (run.checkpoints / name / "MANIFEST.json").read_json()
        except (MaskwrightError, ValueError):
            continue
    return {}


def _versions(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions: Iterable[tuple[str, Any]] = manifest.get("versions", {}).items()
    return [("python", platform.python_version()), ("platform", platform.platform()), *((name, str(version)) for name, version in versions)]


def _redacted(text: str) -> str:
    """Without credentials and signatures in URLs and values of keys that name secrets."""
    return _SECRET_LINES.sub(r"\1(redacted)", _SIGNATURES.sub(r"\1(redacted)", _CREDENTIALS.sub("(redacted)@", text)))


def _redacted_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted_values(item) for key, item in value.items()}
    return _redacted(value) if isinstance(value, str) else value


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
