"""What routed rows say of experts: sums decayed by step, so that they merge in any order and know no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

GRAMS = ("residual", "answer", "weight")
"""Inner products between experts: of residuals, of residuals' answers to sampled tokens, of whole weights."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the routed rows of a range of steps say, by layer and logical expert."""

    version: int
    """Assignment under which they were gathered."""
    step: int
    """Last step covered, to which the sums are decayed."""
    beta: float
    """Each step keeps 1 − beta of what was before (arXiv 2510.02345, section 3.1: 0.05)."""
    rows_LE: np.ndarray
    """Routed rows, int64, exact: never decayed."""
    count_LE: np.ndarray
    """Decayed count of routed rows, float64."""
    input_sum_LED: np.ndarray
    """Decayed sum of routed inputs, float64."""
    gram: dict[str, np.ndarray] = field(default_factory=dict)
    """Decayed sums of inner products [L, E, E], float64, by name in `GRAMS`; absent until sampled.

    A process contributes the layers that it samples and zeros elsewhere, so that addition gives the whole."""
    sampled: int = 0
    """Tokens that every expert answered, exact."""

    @classmethod
    def empty(cls, version: int, layers: int, experts: int, d_model: int, beta: float, step: int = 0) -> Statistics:
        """Nothing seen up to `step`: the neutral element of `merge` among statistics of its version."""
        return cls(
            version=version,
            step=step,
            beta=beta,
            rows_LE=np.zeros((layers, experts), np.int64),
            count_LE=np.zeros((layers, experts)),
            input_sum_LED=np.zeros((layers, experts, d_model)),
        )

    def decayed_to(self, step: int) -> Statistics:
        """The same rows, seen from a later step. ValueError for an earlier one: what has decayed is gone."""
        if step < self.step:
            raise ValueError(f"statistics up to step {self.step} cannot be seen from step {step}")
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
        """Nothing seen, up to the same step and with the same grams."""
        return replace(
            self,
            rows_LE=np.zeros_like(self.rows_LE),
            count_LE=np.zeros_like(self.count_LE),
            input_sum_LED=np.zeros_like(self.input_sum_LED),
            gram={name: np.zeros_like(gram_LEE) for name, gram_LEE in self.gram.items()},
            sampled=0,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as int64 and float64 arrays, the numbers as 0-d ones: what safetensors can keep."""
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
        """The inverse of `arrays`. ValueError where one is missing; `check` says whether they fit a model."""
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
            raise ValueError(f"statistics without {error}") from None


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both's rows, in any order; of two versions the newer alone, as an old assignment's are void.

    ValueError where shapes or betas differ.
    """
    if a.input_sum_LED.shape != b.input_sum_LED.shape:
        raise ValueError(f"statistics of shapes {a.input_sum_LED.shape} and {b.input_sum_LED.shape} do not merge")
    if a.beta != b.beta:
        raise ValueError(f"statistics of beta {a.beta} and {b.beta} do not merge")
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
    """ValueError, with the reason, for what cannot be the statistics of such a model."""
    if not isinstance(stats, Statistics):
        raise ValueError(f"{type(stats).__name__} is not statistics")
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
