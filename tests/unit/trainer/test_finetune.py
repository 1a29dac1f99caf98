"""Fine-tuning in one process: what is written, what is not repeated, and that a stop changes no bit."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from data_pipeline.errors import InterruptedRunError, MaskwrightError, NotFoundError, StorageError
from data_pipeline.storage import Location
from tests.support.tiny_task import write_model, write_task
from trainer.agreement import Ranks
from trainer.classifier import build_classifier
from trainer.context import LocalContext
from trainer.evaluate import evaluate_model, score
from trainer.finetune import finetune_task
from trainer.finetune_config import FinetuneConfig, TaskConfig
from trainer.finetune_progress import Progress, ProgressFolder
from trainer.finetune_results import Scores, TaskOutput, TrialResult, best_trial, prediction_lines, read_results, system_summary

CONFIG = FinetuneConfig(num_seeds=2, epochs=2, batch_size=20, lr=8e-3, max_length=32)
ONE_SEED = CONFIG.model_copy(update={"num_seeds": 1})


class StoppingContext(LocalContext):
    """Asks to stop after so many step boundaries."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def stop_requested(self) -> bool:
        self._left -= 1
        return self._left <= 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finetune")
    write_task(folder / "task")
    write_model(folder / "model")
    run(folder, "done")
    return folder


def run(folder: Path, output: str, config: FinetuneConfig = CONFIG, context: LocalContext | None = None) -> Path:
    task = TaskConfig(name="tiny", path=str(folder / "task"))
    finetune_task(config, task, str(folder / "model"), str(folder / output), context or LocalContext())
    return folder / output


def test_results_hold_scores_of_all_systems_and_what_they_were_made_from(folder: Path) -> None:
    results = read_results(Location.at(folder / "done" / "results.json"))
    assert (results["format_version"], results["task"], results["metric"]) == (1, "tiny", "accuracy")
    for system, num_values in (("pretrained", 2), ("scratch", 2), ("tfidf", 1)):
        values = results[system]["seeds"]
        assert len(values) == len(results[system]["macro_f1"]["seeds"]) == num_values
        assert results[system]["mean"] == statistics.fmean(values)
        assert results[system]["std"] == (statistics.stdev(values) if num_values > 1 else 0.0)
    assert "ddof=1" in results["std"]
    assert results["config"]["epochs"] == 2
    assert results["num_rows"] == {"train": 105, "dev": 30, "test": 30}
    assert len(results["model"]["digest"]) == 64


