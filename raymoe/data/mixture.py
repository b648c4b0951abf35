"""The order of training windows in a mixture of domains: shares by weight, a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

BLOCK = 4096
"""Sequences of a block. Every block has the shares of the weights, rounded to 1/BLOCK."""


class Mixture:
    """Positions 0, 1, ... of the training order -> windows, in blocks whose slots are divided among the domains.

    Inside a block the slots of a domain are spread evenly, so that short runs and single batches have about the same
    shares. A domain's windows follow in a random order, and in another one when it repeats.
    """

    def __init__(self, weights: Mapping[str, float], windows: Mapping[str, int], seed: int) -> None:
        """weights: domain -> weight; other domains are not drawn. windows: domain -> windows, of all domains in order.

        Raises ValueError for an unknown domain, one without a window, and a share below 1/BLOCK.
        """
        self.domains, self.seed = tuple(windows), seed
        self._windows_M = np.array(list(windows.values()), dtype=np.int64)
        for domain in weights:
            if domain not in windows:
                raise ValueError(
                    f"train.mixture names the domain {domain!r}, and the text has {', '.join(self.domains)}: use those"
                )
            if not windows[domain]:
                raise ValueError(
                    f"train.mixture: the text of {domain!r} is shorter than one window of model.context tokens: leave it "
                    "out, or lower model.context"
                )
        weight_M = np.array([weights.get(domain, 0.0) for domain in self.domains])
        self.slots_M = apportion(weight_M / weight_M.max(), BLOCK)
        """[domains]: slots of each domain in a block."""
        for domain, slots in zip(self.domains, self.slots_M.tolist(), strict=True):
            if domain in weights and not slots:
                raise ValueError(f"train.mixture: the share of {domain!r} is below 1/{BLOCK}: raise its weight")

    def at(self, position: int) -> tuple[int, int]:
        """Return (domain, window of the domain) at a position."""
        block, slot = divmod(position, BLOCK)
        domains_N, ranks_N = self._block(block)
        domain = int(domains_N[slot])
        drawn = block * int(self.slots_M[domain]) + int(ranks_N[slot])
        epoch, at = divmod(drawn, int(self._windows_M[domain]))
        return domain, int(self._order(domain, epoch)[at])

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often the windows before a position have visited each domain of the mixture."""
        block, slot = divmod(position, BLOCK)
        drawn_M = block * self.slots_M + np.bincount(self._block(block)[0][:slot], minlength=len(self.domains))
        return {
            domain: drawn / windows
            for domain, slots, drawn, windows in zip(
                self.domains, self.slots_M.tolist(), drawn_M.tolist(), self._windows_M.tolist(), strict=True
            )
            if slots
        }

    @lru_cache(maxsize=2)  # noqa: B019 - a process has one mixture, and a step touches two blocks at most
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the domain of each slot of a block [BLOCK], and the number of earlier slots of that domain [BLOCK]."""
        ranks_N = np.concatenate([np.arange(slots) for slots in self.slots_M])
        domains_N = np.repeat(np.arange(len(self.domains)), self.slots_M)
        jitter_N = np.random.default_rng([self.seed, block, BLOCK]).random(BLOCK)
        order_N = np.argsort((ranks_N + jitter_N) / self.slots_M[domains_N], kind="stable")
        return domains_N[order_N], ranks_N[order_N]

    @lru_cache(maxsize=256)  # noqa: B019 - a batch touches two epochs of each domain
    def _order(self, domain: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch, domain, BLOCK])
        return generator.permutation(self._windows_M[domain])


def apportion(weight_M: np.ndarray, total: int) -> np.ndarray:
    """Return integers [M] with the given sum in proportion to the weights (largest remainder)."""
    exact_M = weight_M / weight_M.sum() * total
    whole_M = np.floor(exact_M).astype(np.int64)
    rest_M = np.argsort(whole_M - exact_M, kind="stable")[: total - int(whole_M.sum())]
    whole_M[rest_M] += 1
    return whole_M
