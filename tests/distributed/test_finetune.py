"""One and two workers fine-tune alike; a killed or stopped fine-tune continues where it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InterruptedRunError
from tests.support.distributed import run_distributed
from tests.support.tiny_task import write_model, write_task
from trainer.context import LocalContext
from trainer.finetune_config import FinetuneConfig, TaskConfig

CONFIG = FinetuneConfig(num_seeds=2, epochs=5, batch_size=20, lr=8e-3, max_length=32)  # 105 rows: the last batch has 5


class StoppingContext(LocalContext):
    """Rank 1 asks to stop after so many step boundaries."""

    def __init__(self, rank: int, world_size: int, after: int) -> None:
        super().__init__(rank, world_size)
        self._left = after

    def stop_requested(self) -> bool:
        self._left -= 1
        return self.rank == 1 and self._left <= 0


def task_of(folder: str) -> TaskConfig:
    return TaskConfig(name="tiny", path=f"{folder}/task")


def finetune(rank: int, world_size: int, folder: str, output: str) -> dict[str, Any]:
    """Fine-tune, then evaluate the classifier that it left."""
    from trainer.evaluate import evaluate_model
    from trainer.finetune import finetune_task

    context = LocalContext(rank, world_size)
    finetune_task(CONFIG, task_of(folder), f"{folder}/model", f"{folder}/{output}", context)
    return evaluate_model(f"{folder}/{output}/model", task_of(folder), f"{folder}/work", context)


def finetune_and_stop(rank: int, world_size: int, folder: str, output: str, after: int) -> str:
    from trainer.finetune import finetune_task

    with pytest.raises(InterruptedRunError) as error:
        finetune_task(CONFIG, task_of(folder), f"{folder}/model", f"{folder}/{output}", StoppingContext(rank, world_size, after))
    return error.value.cause


def choose_precision(folder: Path, output: str, precision: str) -> None:
    (folder / output).mkdir()
    (folder / output / "choices.json").write_text(json.dumps({"device": "cpu", "precision": precision}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_task(folder / "task")
    write_model(folder / "model")
    choose_precision(folder, "one", "fp32")
    [evaluated] = run_distributed(finetune, world_size=1, args=(str(folder), "one"))
    assert evaluated == best_of(folder, "one")
    return folder


def results_of(folder: Path, output: str) -> dict[str, Any]:
    return json.loads((folder / output / "results.json").read_text())


def best_of(folder: Path, output: str) -> dict[str, Any]:
    """What `evaluate` must find."""
    results = results_of(folder, output)
    best = next(trial for trial in results["trials"] if (trial["init"], trial["seed"]) == ("pretrained", results["best_seed"]))
    return {"task": "tiny", "num_rows": 30, **best["scores"]}


def scores_of(folder: Path, output: str) -> list[Any]:
    results = results_of(folder, output)
    assert results["pretrained"]["mean"] > results["most_common_label"] + 0.3, "little was learnt: equality would prove little"
    trials = [{name: trial[name] for name in ("init", "seed", "scores", "dev_accuracy")} for trial in results["trials"]]
    return [trials, results["tfidf"], results["best_seed"], (folder / output / "predictions.jsonl").read_text()]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_number_of_workers_changes_no_score_and_no_prediction(folder: Path, world_size: int) -> None:
    output = f"workers-{world_size}"
    choose_precision(folder, output, "fp32")
    evaluated = run_distributed(finetune, world_size, args=(str(folder), output))
    assert scores_of(folder, output) == scores_of(folder, "one")
    assert evaluated == [best_of(folder, output)] * world_size


def test_a_stopped_finetune_continues_inside_the_trial_with_another_number_of_workers(folder: Path) -> None:
    choose_precision(folder, "stopped", "fp32")
    causes = run_distributed(finetune_and_stop, 2, args=(str(folder), "stopped", 40))  # 30 steps a trial
    assert causes == ["fine-tuning tiny was asked to stop at step 10 of pretrained seed 1"] * 2
    trials = folder / "stopped" / "trials"
    assert [path.name for path in trials.iterdir()] == ["pretrained-0.json"]
    written_at = (trials / "pretrained-0.json").stat().st_mtime_ns
    run_distributed(finetune, 1, args=(str(folder), "stopped"))
    assert scores_of(folder, "stopped") == scores_of(folder, "one")
    assert (trials / "pretrained-0.json").stat().st_mtime_ns == written_at
    assert not (folder / "stopped" / "progress").exists()


@pytest.mark.full
def test_number_of_workers_hardly_changes_scores_in_bf16(folder: Path) -> None:
    found: list[dict[str, Any]] = []
    for world_size in (1, 2):
        output = f"bf16-{world_size}"
        choose_precision(folder, output, "bf16")
        run_distributed(finetune, world_size, args=(str(folder), output))
        found.append(results_of(folder, output))
    assert found[0]["precision"] == "bf16"
    assert found[1]["pretrained"]["mean"] == pytest.approx(found[0]["pretrained"]["mean"], abs=0.1)
