"""A worker's side of regrouping: statistics out, plans in, clusters changed between two steps.

Rank 0 hears of plans; what it has heard rides on the sum over ranks that every step makes anyway, so
all ranks learn the same at the same step. From there each decides alike: a plan takes effect before
exactly the step that it names, or is refused with a reason.
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

from raymoe.clustering.plan import RemapPlan, moves, validate
from raymoe.config import Config
from raymoe.model.experts import ClusteredExperts
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.groups import rebalance
from raymoe.parallel.remap import Membership, moved, remap
from raymoe.parallel.sharded import Sharded
from raymoe.training.load import RoutingLoad
from raymoe.training.optimizer import Optimizer
from raymoe.training.regroup.clients import ClustererClient
from raymoe.training.regroup.clusterer import ClustererStatus, Message
from raymoe.training.regroup.recorder import Recorder
from raymoe.training.state import Position

HEADER = ("announced", "version", "made_at_step", "effective_step", "expected_gain", "forced")
"""What rank 0 says of a plan at a step, before the plan's assignment."""


class Regrouping:
    """Keeps a run's membership.

    `client` is how this rank reaches the clusterer; without one, what is on the move arrives and nothing
    else happens. `log` takes a record of plans, `probe` measures the loss on a few held-out windows, `attempt` is
    the number of this worker group.
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
        """Change what changes between two steps: apply the plan whose step has come, fade ghosts, drop the faded."""
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
        """Change clusters to those of the plan. A collective.

        `pause_ms` is the exchange and the change of parameters; the two probes around it come on top.
        """
        regroup, position, sharded = self.config.regroup, self.position, self.sharded
        self.pending = None
        before, probe = position.membership, self.probe()
        started = time.perf_counter()
        after = moved(before, plan.assignment)
        # A swap of two clusters between ranks relieves a rank that the load of late has made heavy.
        placed = [rebalance(p, row) for p, row in zip(sharded.placements, self._load_LC.tolist(), strict=False)]
        relocated = sum(a != b for p, q in zip(sharded.placements, placed, strict=True)
                        for a, b in zip(p.owners, q.owners, strict=True))  # fmt: skip
        sent = self._change(after, placed, refit=regroup.refit)
        position.version, position.overlap_from = plan.version, position.step
        position.forced |= plan.reason == "forced"
        pause = time.perf_counter() - started
        self._fade(0.0)
        self.recorder.restart(position.version, position.step)
        changed = moves(before.assignment, plan.assignment)
        self.log(
            "applied", ahead=True, plan=plan.to_dict(), moves=len(changed), changes=[list(move) for move in changed],
            relocated_clusters=relocated, bytes=self._total(sent), pause_ms=1000 * pause, probe_before=probe, probe_after=self.probe(),
        )  # fmt: skip

    def _drop(self) -> None:
        """The overlap is over: the ghosts go. A collective."""
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

    # With a step's own collective.

    def encode_offer(self) -> list[float]:
        """What this rank adds to the step's sum: rank 0 the plan that it offers, the others nothing."""
        model = self.config.model
        blank = [0.0] * (len(HEADER) + model.layers * model.n_experts)
        if self.sharded.rank:
            return blank
        if not self._offers or self.pending:
            return blank
        plan = self._offers[0]
        header = [1.0, plan.version, plan.made_at_step, plan.effective_step, plan.expected_gain]
        assignment = [float(c) for row in plan.assignment for c in row]
        return [*map(float, header), float(plan.reason == "forced"), *assignment]

    def decode_offer(self, said: Sequence[float]) -> None:
        """What all ranks have heard after the step: a plan, accepted or refused by all alike."""
        header = dict(zip(HEADER, said, strict=False))
        if not header["announced"]:
            return
        flat = torch.tensor(said[len(HEADER) :]).long().view(self.config.model.layers, -1).tolist()
        plan = self._offers.popleft() if self._offers else None
        plan = plan or RemapPlan(
            int(header["version"]), int(header["made_at_step"]), int(header["effective_step"]),
            tuple(map(tuple, flat)), "forced" if header["forced"] else "", header["expected_gain"],
        )  # fmt: skip
        reason = self._objection(plan)
        if reason:
            self._refuse(plan.to_dict(), reason)
        else:
            self.pending = plan

    def _objection(self, plan: RemapPlan) -> str | None:
        """Why this plan cannot be; the same on all ranks."""
        model, position = self.config.model, self.position
        if self.pending:
            return f"busy: version {self.pending.version} waits for step {self.pending.effective_step}"
        overlap_to = position.overlap_from + self.config.regroup.overlap
        if any(position.membership.ghosts) and plan.effective_step < overlap_to:
            return f"busy: experts are on the move until step {overlap_to}"
        return validate(
            plan, version=position.version, assignment=position.membership.assignment, step=position.step,
            n_clusters=model.n_clusters, max_moves=self.config.regroup.max_moves, min_members=model.experts_per_token,
        )  # fmt: skip

    def _refuse(self, plan: Any, reason: str) -> None:
        self.log("refused", reason=reason, plan=plan)

    # After a step.

    def after_step(self, load: RoutingLoad) -> None:
        """Take in what the step showed, tell the clusterer, and hear what it has decided. Waits in lockstep only."""
        step, mode = self.position.step, self.config.regroup.mode
        if self.client is None:
            return
        if load.clusters.numel():
            self._load_LC = 0.9 * self._load_LC + load.clusters.numpy()
        self.recorder.read(step, load, self.position.membership.assignment)
        due = step % self.config.regroup.stats_every == 0 or step % self.config.period == 0
        if mode == "lockstep" and due:
            self.client.flush()  # so that what is sent does not depend on the clusterer's pace
        if due and mode != "replay":
            self._send_statistics(self.client)
        answer = None
        if mode != "lockstep":
            answer = self.client.poll(self._attempt) if self.sharded.rank == 0 else None
        elif step % self.config.period == 0:
            self.client.flush()
            if self.sharded.world > 1:
                dist.barrier()
            answer = self.client.wait_for_status(self._attempt) if self.sharded.rank == 0 else None
        if answer is not None:
            self._receive(answer)

    def _send_statistics(self, client: ClustererClient) -> None:
        """Send the statistics that are new; while the last message waits, they wait and merge into the next."""
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

    def _receive(self, answer: Any) -> None:
        """Note what the clusterer decided. It is not trusted: what is not an answer is refused, whatever it is."""
        try:
            if not isinstance(answer, ClustererStatus) or {type(answer.step), type(answer.incarnation)} != {int}:
                raise ValueError(f"{type(answer).__name__} is not an answer")
            if self._incarnation and answer.incarnation != self._incarnation:
                self.log("clusterer_restarted")
            self._incarnation = answer.incarnation
            for decision in answer.decisions:
                self._note(dict(decision))
            lag = self.position.step - answer.step if answer.step >= 0 else None
            self.log("status", lag_steps=lag, refused_messages=int(answer.refused_messages))
        except Exception as error:
            self._refuse(None, f"malformed: {error}")

    def _note(self, decision: dict[str, Any]) -> None:
        kind = decision.pop("kind")
        if kind == "plan":
            raw = decision["plan"]
            try:
                plan = RemapPlan.from_dict(raw)
                shape = {len(plan.assignment), *map(len, plan.assignment)}
                model = self.config.model
                if shape != {model.layers, model.n_experts}:
                    raise ValueError(
                        f"an assignment of {len(plan.assignment)} layers of {len(plan.assignment[0])} experts"
                    )
            except ValueError as error:
                self._refuse(raw, f"malformed: {error}")
                return
            if self.config.regroup.mode == "replay":
                if plan.version <= self.position.version:
                    return  # applied before the checkpoint from which this run goes on
            elif plan.effective_step != plan.made_at_step + self.config.regroup.plan_lag:
                self._refuse(
                    raw, f"malformed: effective_step is not plan_lag={self.config.regroup.plan_lag} after made_at_step"
                )
                return
            elif plan.made_at_step > self.position.step:
                self._refuse(raw, f"malformed: made at step {plan.made_at_step}, which is still to come")
                return
            self.log("made", **decision)
            self._offers.append(plan)
        elif kind == "none":
            self.log("no_plan", **decision)
        elif kind == "seen":
            self.log("gain_measured", **decision)
        else:
            raise ValueError(f"a decision of kind {kind!r}")
