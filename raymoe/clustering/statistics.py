"""Statistics of routed rows by expert: sums that decay by step index, so they merge in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

GRAMS = ("residual", "answer", "weight", "coactivation")
"""Inner products between experts: of residuals, of residual outputs on the sample (`answer`), of whole weights, and of
the indicators of the sampled tokens that would take an expert (`coactivation`: counts of tokens that take both)."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the routed rows of a range of steps, by layer and logical expert."""

    version: int
    """Version of the assignment under which the rows were routed."""
    step: int
    """Last step of the range. Sums are decayed to this step."""
    beta: float
    """Decay: each step keeps 1 − beta of the sums (arXiv 2510.02345, section 3.1: 0.05)."""
    rows_LE: np.ndarray
    """Number of routed rows, int64, exact and without decay."""
    count_LE: np.ndarray
    """Decayed count of routed rows, float64."""
    input_sum_LED: np.ndarray
    """Decayed sum of routed inputs, float64."""
    gram: dict[str, np.ndarray] = field(default_factory=dict)
    """Decayed sums of inner products [L, E, E], float64, by name in `GRAMS`; absent until sampled.

    A process contributes the layers that it samples and zeros for the others, so the parts of processes add up."""
    sampled: int = 0
    """Number of sampled tokens on which every expert was evaluated, exact."""

    @classmethod
    def empty(cls, version: int, layers: int, experts: int, d_model: int, beta: float, step: int = 0) -> Statistics:
        """Return statistics without rows up to `step`: the neutral element of `merge` for its version."""
        return cls(
            version=version,
            step=step,
            beta=beta,
            rows_LE=np.zeros((layers, experts), np.int64),
            count_LE=np.zeros((layers, experts)),
            input_sum_LED=np.zeros((layers, experts, d_model)),
        )

    def decayed_to(self, step: int) -> Statistics:
        """Return the statistics decayed to a later step. ValueError for an earlier step."""
        if step < self.step:
            raise ValueError(f"statistics of step {self.step} cannot decay to the earlier step {step}")
        if step == self.step:
            return self
        kept = (1 - self.beta) ** (step - self.step)
        return replace(
            self,
            step=step,
            count_LE=kept * self.count_LE,
            input_sum_LED=kept * self.input_sum_LED,
            gram={name: kept * gram_LEE for name, gram_LEE in self.gram.items()},
        )

    def emptied(self) -> Statistics:
        """Return zero statistics with the same step and the same names of grams."""
        return replace(
            self,
            rows_LE=np.zeros_like(self.rows_LE),
            count_LE=np.zeros_like(self.count_LE),
            input_sum_LED=np.zeros_like(self.input_sum_LED),
            gram={name: np.zeros_like(gram_LEE) for name, gram_LEE in self.gram.items()},
            sampled=0,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all fields as int64 and float64 arrays for safetensors; numbers are 0-d arrays."""
        return {
            "version": np.array(self.version, np.int64),
            "step": np.array(self.step, np.int64),
            "beta": np.array(self.beta, np.float64),
            "sampled": np.array(self.sampled, np.int64),
            "rows": self.rows_LE,
            "count": self.count_LE,
            "input_sum": self.input_sum_LED,
            **{f"gram.{name}": gram_LEE for name, gram_LEE in self.gram.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Statistics:
        """Return the inverse of `arrays`. ValueError if an array is missing; `check` compares them with a model."""
        try:
            return cls(
                version=int(arrays["version"].item()),
                step=int(arrays["step"].item()),
                beta=float(arrays["beta"].item()),
                rows_LE=arrays["rows"],
                count_LE=arrays["count"],
                input_sum_LED=arrays["input_sum"],
                gram={name: arrays[f"gram.{name}"] for name in GRAMS if f"gram.{name}" in arrays},
                sampled=int(arrays["sampled"].item()),
            )
        except KeyError as error:
            raise ValueError(f"the array {error} is missing from the statistics") from None


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of the rows of both. Commutative and associative.

    Of two versions only the newer is kept, since statistics of an earlier assignment are invalid. ValueError if
    shapes or betas differ.
    """
    if a.input_sum_LED.shape != b.input_sum_LED.shape:
        raise ValueError(f"statistics of shapes {a.input_sum_LED.shape} and {b.input_sum_LED.shape} cannot merge")
    if a.beta != b.beta:
        raise ValueError(f"statistics of beta {a.beta} and {b.beta} cannot merge")
    if a.version != b.version:
        return max(a, b, key=lambda statistics: statistics.version)
    step = max(a.step, b.step)
    a, b = a.decayed_to(step), b.decayed_to(step)
    return replace(
        a,
        rows_LE=a.rows_LE + b.rows_LE,
        count_LE=a.count_LE + b.count_LE,
        input_sum_LED=a.input_sum_LED + b.input_sum_LED,
        gram={
            name: a.gram[name] + b.gram[name] if name in a.gram and name in b.gram else (a.gram | b.gram)[name]
            for name in a.gram | b.gram
        },
        sampled=a.sampled + b.sampled,
    )


def check(stats: Statistics, layers: int, experts: int, d_model: int) -> None:
    """Raise ValueError, with the field, unless `stats` can be the statistics of a model of this shape."""
    if not isinstance(stats, Statistics):
        raise ValueError(f"{type(stats).__name__} is not Statistics")
    for name in ("version", "step", "sampled"):
        value = getattr(stats, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}={value!r}: must be an int, 0 or more")
    if type(stats.beta) is not float or not 0 <= stats.beta < 1:
        raise ValueError(f"beta={stats.beta!r}: must be a float, 0 or more and less than 1")
    if not isinstance(stats.gram, dict) or stats.gram.keys() - set(GRAMS):
        raise ValueError(f"gram must be a dict with keys among {GRAMS}")
    _check("rows_LE", stats.rows_LE, np.int64, (layers, experts))
    _check("count_LE", stats.count_LE, np.float64, (layers, experts))
    _check("input_sum_LED", stats.input_sum_LED, np.float64, (layers, experts, d_model))
    for name, array in (("rows_LE", stats.rows_LE), ("count_LE", stats.count_LE)):
        if (array < 0).any():
            raise ValueError(f"{name} has negative counts")
    for name, gram_LEE in stats.gram.items():
        _check(f"gram {name!r}", gram_LEE, np.float64, (layers, experts, experts))
        if (gram_LEE.diagonal(axis1=1, axis2=2) < 0).any():
            raise ValueError(f"gram {name!r} has negative squares")


def _check(name: str, array: object, dtype: type, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {found}, expected {np.dtype(dtype)}{list(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
