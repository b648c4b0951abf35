"""Scores of predictions, majority baselines, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raymoe.finetune.tasks import Task, score_name
from raymoe.report.intervals import Interval

Array = np.ndarray


def accuracy(predicted_N: Array, label_N: Array) -> float:
    """Return the share of equal entries."""
    return float((predicted_N == label_N).mean())


def f1(predicted_N: Array, label_N: Array) -> float:
    """Return 2 TP / (2 TP + FP + FN) of label 1; 0 if neither array has a 1."""
    true_positive = int(((predicted_N == 1) & (label_N == 1)).sum())
    ones = int((predicted_N == 1).sum() + (label_N == 1).sum())
    return 2 * true_positive / ones if ones else 0.0


def matthews(predicted_N: Array, label_N: Array) -> float:
    """Return the correlation of two binary arrays; 0 if one of them is constant."""
    tp, tn = (int(((predicted_N == value) & (label_N == value)).sum()) for value in (1, 0))
    fp, fn = (int(((predicted_N == value) & (label_N != value)).sum()) for value in (1, 0))
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / scale if scale else 0.0


def pearson(predicted_N: Array, label_N: Array) -> float:
    """Return the linear correlation; 0 if an array is constant."""
    from scipy.stats import pearsonr  # late import: 35 MB

    return _correlation(pearsonr, predicted_N, label_N)


def spearman(predicted_N: Array, label_N: Array) -> float:
    """Return the rank correlation; 0 if an array is constant."""
    from scipy.stats import spearmanr  # late import: 35 MB

    return _correlation(spearmanr, predicted_N, label_N)


def _correlation(of: Callable, predicted_N: Array, label_N: Array) -> float:
    if any(np.ptp(values_N) == 0 for values_N in (predicted_N, label_N)):
        return 0.0
    return float(of(predicted_N, label_N).statistic)


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}
"""Name -> function of predictions and labels [N]."""


def score(task: Task, predictions: Mapping[str, Array], labels: Mapping[str, Array]) -> dict[str, float]:
    """Return every score of a task from the predictions and labels [N] of its dev sets, by name of the score."""
    return {
        score_name(metric, split): METRICS[metric](predicted_N, labels[split])
        for split, predicted_N in predictions.items()
        for metric in task.metrics
    }


def majority(task: Task, train_label_N: Array, labels: Mapping[str, Array]) -> dict[str, float]:
    """Return the scores of one constant prediction: the most frequent training label (regression: the mean)."""
    constant = np.bincount(train_label_N.astype(np.int64)).argmax() if task.labels else train_label_N.mean()
    return score(task, {split: np.full(len(label_N), constant) for split, label_N in labels.items()}, labels)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Return the interval of value - reference, paired by seed. Raises ValueError for unequal lengths."""
    return Interval.of(value - other for value, other in zip(values, reference, strict=True))
