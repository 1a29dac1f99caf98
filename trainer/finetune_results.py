"""What fine-tuning a task leaves behind: a small file per finished trial, then results.json and predictions.jsonl (atomic writes)."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data_pipeline.errors import DataCorruptError
from data_pipeline.storage import Location

RESULTS_VERSION = 1
Init = Literal["pretrained", "scratch"]
INITS: tuple[Init, ...] = ("pretrained", "scratch")


@dataclass(frozen=True)
class Scores:
    """How good predictions are: shares between 0 and 1."""

    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class TrialResult:
    """One network fine-tuned with one seed."""

    init: Init
    seed: int
    scores: Scores
    """On the test rows, after the last epoch."""
    dev_accuracy: tuple[float, ...]
    """After each epoch."""
    predictions: tuple[int, ...]
    """Label number of each test row."""
    elapsed_s: float
    """Of all attempts together."""


@dataclass(frozen=True)
class TaskOutput:
    """The folder `finetune/<task>/` of a run. `key` names what was fine-tuned with which settings: files with another key are not used."""

    folder: Location
    key: str

    @property
    def results(self) -> Location:
        """Scores of all systems; written last: the task is finished when it exists."""
        return self.folder / "results.json"

    @property
    def predictions(self) -> Location:
        """One line per test row."""
        return self.folder / "predictions.jsonl"

    @property
    def classifier(self) -> Location:
        """Model folder of the pretrained network's best seed."""
        return self.folder / "model"

    def is_finished(self, num_seeds: int) -> bool:
        """Whether the results of exactly this model, task, settings and number of seeds are there."""
        found: dict[str, Any] = self.results.read_json() if self.results.exists() else {}
        return found.get("key") == self.key and len(found["pretrained"]["seeds"]) == num_seeds

    def read_trial(self, init: Init, seed: int) -> TrialResult | None:
        """The result of a trial that an earlier attempt finished."""
        file = self._trial(init, seed)
        found: dict[str, Any] = file.read_json() if file.exists() else {}
        if found.pop("key", None) != self.key:
            return None
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if name != "scores"}
        return TrialResult(scores=Scores(**found["scores"]), **plain)

    def write_trial(self, result: TrialResult) -> None:
        """Record a finished trial."""
        self._trial(result.init, result.seed).write_json({"key": self.key, **asdict(result)})

    def read_choice(self) -> dict[str, Any]:
        """What was chosen by measurement before the first trial; empty before that."""
        file = self.folder / "choices.json"
        return file.read_json() if file.exists() else {}

    def write_choice(self, choices: dict[str, Any]) -> None:
        """Freeze what was chosen by measurement, for all trials and all attempts."""
        (self.folder / "choices.json").write_json(choices)

    def _trial(self, init: Init, seed: int) -> Location:
        return self.folder / "trials" / f"{init}-{seed}.json"


def system_summary(scores: Sequence[Scores]) -> dict[str, Any]:
    """Mean, sample standard deviation (ddof = 1; 0 for a single value) and values of accuracy, the same of macro-F1 below it; pure."""
    accuracy = _spread([score.accuracy for score in scores])
    return {**accuracy, "macro_f1": _spread([score.macro_f1 for score in scores])}


def network_results(trials: Sequence[TrialResult]) -> dict[str, Any]:
    """The part of results.json about the networks; pure."""
    scores = {init: [trial.scores for trial in trials if trial.init == init] for init in INITS}
    return {
        "metric": "accuracy",
        "std": "sample standard deviation over seeds (ddof=1); 0 for a single value",
        **{init: system_summary(found) for init, found in scores.items()},
        "best_seed": best_trial(trials).seed,
        "elapsed_s": sum(trial.elapsed_s for trial in trials),
        "trials": [{name: value for name, value in asdict(trial).items() if name != "predictions"} for trial in trials],
    }


def best_trial(trials: Sequence[TrialResult]) -> TrialResult:
    """The pretrained trial with the highest dev accuracy after its last epoch, the lowest seed among equals; pure."""
    pretrained = [trial for trial in trials if trial.init == "pretrained"]
    return max(pretrained, key=lambda trial: (trial.dev_accuracy[-1], -trial.seed))


def prediction_lines(labels: Sequence[int], names: Sequence[str], systems: dict[str, Sequence[int]]) -> bytes:
    """predictions.jsonl: index and label of each test row, and what each system (seed 0 of the networks) says; pure."""
    lines = [
        json.dumps({"index": index, "label": names[label], **{system: names[said[index]] for system, said in systems.items()}}, ensure_ascii=False)
        for index, label in enumerate(labels)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def read_results(file: Location) -> dict[str, Any]:
    """A results.json.

    Raises:
        NotFoundError: there is none.
        DataCorruptError: it is not JSON, or a later release wrote it.
    """
    try:
        results = file.read_json()
    except ValueError as error:
        raise DataCorruptError(f"{file} is not JSON: {error}", "Remove the task's folder and run `maskwright finetune` again.") from error
    if results.get("format_version", 0) > RESULTS_VERSION:
        raise DataCorruptError(
            f"{file} has format version {results['format_version']}; this release reads up to {RESULTS_VERSION}", "Upgrade maskwright."
        )
    return results


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0, "seeds": list(values)}
