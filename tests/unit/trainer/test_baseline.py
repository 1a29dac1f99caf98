"""TF-IDF and logistic regression: better than guessing, the same every time, chosen on dev, blind to test."""

import random
from dataclasses import replace

import pytest

from tests.support.tiny_task import write_task
from trainer.baseline import CHOICES_OF_C, tfidf_baseline
from trainer.finetune_config import TaskConfig
from trainer.tasks import Rows, Task, load_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("baseline")
    return load_task(TaskConfig(name="tiny", path=str(write_task(folder / "task"))), folder)


def accuracy(task: Task, predictions: tuple[int, ...]) -> float:
    return sum(said == label for said, label in zip(predictions, task.test.labels, strict=True)) / len(task.test)


def test_it_beats_guessing_by_far_and_repeats_exactly(task: Task) -> None:
    result = tfidf_baseline(task)
    assert accuracy(task, result.predictions) > 0.9
    assert result.c in CHOICES_OF_C
    assert tfidf_baseline(task) == result


def test_test_rows_change_nothing_but_their_own_predictions(task: Task) -> None:
    order = list(range(len(task.test)))
    random.Random(0).shuffle(order)
    texts, labels = tuple(task.test.texts[row] for row in order), tuple(task.test.labels[row] for row in order)
    shuffled = tfidf_baseline(replace(task, test=Rows(texts[:10], None, labels[:10])))
    assert shuffled.predictions == tuple(tfidf_baseline(task).predictions[row] for row in order[:10])


def test_the_second_text_of_a_pair_counts(task: Task) -> None:
    def as_second(rows: Rows) -> Rows:
        return Rows(("nothing here",) * len(rows), rows.texts, rows.labels)

    pairs = replace(task, train=as_second(task.train), dev=as_second(task.dev), test=as_second(task.test))
    assert accuracy(pairs, tfidf_baseline(pairs).predictions) > 0.9
