"""What a worker sees of its experts, as statistics that merge: routed inputs, and answers on a shared sample.

Inputs are summed on every `regroup.stats_every`-th step. At each period's end every expert answers on the
same few hundred tokens, spread over the global batch, whether routed to it or not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.clustering.statistics import Statistics, merge
from raymoe.config import Config
from raymoe.model.experts import ClusteredExperts, DenseFFN
from raymoe.model.transformer import Transformer
from raymoe.parallel.gram import grams
from raymoe.parallel.sharded import Sharded
from raymoe.storage.checkpoint import Checkpoint
from raymoe.training.grains import Grains
from raymoe.training.load import Load


class Recorder:
    """Statistics of one worker; those of all workers add up to the run's."""

    def __init__(self, config: Config, sharded: Sharded, version: int, step: int) -> None:
        self.config, self.sharded = config, sharded
        self.restart(version, step)
        self.samples_LND: Tensor | None = None
        """The rows of the last sample, the same on all ranks."""
        tokens = config.train.global_batch * config.model.context
        n = min(config.regroup.sample, tokens)
        self._at = torch.arange(n) * tokens // n
        self._taken: list[Tensor] = []
        self._watching = self._sampling = False

    def restart(self, version: int, step: int) -> None:
        """Begin anew: what was gathered under another assignment says nothing of this one."""
        model = self.config.model
        empty = Statistics.empty(version, model.layers, model.n_experts, model.d_model, self.config.regroup.beta, step)
        self.total = self.unsent = empty

    def _ffns(self) -> list[ClusteredExperts]:
        return [ffn for ffn in self.sharded.transformer.ffns if isinstance(ffn, ClusteredExperts)]

    def arm(self, step: int) -> None:
        """Before step `step` (counted from 1) runs: watch it, if it is one to be watched."""
        regroup = self.config.regroup
        self._sampling = step % self.config.period == 0 and step >= regroup.burn_in
        self._watching = self._sampling or step % regroup.stats_every == 0
        if self._watching:
            for ffn in self._ffns():
                held = len(ffn.held_members), self.config.model.d_model
                ffn.input_sum = torch.zeros(held, device=ffn.base_gate.device)

    def aim(self, rows: range) -> None:
        """The next forward is of these sequences of the global batch."""
        if not self._sampling:
            return
        start, stop = (edge * self.config.model.context for edge in (rows.start, rows.stop))
        mine = (self._at >= start) & (self._at < stop)
        self._taken.append(mine.nonzero().flatten())
        for ffn in self._ffns():
            ffn.sampled_rows = self._at[mine] - start

    def read(self, step: int, load: Load, assignment: tuple[tuple[int, ...], ...]) -> None:
        """After step `step`: take in what was watched. A collective where the step was a period's last."""
        if not self._watching:
            return
        model = self.config.model
        rows = load.experts.numpy() if self.sharded.rank == 0 else np.zeros((model.layers, model.n_experts))
        inputs = np.zeros((model.layers, model.n_experts, model.d_model))
        for layer, ffn in enumerate(self._ffns()):
            assert ffn.input_sum is not None
            for member, total in zip(ffn.held_members, ffn.input_sum.double().cpu().numpy(), strict=True):
                inputs[layer, member.expert] += total
            ffn.input_sum = None
        seen = replace(
            self.total, step=step, rows_LE=rows.astype(np.int64), count_LE=rows.astype(np.float64),
            input_sum_LED=inputs, gram={}, sampled=0,
        )  # fmt: skip
        if self._sampling:
            self.samples_LND = self._gather()
            weights = self.config.regroup.similarity == "paper"
            found = grams(self.sharded, assignment, self.samples_LND, weights=weights)
            seen = replace(seen, gram=found, sampled=len(self._at) if self.sharded.rank == 0 else 0)
        self.total, self.unsent = merge(self.total, seen), merge(self.unsent, seen)
        self._watching = self._sampling = False

    def _gather(self) -> Tensor:
        """The sampled rows of all ranks [L, N, D]. A collective."""
        ffns = self._ffns()
        model = self.config.model
        rows = torch.zeros(len(ffns), len(self._at), model.d_model, device=ffns[0].base_gate.device)
        taken = torch.cat(self._taken) if self._taken else torch.zeros(0, dtype=torch.int64)
        for layer, ffn in enumerate(ffns):
            if len(taken):
                rows[layer, taken] = torch.cat(ffn.samples).to(rows)
            ffn.samples, ffn.sampled_rows = [], None
        self._taken = []
        if self.sharded.world > 1:
            dist.all_reduce(rows)
        return rows

    def take(self) -> Statistics:
        """What has not been sent yet."""
        unsent, self.unsent = self.unsent, self.unsent.emptied()
        return unsent

    def resend(self) -> None:
        """The receiver has lost everything: send all again."""
        self.unsent = self.total

    # Checkpoints hold the sum over ranks.

    def tensors(self) -> dict[str, Tensor]:
        """The statistics of all ranks by key, on rank 0. A collective."""
        arrays = self.total.arrays()
        if self.sharded.world > 1:
            summed = [key for key in arrays if key not in ("version", "step", "beta")]
            # Integers below 2^53 are exact in float64.
            flat = torch.cat([torch.from_numpy(np.asarray(arrays[key], np.float64)).flatten() for key in summed])
            flat = flat.to(self._ffns()[0].base_gate.device)
            dist.all_reduce(flat)
            for key, part in zip(summed, flat.cpu().split([arrays[key].size for key in summed]), strict=True):
                arrays[key] = part.numpy().reshape(arrays[key].shape).astype(arrays[key].dtype)
        if self.sharded.rank:
            return {}
        return {f"statistics.{key}": torch.from_numpy(a) for key, a in arrays.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from what `tensors` gave: rank 0 with all of it, the others with zeros."""
        keys = [key for key in checkpoint.keys if key.startswith("statistics.")]
        if keys:
            arrays = {key.split(".", 1)[1]: tensor.numpy() for key, tensor in checkpoint.read(keys).items()}
            whole = Statistics.from_arrays(arrays)
            self.total = self.unsent = whole if self.sharded.rank == 0 else whole.emptied()


@torch.no_grad()
def sample_inputs(model: Transformer, grains: Grains, step: int) -> Tensor:
    """About `regroup.sample` inputs of each FFN [L, N, D] in step `step`'s batch, the same on all ranks. A collective."""
    train, context = grains.config.train, grains.config.model.context
    grain = grains.rank % (train.global_batch // train.grain)
    batch = grains.read(step, range(grain * train.grain, (grain + 1) * train.grain))
    each = max(1, grains.config.regroup.sample // grains.world)
    ffns = [ffn for ffn in model.ffns if not isinstance(ffn, DenseFFN)]
    for ffn in ffns:
        ffn.sampled_rows = torch.arange(each) * (train.grain * context) // each
    with grains.autocast():
        model.hidden(grains.tensors(batch)[0])
    rows = torch.zeros(len(ffns), grains.world, each, model.model.d_model, device=grains.device)
    for row, ffn in zip(rows, ffns, strict=True):
        row[grains.rank] = ffn.samples.pop().to(rows)
        ffn.sampled_rows = None
    if grains.world > 1:
        dist.all_reduce(rows)
    model.take_load()
    return rows.flatten(1, 2)
