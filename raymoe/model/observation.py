"""Observations of the feed-forward layers in one forward: loads, choices, routing, auxiliary losses, inputs.

A caller passes an `Observation` to a forward and reads it afterward. The layers store nothing
between two forwards. An observation changes no output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymoe.config import ModelSection
from raymoe.model.router import Choice, auxiliary_loss
from raymoe.model.routing_sums import LEVELS, QUANTITIES, routing_sums


@dataclass(frozen=True)
class Loads:
    """Integer loads of all layers in this process. Loads of several forwards add up.

    A level that the model lacks has shape [0, 0].
    """

    clusters_LC: Tensor
    """Choices by layer and cluster."""
    members_LM: Tensor
    """Choices by layer and member: M = 2E for clustered experts (experts, then their ghosts), M = E for flat ones."""
    rows_L: Tensor
    """Rows that this process computed, by layer; empty for a dense model."""

    def __add__(self, other: Loads) -> Loads:
        return Loads(
            self.clusters_LC + other.clusters_LC, self.members_LM + other.members_LM, self.rows_L + other.rows_L
        )

    @classmethod
    def zeros(cls, model: ModelSection) -> Loads:
        """Return the loads of no forward."""
        n_clusters = model.n_clusters if model.experts == "clustered" else 0
        n_members = model.n_experts if model.experts == "flat" else 0
        if model.has_members:
            n_members = 2 * model.n_experts
        count = lambda *shape: torch.zeros(shape if all(shape) else (0,) * len(shape), dtype=torch.int64)  # noqa: E731
        rows_L = count(0 if model.experts == "dense" else model.layers)
        return cls(count(model.layers, n_clusters), count(model.layers, n_members), rows_L)


class LayerObservation:
    """What one feed-forward layer observes in one forward.

    auxiliary, input_sums, routing, sampled_rows: see `Observation`. Fields that do not apply to the layer stay
    None.
    """

    def __init__(
        self,
        *,
        auxiliary: bool = False,
        input_sums: bool = False,
        routing: bool = False,
        sampled_rows: Tensor | None = None,
    ) -> None:
        self._wants_auxiliary, self._wants_input_sums, self._sampled_rows = auxiliary, input_sums, sampled_rows
        self._wants_routing = routing
        self.choice_TP: Tensor | None = None
        """[T, P] int64: the clusters that each row chose."""
        self.cluster_load_C: Tensor | None = None
        self.member_load_M: Tensor | None = None
        self.computed_rows: int | None = None
        """Rows that this process computed, rows from other processes included."""
        self.auxiliary: Tensor | None = None
        """Switch's auxiliary loss, summed over rows; differentiable."""
        self.input_sum_eD: Tensor | None = None
        """[e, D] float32: the sum of the inputs routed to each local member."""
        self.routing_Q: dict[str, Tensor] = {}
        """[Q] float64 by level: the sums of routing over the rows that this process routed."""
        self.samples_ND: Tensor | None = None
        """The inputs at `sampled_rows`."""

    def record_inputs(self, rows_TD: Tensor) -> None:
        if self._sampled_rows is not None:
            self.samples_ND = rows_TD.detach()[self._sampled_rows]

    def record_clusters(self, choice: Choice, n_clusters: int) -> None:
        """Record the choices of a router over clusters."""
        self.choice_TP = choice.index_TK
        self.cluster_load_C = self._record(choice, n_clusters)
        self._record_routing("clusters", [choice])

    def record_experts(self, choice: Choice, n_experts: int) -> None:
        """Record the choices of a router over experts (`flat`)."""
        self.member_load_M = self._record(choice, n_experts)
        self._record_routing("experts", [choice])

    def _record(self, choice: Choice, n_groups: int) -> Tensor:
        assert self.computed_rows is None, "an Observation belongs to one forward"
        self.computed_rows = 0
        if self._wants_auxiliary:
            self.auxiliary = auxiliary_loss(choice, n_groups)
        return torch.bincount(choice.index_TK.flatten(), minlength=n_groups)

    def _record_routing(self, level: str, choices: Sequence[Choice]) -> None:
        if self._wants_routing and choices:
            self.routing_Q[level] = torch.stack([routing_sums(choice) for choice in choices]).sum(0)

    def record_computed(self, n_rows: int) -> None:
        """Record rows that the local groups compute."""
        self.computed_rows = (self.computed_rows or 0) + n_rows

    def record_members(self, places: Sequence[Sequence[int]], counts: Sequence[Sequence[int]], n_members: int) -> None:
        """Record the choices of local members: for each local cluster their places in [M] and their counts."""
        self.member_load_M = torch.zeros(n_members, dtype=torch.int64)
        for place, count in zip(places, counts, strict=True):
            self.member_load_M[place] = torch.tensor(count, dtype=torch.int64)

    def record_routed(self, rows: Sequence[Tensor], choices: Sequence[Choice], sizes: Sequence[int]) -> None:
        """Observe stage 2: sum its routing and the inputs of local members.

        For each local cluster: its rows, their choices, its number of members.
        """
        self._record_routing("experts", choices)
        if not self._wants_input_sums:
            return
        sums: list[Tensor] = []
        for rows_RD, choice, size in zip(rows, choices, sizes, strict=True):
            routed_Re = rows_RD.new_zeros(rows_RD.shape[0], size)
            routed_Re.scatter_(1, choice.index_TK, 1.0)
            sums.append((routed_Re.t() @ rows_RD.detach()).float())
        self.input_sum_eD = torch.cat(sums)


