"""Scores against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raymoe.finetune.metrics import METRICS, majority, paired_difference, score
from raymoe.finetune.tasks import TASKS

LABEL = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
PREDICTED = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0])  # TP 3, FN 1, FP 1, TN 5


def test_classification_scores_are_those_of_the_confusion_matrix() -> None:
    assert METRICS["accuracy"](PREDICTED, LABEL) == pytest.approx(0.8)
    assert METRICS["F1"](PREDICTED, LABEL) == pytest.approx(6 / 8)
    assert METRICS["Matthews"](PREDICTED, LABEL) == pytest.approx((3 * 5 - 1 * 1) / math.sqrt(4 * 4 * 6 * 6))
    # The phi coefficient is the linear correlation of two binary variables.
    assert METRICS["Matthews"](PREDICTED, LABEL) == pytest.approx(np.corrcoef(PREDICTED, LABEL)[0, 1])
    assert METRICS["Matthews"](1 - LABEL, LABEL) == -1


def test_correlations() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert METRICS["Pearson"](3 * x + 2, x) == pytest.approx(1)
    assert METRICS["Pearson"](np.array([2.0, 1.0, 4.0, 3.0, 5.0]), x) == pytest.approx(0.8)
    assert METRICS["Spearman"](np.exp(x), x) == pytest.approx(1)
    assert METRICS["Spearman"](np.array([1.0, 1.0, 2.0, 3.0, 4.0]), x) == pytest.approx(0.9746794)  # mean rank of ties


@pytest.mark.parametrize("name", ["Matthews", "Pearson", "Spearman", "F1"])
def test_a_constant_prediction_scores_zero(name: str) -> None:
    assert METRICS[name](np.zeros(10), LABEL) == 0


def test_the_majority_baseline_takes_the_class_of_the_training_set() -> None:
    found = majority(TASKS["mrpc"], np.array([1.0, 1.0, 0.0]), {"": LABEL})
    assert found == {"accuracy": pytest.approx(0.4), "F1": pytest.approx(8 / 14)}
    assert majority(TASKS["stsb"], np.array([1.0, 3.0]), {"": np.array([0.0, 5.0])}) == {"Pearson": 0, "Spearman": 0}


def test_both_dev_sets_of_mnli_are_scored() -> None:
    label = np.array([0, 1, 2, 0])
    found = score(TASKS["mnli"], {"matched": label, "mismatched": np.zeros(4)}, {"matched": label, "mismatched": label})
    assert found == {"accuracy (matched)": 1.0, "accuracy (mismatched)": 0.5}
    assert list(found) == TASKS["mnli"].scores


def test_a_difference_is_paired_by_seed() -> None:
    found = paired_difference([1.5, 7.5, 3.5], [1.0, 7.0, 3.0])
    assert found.mean == pytest.approx(0.5) and found.half == pytest.approx(0)
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])
