"""The baseline every encoder has to beat: TF-IDF and logistic regression (pure and deterministic; one core, seconds)."""

import warnings
from dataclasses import dataclass
from typing import Any

from trainer.tasks import Rows, Task

CHOICES_OF_C = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Inverse strengths of regularisation, tried in this order; the first with the highest dev accuracy is taken."""
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class BaselineResult:
    """The baseline's predictions of the test rows, and the C that dev chose."""

    predictions: tuple[int, ...]
    c: float
    dev_accuracy: float


def tfidf_baseline(task: Task) -> BaselineResult:
    """Words and pairs of words with sublinear TF-IDF weights, then multinomial logistic regression with C chosen on dev.

    A pair task concatenates the features of its two texts.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    train, dev, test = _features(task)
    best: tuple[float, float, Any] | None = None
    for c in CHOICES_OF_C:
        classifier = LogisticRegression(C=c, solver="newton-cg", max_iter=_MAX_ITERATIONS)  # a fifth of the time of lbfgs here
        with warnings.catch_warnings(), threadpool_limits(1):  # more threads than free cores make it fifty times slower
            warnings.simplefilter("ignore", ConvergenceWarning)  # a C that does not converge is judged by dev like any other
            classifier.fit(train, task.train.labels)
        accuracy = float(classifier.score(dev, task.dev.labels))
        if best is None or accuracy > best[1]:
            best = (c, accuracy, classifier)
    assert best is not None
    c, accuracy, classifier = best
    return BaselineResult(tuple(int(label) for label in classifier.predict(test)), c, accuracy)


def _features(task: Task) -> tuple[Any, Any, Any]:
    """Sparse matrices of train, dev and test; the vocabulary and the weights come from train alone."""
    import numpy as np
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    columns: list[tuple[Any, Any, Any]] = []
    for texts in _columns(task.train, task.dev, task.test):
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", dtype=np.float32)  # pyright: ignore[reportArgumentType]
        columns.append((vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1]), vectorizer.transform(texts[2])))
    train, dev, test = (hstack([column[split] for column in columns], format="csr") for split in range(3))
    return train, dev, test


def _columns(*splits: Rows) -> list[list[tuple[str, ...]]]:
    columns = [[rows.texts for rows in splits]]
    if all(rows.text_pairs is not None for rows in splits):
        columns.append([rows.text_pairs or () for rows in splits])
    return columns