class Observation:
    """A collector that a caller passes to one forward of a model and reads afterward.

    auxiliary: compute Switch's auxiliary loss. input_sums: sum the inputs routed to each local member.
    routing: compute the sums of `routing_sums`.
    sampled_rows [N] int64: positions in the flattened batch of the inputs to keep.
    """

    def __init__(
        self,
        model: ModelSection,
        *,
        auxiliary: bool = False,
        input_sums: bool = False,
        routing: bool = False,
        sampled_rows: Tensor | None = None,
    ) -> None:
        self.model = model
        self.layers = [
            LayerObservation(auxiliary=auxiliary, input_sums=input_sums, routing=routing, sampled_rows=sampled_rows)
            for _ in range(model.layers)
        ]

    @property
    def auxiliary(self) -> list[Tensor]:
        """The auxiliary loss of each layer that has one."""
        return self._present(lambda layer: layer.auxiliary)

    @property
    def choices_TP(self) -> list[Tensor]:
        """The clusters that each row chose, by layer; empty for a model without clusters."""
        return self._present(lambda layer: layer.choice_TP)

    @property
    def input_sums_eD(self) -> list[Tensor]:
        """The input sums of the local members, by layer."""
        return self._present(lambda layer: layer.input_sum_eD)

    @property
    def samples_LND(self) -> Tensor:
        """The sampled inputs of all layers."""
        return torch.stack(self._present(lambda layer: layer.samples_ND))

    def routing_sums(self) -> Tensor:
        """Return the sums of routing of this process by level and layer: [H, L, Q] float64, on the CPU.

        A level that was not observed has zeros.
        """
        sums_HLQ = torch.zeros(len(LEVELS), len(self.layers), len(QUANTITIES), dtype=torch.float64)
        for i, level in enumerate(LEVELS):
            for layer, seen in enumerate(self.layers):
                if level in seen.routing_Q:
                    sums_HLQ[i, layer] = seen.routing_Q[level].cpu()
        return sums_HLQ

    def loads(self) -> Loads:
        """Return the loads of the forward, on the CPU."""
        zeros = Loads.zeros(self.model)
        stack = lambda found, zero: torch.stack([t.cpu() for t in found]) if found else zero  # noqa: E731
        rows = [layer.computed_rows for layer in self.layers if layer.computed_rows is not None]
        return Loads(
            stack(self._present(lambda layer: layer.cluster_load_C), zeros.clusters_LC),
            stack(self._present(lambda layer: layer.member_load_M), zeros.members_LM),
            torch.tensor(rows) if rows else zeros.rows_L,
        )

    def _present(self, field: Callable[[LayerObservation], Tensor | None]) -> list[Tensor]:
        return [tensor for layer in self.layers if (tensor := field(layer)) is not None]
