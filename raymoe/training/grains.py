"""This rank's grains of each batch. A rank with fewer grains than others joins the collectives with zero rows."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from raymoe.config import Config
from raymoe.config.mixture import parse_mixture
from raymoe.data.corpus import Batch, Corpus
from raymoe.model.loss import linear_cross_entropy


def checksum_of(rows: range, batch: Batch) -> int:
    """Return a checksum of sequences `rows` of a global batch. The sum over a step does not depend on how it is split."""
    return sum(zlib.crc32(tokens.tobytes(), row) for row, tokens in zip(rows, batch.tokens, strict=True))


class Grains:
    """Reads and prepares the grains of rank `rank` of `world`."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device, rank: int, world: int) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        self.rank, self.world = rank, world
        self._mixture = parse_mixture(config.train.mixture)

    def training(self, step: int) -> Iterator[tuple[range, Batch]]:
        """Yield the grains of a step, each with its sequences of the global batch."""
        train = self.config.train
        yield from self._split(train.global_batch // train.grain, lambda rows: self.read(step, rows))

    def read(self, step: int, rows: range) -> Batch:
        """Return sequences `rows` of the global batch of a step."""
        return self.corpus.batch(
            seed=self.config.run.seed, step=step, global_batch=self.config.train.global_batch,
            context=self.config.model.context, rows=rows, mixture=self._mixture,
        )  # fmt: skip

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each domain of `train.mixture` was visited before a step; empty without a mixture."""
        if not self._mixture:
            return {}
        order = self.corpus.mixture(self._mixture, seed=self.config.run.seed, context=self.config.model.context)
        return order.epochs(step * self.config.train.global_batch)

    def targets(self, step: int) -> int:
        """Return the number of targets of a step's global batch that count, over all ranks; at least 1."""
        train, context = self.config.train, self.config.model.context
        if not self.corpus.masked:
            return train.global_batch * context
        return max(1, int(self.read(step, range(train.global_batch)).mask.sum()))

    def validation(self, limit: int | None) -> Iterator[tuple[range, Batch]]:
        """Yield the grains of the validation windows (`Corpus.validation`)."""
        context = self.config.model.context
        total = self.corpus.validation_windows(context, limit)

        def read(rows: range) -> Batch:
            rows = range(min(rows.start, total), min(rows.stop, total))
            return self.corpus.validation(context=context, limit=limit, rows=rows)

        yield from self._split(-(-total // self.config.train.grain), read)

    def _split(self, count: int, read: Callable[[range], Batch]) -> Iterator[tuple[range, Batch]]:
        size = self.config.train.grain
        for turn in range(-(-count // self.world)):
            index = turn * self.world + self.rank
            rows = range(index * size, (index + 1) * size) if index < count else range(0)
            yield rows, read(rows)

    def tensors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [B, S]."""
        tokens = torch.from_numpy(batch.tokens).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropy over the targets of a batch that count, in nats. Call it under `autocast`.

        The hidden states of other positions get no gradient from it.
        """
        hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
        if not batch.mask.all():
            counted_T = torch.from_numpy(batch.mask).to(self.device).flatten()
            hidden_TD, targets_T = hidden_TD[counted_T], targets_T[counted_T]
        return linear_cross_entropy(hidden_TD, weight_VD, targets_T)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of `train.precision`."""
        narrow = self.config.train.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow)