def test_predictions_agree_with_the_scores_of_seed_0(folder: Path) -> None:
    results = read_results(Location.at(folder / "done" / "results.json"))
    lines = [json.loads(line) for line in (folder / "done" / "predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(30))
    for system in ("pretrained", "scratch", "tfidf"):
        accuracy = sum(line[system] == line["label"] for line in lines) / 30
        assert accuracy == pytest.approx(results[system]["seeds"][0])


def test_the_classifier_of_the_best_seed_loads_in_stock_transformers_and_scores_the_same(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    results = read_results(Location.at(folder / "done" / "results.json"))
    best = next(trial for trial in results["trials"] if (trial["init"], trial["seed"]) == ("pretrained", results["best_seed"]))
    model = str(folder / "done" / "model")
    found = evaluate_model(model, TaskConfig(name="tiny", path=str(folder / "task")), str(folder), LocalContext())
    assert found == {"task": "tiny", "num_rows": 30, **best["scores"]}
    assert AutoModelForSequenceClassification.from_pretrained(model).config.id2label == dict(enumerate(results["labels"]))
    lineage = json.loads((folder / "done" / "model" / "lineage.json").read_text())
    assert (lineage["seed"], lineage["model_digest"], lineage["max_length"]) == (results["best_seed"], results["model"]["digest"], 32)


def test_finished_work_is_not_repeated_and_other_settings_are_other_work(folder: Path) -> None:
    output = folder / "again"
    shutil.copytree(folder / "done", output)
    written_at = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    run(folder, "again")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == written_at
    run(folder, "again", CONFIG.model_copy(update={"num_seeds": 3}))
    trials = output / "trials"
    assert trials.joinpath("scratch-1.json").stat().st_mtime_ns == written_at[trials / "scratch-1.json"]
    assert len(json.loads((output / "results.json").read_text())["scratch"]["seeds"]) == 3
    run(folder, "again", CONFIG.model_copy(update={"num_seeds": 1, "epochs": 1}))
    assert trials.joinpath("scratch-0.json").stat().st_mtime_ns != written_at[trials / "scratch-0.json"]


@pytest.mark.parametrize("after", [4, 8], ids=["inside an epoch", "in the second epoch"])
def test_a_stopped_finetune_continues_to_the_same_bits(folder: Path, after: int) -> None:
    output = prepared(folder, f"stopped-{after}")
    with pytest.raises(InterruptedRunError, match=f"step {after} of pretrained seed 0"):
        run(folder, output.name, ONE_SEED, StoppingContext(after))
    assert not (output / "results.json").exists()
    run(folder, output.name, ONE_SEED)
    assert outcome(output) == outcome(folder / "done")


def test_a_torn_save_is_not_loaded(folder: Path) -> None:
    output = prepared(folder, "torn")
    with pytest.raises(InterruptedRunError):
        run(folder, "torn", ONE_SEED, StoppingContext(3))
    [state] = (output / "progress").iterdir()
    (state / "progress.json").unlink()  # it is written last
    (state / "model.safetensors").write_bytes(b"torn")
    run(folder, "torn", ONE_SEED)
    assert outcome(output) == outcome(folder / "done")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_state_is_said_and_the_trial_starts_again(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    output = prepared(folder, f"damaged-{name}")
    with pytest.raises(InterruptedRunError):
        run(folder, output.name, ONE_SEED, StoppingContext(3))
    [state] = (output / "progress").iterdir()
    (state / name).write_bytes((state / name).read_bytes()[:20])
    run(folder, output.name, ONE_SEED)
    assert outcome(output) == outcome(folder / "done")
    assert f"{state} could not be loaded and was removed" in caplog.text


class FullDisk:
    """Saves to a disk without space, as torch and safetensors report it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def save_state(self, output_dir: str, /) -> None:
        raise self.error

    def load_state(self, input_dir: str, /) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
        SafetensorError("I/O error: No space left"),
    ],
)
def test_a_full_disk_is_an_error_of_the_storage(tmp_path: Path, error: Exception) -> None:
    progress_folder = ProgressFolder(Location.at(tmp_path), "trial", FullDisk(error), Ranks(0, 1, None, 10.0))
    with pytest.raises(StorageError, match="rank 0 could not save the state"):
        progress_folder.save(Progress(3, (), 1.0))


def prepared(folder: Path, output: str) -> Path:
    """A new output folder with the choices of `done`, so that both compute in the same precision."""
    (folder / output).mkdir()
    shutil.copy(folder / "done" / "choices.json", folder / output)
    return folder / output


def outcome(output: Path) -> list[dict[str, Any]]:
    """Everything about the trials of seed 0 but the time they took."""
    trials = [json.loads((output / "trials" / f"{init}-0.json").read_text()) for init in ("pretrained", "scratch")]
    return [{name: value for name, value in found.items() if name != "elapsed_s"} for found in trials]


def test_scratch_is_the_same_network_with_fresh_weights_and_the_seed_decides_them(folder: Path) -> None:
    def weights(init: Any, seed: int) -> dict[str, torch.Tensor]:
        return build_classifier(str(folder / "model"), ("a", "b", "c"), init, seed).state_dict()

    pretrained, scratch = weights("pretrained", 0), weights("scratch", 0)
    assert {name: w.shape for name, w in pretrained.items()} == {name: w.shape for name, w in scratch.items()}
    word = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(pretrained[word], scratch[word])
    assert torch.equal(pretrained[word], weights("pretrained", 1)[word])
    assert not torch.equal(pretrained["classifier.weight"], weights("pretrained", 1)["classifier.weight"])
    assert torch.equal(scratch[word], weights("scratch", 0)[word])
    assert not torch.equal(scratch[word], weights("scratch", 1)[word])


def test_a_missing_model_is_named(folder: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere is not a model folder"):
        finetune_task(CONFIG, TaskConfig(name="t", path=str(folder / "task")), str(folder / "nowhere"), str(folder / "x"), LocalContext())


def trial(init: Any, seed: int, dev: float) -> TrialResult:
    return TrialResult(init, seed, Scores(0.5, 0.25), (0.1, dev), (0, 1), 1.0)


def test_the_best_trial_is_chosen_on_dev_among_the_pretrained() -> None:
    trials = [trial("pretrained", 0, 0.7), trial("pretrained", 1, 0.8), trial("pretrained", 2, 0.8), trial("scratch", 0, 0.9)]
    assert best_trial(trials) == trials[1]


def test_spread_is_the_sample_standard_deviation() -> None:
    summary = system_summary([Scores(0.1, 0.0), Scores(0.2, 0.0), Scores(0.6, 0.3)])
    assert summary["mean"] == pytest.approx(0.3)
    assert summary["std"] == pytest.approx(((0.2**2 + 0.1**2 + 0.3**2) / 2) ** 0.5)
    assert summary["macro_f1"]["mean"] == pytest.approx(0.1)


def test_trials_of_other_settings_are_not_read(tmp_path: Path) -> None:
    here = TaskOutput(Location.at(tmp_path), "key")
    here.write_trial(trial("scratch", 4, 0.5))
    assert here.read_trial("scratch", 4) == trial("scratch", 4, 0.5)
    assert here.read_trial("pretrained", 4) is None
    assert TaskOutput(Location.at(tmp_path), "other").read_trial("scratch", 4) is None


def test_prediction_lines_name_labels() -> None:
    line = prediction_lines([1], ["é", "b"], {"tfidf": [0]}).decode()
    assert json.loads(line) == {"index": 0, "label": "b", "tfidf": "é"}


def test_macro_f1_counts_every_label_alike() -> None:
    scores = score([0, 0, 0, 1], [0, 0, 0, 0], num_labels=3)
    assert scores.accuracy == 0.75
    assert scores.macro_f1 == pytest.approx((2 * 0.75 / 1.75) / 3)


@pytest.mark.parametrize("content", [b"{", b'{"format_version": 2}'])
def test_results_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(MaskwrightError, match=r"is not JSON|format version 2"):
        read_results(Location.at(tmp_path / "results.json"))
