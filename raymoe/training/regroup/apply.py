"""Regrouping on a worker: sends statistics, receives plans, and applies them between two steps.

Rank 0 polls the clusterer. Its offer of a plan is part of the all-reduce that every step performs, so all
ranks receive it at the same step. Each rank then decides alike: it applies the plan before exactly the
plan's effective step, or refuses it with a reason.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raymoe.clustering.plan import Refusal, RefusalReason, RemapPlan, moves, validate
from raymoe.config import Config
from raymoe.model.experts import ClusteredExperts
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.groups import rebalance
from raymoe.parallel.remap import Membership, moved, remap
from raymoe.parallel.sharded import Sharded
from raymoe.training.load import RoutingLoad
from raymoe.training.optimizer import Optimizer
from raymoe.training.regroup.clients import ClustererClient
from raymoe.training.regroup.clusterer import Decision, GainMeasured, Message, NoPlanMade, PlanMade
from raymoe.training.regroup.offers import check_offer, check_status, decode, encode
from raymoe.training.regroup.recorder import Recorder
from raymoe.training.state import Position


class Regrouping:
    """Owns the membership of experts in a run.

    `client` reaches the clusterer. Without a client an overlap in progress ends and no other plan is applied.
    `log` writes a record of plans, `probe` measures the loss on a few held-out windows, and `attempt` is the
    number of this worker group.
    """

    def __init__(
        self,
        config: Config,
        sharded: Sharded,
        optimizer: Optimizer,
        gradients: Gradients,
        position: Position,
        client: ClustererClient | None,
        log: Callable[..., None],
        probe: Callable[[], float],
        attempt: int,
    ) -> None:
        self.config, self.sharded, self.position = config, sharded, position
        self.optimizer, self.gradients = optimizer, gradients
        self.client, self.log, self.probe = client if config.regroups else None, log, probe
        self.recorder = Recorder(config, sharded, position.version, position.step)
        self.pending: RemapPlan | None = None
        self._offers: deque[RemapPlan] = deque()
        self._incarnation = 0
        self._merged = 0
        self._load_LC = np.zeros((config.model.layers, config.model.n_clusters))
        self._attempt = attempt

    # Before a step.

    def before_step(self, step: int) -> None:
        """Apply the pending plan if `step` is its effective step; fade or drop ghosts; arm the recorder. Collective."""
        position = self.position
        if self.pending and self.pending.effective_step == step:
            self._apply(self.pending)
        if any(position.membership.ghosts):
            overlap = self.config.regroup.overlap
            progress = (step - position.overlap_from) / overlap if overlap else 1.0
            if progress >= 1:
                self._drop()
            else:
                self._fade(progress)
        if self.client:
            self.recorder.arm(step + 1)

    def _apply(self, plan: RemapPlan) -> None:
        """Change the clusters to the plan's assignment. Collective.

        The recorded `pause_ms` covers the exchange and the change of parameters, without the two probes.
        """
        regroup, position, sharded = self.config.regroup, self.position, self.sharded
        self.pending = None
        before, probe = position.membership, self.probe()
        started = time.perf_counter()
        after = moved(before, plan.assignment)
        # One swap of two clusters between ranks balances the recent load.
        placed = [rebalance(p, row) for p, row in zip(sharded.placements, self._load_LC.tolist(), strict=False)]
        relocated = sum(a != b for p, q in zip(sharded.placements, placed, strict=True)
                        for a, b in zip(p.owners, q.owners, strict=True))  # fmt: skip
        sent = self._change(after, placed, refit=regroup.refit)
        position.version, position.overlap_from = plan.version, position.step
        position.forced |= plan.forced
        pause = time.perf_counter() - started
        self._fade(0.0)
        self.recorder.restart(position.version, position.step)
        changed = moves(before.assignment, plan.assignment)
        self.log(
            "applied", ahead=True, plan=plan.to_dict(), moves=len(changed), changes=[list(move) for move in changed],
            relocated_clusters=relocated, bytes=self._total(sent), pause_ms=1000 * pause, probe_before=probe, probe_after=self.probe(),
        )  # fmt: skip

    def _drop(self) -> None:
        """Drop all ghosts at the end of an overlap. Collective."""
        started = time.perf_counter()
        kept = replace(self.position.membership, ghosts=({},) * self.config.model.layers)
        self._change(kept, self.sharded.placements)
        pause = time.perf_counter() - started
        self.log("overlap_ended", ahead=True, version=self.position.version, pause_ms=1000 * pause, probe=self.probe())

    def _change(self, after: Membership, placed: list[Any], **options: Any) -> int:
        moments, sent = remap(
            self.sharded, self.position.membership, after, placed, self.optimizer.moments(),
            inputs=None if self.recorder.samples_LND is None else list(self.recorder.samples_LND), **options,
        )  # fmt: skip
        self.position.membership = after
        self.optimizer.adopt(self.sharded.transformer, moments, self.position.updates)
        self.gradients.refresh()
        return sent

    def _fade(self, progress: float) -> None:
        for ffn in self.sharded.transformer.ffns_of(ClusteredExperts):
            ffn.set_progress(progress)

    def _total(self, value: float) -> int:
        total = torch.tensor(float(value), dtype=torch.float64, device=self.gradients.buffer.device)
        if self.sharded.world > 1:
            dist.all_reduce(total)
        return int(total)

    # With the all-reduce of a step.

    def encode_offer(self) -> list[float]:
        """Return this rank's part of the step's all-reduce: rank 0 offers a plan, other ranks add zeros."""
        is_free = self.sharded.rank == 0 and not self.pending
        offer = self._offers[0] if is_free and self._offers else None
        return encode(offer, self.config.model.layers, self.config.model.n_experts)

    def decode_offer(self, values: Sequence[float]) -> None:
        """Accept or refuse the plan that the all-reduce delivered, if any; all ranks alike."""
        plan = decode(values, self.config.model.layers, self.config.model.n_experts)
        if plan is None:
            return
        if self._offers:  # rank 0
            self._offers.popleft()
        if refusal := self._check(plan):
            self._refuse(plan, refusal)
        else:
            self.pending = plan

    def _check(self, plan: RemapPlan) -> Refusal | None:
        """Return the refusal of a plan, the same on all ranks, or None."""
        model, position = self.config.model, self.position
        if self.pending:
            detail = f"version {self.pending.version} takes effect at step {self.pending.effective_step}"
            return Refusal(RefusalReason.BUSY, detail)
        overlap_to = position.overlap_from + self.config.regroup.overlap
        if any(position.membership.ghosts) and plan.effective_step < overlap_to:
            return Refusal(RefusalReason.BUSY, f"the overlap of the last plan ends at step {overlap_to}")
        return validate(
            plan, version=position.version, assignment=position.membership.assignment, step=position.step,
            n_clusters=model.n_clusters, max_moves=self.config.regroup.max_moves, min_members=model.experts_per_token,
        )  # fmt: skip

    def _refuse(self, plan: RemapPlan | None, refusal: Refusal) -> None:
        """Record a refusal; without the plan if it is malformed."""
        malformed = refusal.reason is RefusalReason.MALFORMED
        recorded = plan.to_dict() if plan and not malformed else None
        self.log("refused", reason=refusal.reason.value, detail=refusal.detail, plan=recorded)

    # After a step.

    def after_step(self, load: RoutingLoad) -> None:
        """Record the step's statistics, send them, and receive decisions. Waits for the clusterer in lockstep only."""
        step, mode = self.position.step, self.config.regroup.mode
        if self.client is None:
            return
        if load.clusters.numel():
            self._load_LC = 0.9 * self._load_LC + load.clusters.numpy()
        self.recorder.read(step, load, self.position.membership.assignment)
        is_period_end = step % self.config.period == 0
        is_due = is_period_end or step % self.config.regroup.stats_every == 0
        if mode == "lockstep" and is_due:
            self.client.flush()  # so that the content of a message does not depend on the clusterer's pace
        if is_due and mode != "replay":
            self._send_statistics(self.client)
        status = None
        if mode != "lockstep":
            status = self.client.poll(self._attempt) if self.sharded.rank == 0 else None
        elif is_period_end:
            self.client.flush()
            if self.sharded.world > 1:
                dist.barrier()
            status = self.client.wait_for_status(self._attempt) if self.sharded.rank == 0 else None
        if status is not None:
            self._receive(status)

    def _send_statistics(self, client: ClustererClient) -> None:
        """Send the gathered statistics. While the last message is in flight they merge into the next one."""
        position = self.position
        if client.ready():
            message = Message(
                self._attempt, self.sharded.rank, self.sharded.world, position.membership.assignment, position.forced,
                self.recorder.total,
            )  # fmt: skip
            client.send(message)
        else:
            self._merged += 1
        self.log("messages", merged=self._merged, lost=client.lost)

    def _receive(self, received: object) -> None:
        """Record the clusterer's decisions and queue its plans. Untrusted: anything malformed is refused."""
        try:
            status = check_status(received)
            if self._incarnation and status.incarnation != self._incarnation:
                self.log("clusterer_restarted")
            self._incarnation = status.incarnation
            for decision in status.decisions:
                self._receive_decision(decision)
            lag = self.position.step - status.step if status.step >= 0 else None
            self.log("status", lag_steps=lag, refused_messages=int(status.refused_messages))
        except Exception as error:
            self._refuse(None, Refusal(RefusalReason.MALFORMED, str(error)))

    def _receive_decision(self, decision: Decision) -> None:
        if isinstance(decision, NoPlanMade):
            found = decision.no_plan
            self.log(
                "no_plan", made_at_step=found.made_at_step, reason=found.reason.value, detail=found.detail,
                expected_gain=found.expected_gain, seconds=decision.seconds, similarity_kind=self.config.regroup.similarity,
            )  # fmt: skip
        elif isinstance(decision, GainMeasured):
            self.log(
                "gain_measured", version=decision.version, gain=decision.gain, similarity=decision.similarity,
                similarity_kind=self.config.regroup.similarity,
            )  # fmt: skip
        else:
            self._queue(decision)

    def _queue(self, made: PlanMade) -> None:
        """Queue a plan as an offer of rank 0, or refuse it."""
        plan = made.plan
        if refusal := check_offer(plan, self.config, self.position.step):
            self._refuse(plan, refusal)
            return
        if self.config.regroup.mode == "replay" and plan.version <= self.position.version:
            return  # applied before the checkpoint from which this run resumed
        regroup = self.config.regroup
        by: dict[str, str] = {}
        if regroup.mode != "replay":
            by["similarity_kind"] = regroup.similarity
            if plan.forced:
                by["force_kind"] = regroup.force_kind
        self.log("made", plan=plan.to_dict(), seconds=made.seconds, similarity=made.similarity, **by)
        self._offers.append(plan)
