"""The report of a run: one self-contained HTML page made from what the run folder holds, finished or not (reads the run, writes report.html)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.config import ObjectiveConfig
from data_pipeline.errors import MaskwrightError
from data_pipeline.storage import Location
from launcher import report_tables as tables
from launcher.event_texts import tell, title
from launcher.goodput import Goodput, goodput
from launcher.history import Attempt, Events, History, attempts_of, read_history
from launcher.lease import holder
from launcher.proof import Proof, prove
from launcher.report_figures import Curve, attempt_starts, line_figure, sentence_figure, token_figure
from launcher.scores import SYSTEMS, TOKEN_LOSS, validation_verdict, verdict
from launcher.step_phases import StepPhases
from trainer.config import RunConfig
from trainer.redaction import redacted, redacted_values
from trainer.runlog import RunFolder

_TEMPLATE = "report_template.html.j2"
_MAX_EVENTS = 500
_QUIET_EVENTS = {"checkpoint_committed", "validation"}  # many, and shown elsewhere
_RECOVERY_EVENTS = {
    "resumed",
    "continued",
    "worker_failed",
    "rank_unhealthy",
    "resized",
    "preempted",
    "checkpoint_failed",
    "checkpoint_damaged",
    "numeric_trouble",
    "batch_skipped",
    "data_skipped",
}


@dataclass(frozen=True)
class Report:
    """What the page shows; strings are plain text, the template escapes them."""

    name: str
    state: str
    verdicts: list[str]
    facts: tables.Rows
    pictures: list[tuple[str, str]]
    """(what it shows, data URI)."""
    data: tables.Rows
    scores: list[dict[str, Any]]
    attempts: list[Attempt]
    goodput: Goodput
    phases: StepPhases | None
    """None where no step has a time line."""
    proof: Proof | None
    """None before the first step, and where the configuration cannot be read."""
    recoveries: list[dict[str, str]]
    events: list[dict[str, str]]
    config: str
    versions: tables.Rows
    written: str

    def to_json(self) -> dict[str, Any]:
        """What is evidence, for programs."""
        return {
            "attempts": [redacted_values(asdict(attempt)) for attempt in self.attempts],
            "goodput": self.goodput.to_json(),
            "step_phases": None if self.phases is None else self.phases.to_json(),
            "proof": None if self.proof is None else self.proof.to_json(),
        }

    def summary(self) -> list[str]:
        """The evidence in a few lines."""
        lines = [f"goodput {self.goodput.share:.1%} of {tables.duration(self.goodput.wall_s)}"] if self.goodput.wall_s else []
        lines += [self.phases.summary()] if self.phases is not None else []
        return [*lines, *([self.proof.verdict()] if self.proof is not None else [])]


def write_report(run: RunFolder, target: Location | None = None, *, all_steps: bool = False) -> Report:
    """Write `report.html`, or another file, from what there is of the run: parts that are missing are left out. See `collect`."""
    report = collect(run, all_steps=all_steps)
    (target or run.report).write_bytes(render(report).encode())
    return report


def collect(run: RunFolder, *, all_steps: bool = False) -> Report:
    """Read the run folder and the corpus that it names; with `all_steps` the batch of every step is computed anew, else of some."""
    events = run.read_events()
    history = read_history(run, events)
    kept, attempts = history.surviving(), attempts_of(events, history)
    if attempts and attempts[-1].ended == "running" and holder(run) is None:
        attempts[-1] = replace(attempts[-1], ended="lost", cause="the command that ran it was killed")
    manifest, results = tables.newest_manifest(run), read_results_of(run)
    validations = [event for event in events if event["kind"] == "validation"]
    config = _config(run)
    objective = ObjectiveConfig() if config is None else config.objective
    proof = _proof(run, config, history, events, all_steps=all_steps) if config is not None and len(history) else None
    return Report(
        name=run.root.name,
        state=_state(events),
        verdicts=[*map(verdict, results), *([validation_verdict(validations[-1], objective.kind)] if validations else [])],
        facts=tables.facts(events, kept, manifest),
        pictures=_pictures(objective.kind, kept, validations),
        data=tables.data(events),
        scores=[tables.score_rows(result) for result in results],
        attempts=attempts,
        goodput=goodput(attempts, history, events),
        phases=StepPhases.of(kept),
        proof=proof,
        recoveries=_event_rows([event for event in events if event["kind"] in _RECOVERY_EVENTS]),
        events=_event_rows([event for event in events if event["kind"] not in _QUIET_EVENTS]),
        config=redacted(run.config.read_bytes().decode()) if run.config.exists() else "",
        versions=tables.versions(manifest),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def render(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("launcher", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        systems=SYSTEMS,
        attempts=tables.attempt_rows(report.attempts),
        attempt_columns=tables.ATTEMPT_COLUMNS,
        goodput=tables.goodput_rows(report.goodput),
        phases=tables.phase_rows(report.phases),
        duration=tables.duration,
    )


def read_results_of(run: RunFolder) -> list[dict[str, Any]]:
    """results.json of every finished task, by name."""
    files = [run.finetune / task / "results.json" for task in run.finetune.children()]
    return [redacted_values(file.read_json()) for file in files if file.exists()]


def _config(run: RunFolder) -> RunConfig | None:
    """None where it cannot be read."""
    from launcher.runs import read_config

    try:
        return read_config(run)
    except MaskwrightError:
        return None


def _proof(run: RunFolder, config: RunConfig, history: History, events: Events, *, all_steps: bool) -> Proof:
    """The surviving history against the corpus, or without it where that is gone."""
    from data_pipeline.mixture import Mixture
    from data_pipeline.stream import MicroBatchStream
    from launcher.stages import require_corpus

    try:
        mixture = Mixture.open(require_corpus(run), config.data)
        stream = MicroBatchStream(mixture, config.objective, config.phases, config.seed)
        return prove(history, events, config.phases, stream, all_steps=all_steps)
    except MaskwrightError as error:
        return prove(history, events, config.phases, None, all_steps=False, why=redacted(error.cause))


def _state(events: Events) -> str:
    """One line: how the run ended, or how far it is."""
    last = next((event for event in reversed(events) if event["kind"] in {"finished", "failed", "stopped", "interrupted"}), None)
    latest = max((index for index, event in enumerate(events) if event["kind"] in {"command_started", "attempt_started"}), default=-1)
    if last is None or events.index(last) < latest:
        stages = [event["stage"] for event in events if event["kind"] == "stage_finished"]
        return f"Not finished; stages done: {', '.join(dict.fromkeys(stages)) or 'none'}."
    if last["kind"] == "finished":
        return "Finished."
    return redacted(f"{last['kind'].capitalize()}: {last.get('cause', 'cause not recorded')}")


def _pictures(kind: str, history: History, validations: Events) -> list[tuple[str, str]]:
    starts = attempt_starts(history.step, history.attempt)
    entropy = next((event["unigram_entropy"] for event in reversed(validations) if event.get("unigram_entropy") is not None), None)

    def over_steps(name: str) -> Curve:
        return history.step.astype(np.float64), history.values[name]

    drawn = {
        f"Training and validation {TOKEN_LOSS[kind]} over optimizer steps": token_figure(
            kind, over_steps("mlm_loss"), _held_out(validations, "mlm_loss"), entropy, starts
        ),
        "Training and validation sentence loss over optimizer steps": sentence_figure(
            over_steps("nsp_loss"), _held_out(validations, "nsp_loss"), starts
        ),
        "Throughput over optimizer steps": line_figure("Throughput (real tokens per second)", over_steps("tokens_per_s"), starts),
        "Learning rate over optimizer steps": line_figure("Learning rate", over_steps("lr"), starts),
        "Gradient norm over optimizer steps": line_figure("Gradient norm before clipping", over_steps("grad_norm"), starts),
    }
    return [(text, picture) for text, picture in drawn.items() if picture]


def _held_out(validations: Events, name: str) -> Curve:
    """Of each step the newest validation."""
    by_step = {event["step"]: event.get(name) for event in validations}
    steps = sorted(by_step)
    return np.array(steps, dtype=np.float64), np.array([np.nan if (value := by_step[step]) is None else value for step in steps], dtype=np.float64)


def _event_rows(events: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "time": tables.moment(event["time"]),
            "kind": title(event),
            "attempt": str(event["attempt"] or ""),
            "step": "" if event["step"] is None else str(event["step"]),
            "details": tell(event),
        }
        for event in events[-_MAX_EVENTS:]
    ]
