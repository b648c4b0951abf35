"""Recorder of a worker's statistics: routed inputs, and expert outputs on a shared sample.

Routed inputs are summed every `regroup.stats_every` steps. At the end of each period every expert is evaluated
on the same few hundred tokens, spread over the global batch, regardless of routing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.clustering.similarity import NEEDED
from raymoe.clustering.statistics import Statistics, merge
from raymoe.config import Config
from raymoe.model.experts import ClusteredExperts
from raymoe.model.observation import Observation
from raymoe.model.transformer import Transformer
from raymoe.parallel.gram import grams
from raymoe.parallel.sharded import Sharded
from raymoe.storage.checkpoint import Checkpoint
from raymoe.training.grains import Grains
from raymoe.training.load import RoutingLoad


class Sample:
    """Inputs of each FFN for fixed tokens of a global batch, independent of the ranks that compute them."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        tokens = config.train.global_batch * config.model.context
        count = min(config.regroup.sample, tokens)
        self._at = torch.arange(count) * tokens // count
        self._rows_LND = torch.zeros(config.model.layers, count, config.model.d_model, device=device)

    def _taken(self, rows: range) -> tuple[Tensor, Tensor]:
        """Return the sampled tokens in these sequences of the global batch, and their positions there."""
        start, stop = (edge * self.config.model.context for edge in (rows.start, rows.stop))
        mine = (self._at >= start) & (self._at < stop)
        return mine.nonzero().flatten(), self._at[mine] - start

    def positions(self, rows: range) -> Tensor:
        """Return the positions of the sample in a forward of these sequences of the global batch."""
        return self._taken(rows)[1]

    def add(self, rows: range, seen: Observation) -> None:
        """Add the inputs that a forward of these sequences observed."""
        self._rows_LND[:, self._taken(rows)[0].to(self.device)] = seen.samples_LND.to(self._rows_LND)

    def gather(self) -> Tensor:
        """Return the inputs that all ranks added: [L, N, D] float32. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._rows_LND)
        return self._rows_LND


@torch.no_grad()
def sample_inputs(model: Transformer, grains: Grains, step: int) -> Tensor:
    """Return `regroup.sample` inputs of each FFN [L, N, D], by a forward of the batch of `step`. Collective."""
    sample = Sample(grains.config, grains.device)
    for rows, batch in grains.training(step):
        seen = Observation(model.model, sampled_rows=sample.positions(rows))
        with grains.autocast():
            model.hidden(grains.tensors(batch)[0], seen=seen)
        sample.add(rows, seen)
    return sample.gather()


class Recorder:
    """Gathers the statistics of one worker. The statistics of all workers add up to those of the run."""

    def __init__(self, config: Config, sharded: Sharded, version: int, step: int) -> None:
        self.config, self.sharded = config, sharded
        self.restart(version, step)
        self.samples_LND: Tensor | None = None
        """Rows of the last sample, the same on all ranks."""
        self._sample: Sample | None = None
        self._is_recorded = False
        self._input_sums_eD: list[Tensor] = []

    def restart(self, version: int, step: int) -> None:
        """Reset the statistics, since those of another assignment are invalid for this one."""
        model, beta = self.config.model, self.config.regroup.beta
        self.total = Statistics.empty(version, model.layers, model.n_experts, model.d_model, beta, step)

    def _ffns(self) -> list[ClusteredExperts]:
        return self.sharded.transformer.ffns_of(ClusteredExperts)

    def arm(self, step: int) -> None:
        """Decide before step `step` (counted from 1) whether to record it, and whether to sample it."""
        regroup, device = self.config.regroup, self._ffns()[0].router.bias.device
        is_last = step % self.config.period == 0 and step >= regroup.burn_in
        self._sample = Sample(self.config, device) if is_last else None
        self._is_recorded = is_last or step % regroup.stats_every == 0
        self._input_sums_eD = []

    def options(self, rows: range) -> dict[str, Any]:
        """Return the options of the `Observation` for a forward of these sequences of the global batch."""
        sampled_rows = self._sample.positions(rows) if self._sample else None
        return {"input_sums": self._is_recorded, "sampled_rows": sampled_rows}

    def add(self, rows: range, seen: Observation) -> None:
        """Add the observations of a forward of these sequences."""
        if self._sample:
            self._sample.add(rows, seen)
        if self._is_recorded:
            sums = self._input_sums_eD or [torch.zeros_like(sum_eD) for sum_eD in seen.input_sums_eD]
            self._input_sums_eD = [a + b for a, b in zip(sums, seen.input_sums_eD, strict=True)]

    def read(self, step: int, load: RoutingLoad, assignment: tuple[tuple[int, ...], ...]) -> None:
        """Merge the observations of step `step` into the statistics. Collective at the end of a period."""
        if not self._is_recorded:
            return
        self._is_recorded = False
        model = self.config.model
        rows = load.experts.numpy() if self.sharded.rank == 0 else np.zeros((model.layers, model.n_experts))
        inputs = np.zeros((model.layers, model.n_experts, model.d_model))
        for layer, (ffn, sum_eD) in enumerate(zip(self._ffns(), self._input_sums_eD, strict=True)):
            for member, total in zip(ffn.local_members, sum_eD.double().cpu().numpy(), strict=True):
                inputs[layer, member.expert] += total
        seen = replace(
            self.total, step=step, rows_LE=rows.astype(np.int64), count_LE=rows.astype(np.float64),
            input_sum_LED=inputs, gram={}, sampled=0,
        )  # fmt: skip
        if self._sample:
            self.samples_LND, self._sample = self._sample.gather(), None
            found = grams(self.sharded, assignment, self.samples_LND, NEEDED[self.config.regroup.similarity])
            count = self.samples_LND.shape[1] if self.sharded.rank == 0 else 0
            seen = replace(seen, gram=found, sampled=count)
        if not all(np.isfinite(array).all() for array in (inputs, *seen.gram.values())):
            seen = replace(self.total.emptied(), step=step, gram={})  # NaN would never decay
        self.total = merge(self.total, seen)

    # Checkpoints contain the all-reduced statistics.

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics of all ranks by key on rank 0, and nothing on other ranks. Collective."""
        arrays = self._with_same_grams().arrays()
        if self.sharded.world > 1:
            summed = [key for key in arrays if key not in ("version", "step", "beta")]
            # Integers below 2^53 are exact in float64.
            flat = torch.cat([torch.from_numpy(np.asarray(arrays[key], np.float64)).flatten() for key in summed])
            flat = flat.to(self._ffns()[0].router.bias.device)
            dist.all_reduce(flat)
            for key, part in zip(summed, flat.cpu().split([arrays[key].size for key in summed]), strict=True):
                arrays[key] = part.numpy().reshape(arrays[key].shape).astype(arrays[key].dtype)
        if self.sharded.rank:
            return {}
        return {f"statistics.{key}": torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}

    def _with_same_grams(self) -> Statistics:
        """Return the total with the same grams on every rank. After a diverged step a rank has none and adds zeros."""
        model = self.config.model
        names = NEEDED[self.config.regroup.similarity]
        zeros = np.zeros((model.layers, model.n_experts, model.n_experts))
        return replace(self.total, gram={name: self.total.gram.get(name, zeros) for name in names})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the statistics of a checkpoint: all of them on rank 0, zeros on other ranks."""
        keys = [key for key in checkpoint.keys if key.startswith("statistics.")]
        if keys:
            arrays = {key.split(".", 1)[1]: tensor.numpy() for key, tensor in checkpoint.read(keys).items()}
            whole = Statistics.from_arrays(arrays)
            self.total = whole if self.sharded.rank == 0 else whole.emptied()
