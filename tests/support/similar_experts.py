"""Statistics of experts with known similarities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from raymoe.clustering.statistics import Statistics


def gram(vectors_LEX: np.ndarray) -> np.ndarray:
    """Return the inner products [L, E, E] of vectors."""
    return vectors_LEX @ vectors_LEX.swapaxes(1, 2)


def statistics_of(
    grams: dict[str, np.ndarray], count_LE: Any = None, input_sum_LED: Any = None, **meta: Any
) -> Statistics:
    """Return statistics with these grams; the load is uniform by default."""
    layers, experts, _ = next(iter(grams.values())).shape
    empty = Statistics.empty(3, layers, experts, 2 if input_sum_LED is None else input_sum_LED.shape[2], 0.05, step=200)
    return dataclasses.replace(
        empty,
        gram=grams,
        count_LE=np.ones((layers, experts)) if count_LE is None else count_LE,
        input_sum_LED=empty.input_sum_LED if input_sum_LED is None else input_sum_LED,
        **meta,
    )


def points(seed: int, experts: int = 12, dims: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((experts, dims))


def families(seed: int, layers: int, experts: int, clusters: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return (vectors_LEX, family_LE). Experts of a family share a direction with cosine 1 / (1 + noise²)."""
    generator = np.random.default_rng(seed)
    family_LE = np.stack([generator.permutation(np.arange(experts) % clusters) for _ in range(layers)])
    direction_LCX = generator.standard_normal((layers, clusters, 400))
    shared_LEX = np.take_along_axis(direction_LCX, family_LE[:, :, None], 1)
    return shared_LEX + noise * generator.standard_normal((layers, experts, 400)), family_LE


def with_swaps(family_LE: np.ndarray, seed: int) -> np.ndarray:
    """Return the assignment with two experts of different clusters swapped in each layer."""
    generator, swapped_LE = np.random.default_rng(seed), family_LE.copy()
    for row in swapped_LE:
        i, j = (generator.choice(np.flatnonzero(row == c)) for c in generator.choice(row.max() + 1, 2, replace=False))
        row[i], row[j] = row[j], row[i]
    return swapped_LE


def clustered(seed: int, layers: int, experts: int, clusters: int) -> tuple[Statistics, np.ndarray]:
    """Return statistics of residuals in families, and the families. Outputs have a common mean."""
    residuals, family_LE = families(seed, layers, experts, clusters)
    answers = residuals @ np.random.default_rng(seed).standard_normal((400, 300)) / 20 + 3
    return statistics_of({"residual": gram(residuals), "answer": gram(answers)}), family_LE
