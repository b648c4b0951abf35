"""A corpus of synthetic tokens with the interface of `raymoe.data.Corpus`, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raymoe.data.corpus import Batch


class Synthetic:
    """Tokens increase in one domain and decrease in the other, so that a model can learn them."""

    domains = ("up", "down")
    fingerprint = "synthetic"
    tokenizer_fingerprint = "synthetic"
    masked = False

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def _rows(self, seeds: list[tuple[int, ...]], context: int) -> Batch:
        tokens = np.zeros((len(seeds), context + 1), dtype=np.int64)
        domain = np.zeros(len(seeds), dtype=np.int64)
        for i, seed in enumerate(seeds):
            generator = np.random.default_rng(seed)
            domain[i] = generator.integers(2)
            stride = generator.integers(1, 3, context + 1) * (1 if domain[i] == 0 else -1)
            tokens[i] = (generator.integers(self.vocabulary) + stride.cumsum()) % self.vocabulary
        return Batch(tokens, domain, np.ones((len(seeds), context), dtype=bool))

    def batch(
        self, *, seed: int, step: int, global_batch: int, context: int, rows: range,
        mixture: Mapping[str, float] | None = None,
    ) -> Batch:  # fmt: skip
        assert not mixture
        return self._rows([(seed, step * global_batch + row) for row in rows], context)

    def validation_windows(self, context: int, limit: int | None) -> int:
        return min(limit or 10, 10)

    def validation(self, *, context: int, limit: int | None, rows: range) -> Batch:
        return self._rows([(999, row) for row in rows], context)
