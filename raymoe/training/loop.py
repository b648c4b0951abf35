"""The training loop of one worker. All ranks run it in lockstep.

A step computes the gradients of this rank's grains, sums one report and the routing loads over ranks, all-reduces the
trunk's gradients, applies the clipped update, and moves the routers' selection biases. Validation, checkpoints and
stops happen between steps, on all ranks or on none.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymoe.config import Config
from raymoe.data.corpus import Corpus
from raymoe.metrics import TrainingMetrics
from raymoe.model.observation import Loads, Observation
from raymoe.model.transformer import Transformer
from raymoe.parallel.fold import fold
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.sharded import shard
from raymoe.storage.run_folder import RunFolder
from raymoe.training.checkpointing import Checkpointing, Clock
from raymoe.training.grains import Grains, checksum_of
from raymoe.training.journal import next_attempt
from raymoe.training.load import RoutingLoad
from raymoe.training.optimizer import Optimizer, bias_rate, learning_rate
from raymoe.training.regroup.apply import Regrouping
from raymoe.training.regroup.clients import ClustererClient
from raymoe.training.regroup.recorder import sample_inputs
from raymoe.training.routing import routing_record
from raymoe.training.run_log import RunLog
from raymoe.training.state import DataIdentity, Position, find_checkpoint, require_initial_weights, restore
from raymoe.training.step_report import StepReport, rank_and_world, sync_stats
from raymoe.training.stragglers import Stragglers
from raymoe.training.validation import probe, validate, validation_record
from raymoe.training.window import Window

MAX_SKIPPED = 20
"""Consecutive steps without a finite loss after which a run fails."""


class Trainer:
    """One worker of a run. `client` reaches the clusterer; a file `stop` in the run's folder requests a stop."""

    def __init__(
        self, config: Config, corpus: Corpus, run: Path, metrics: TrainingMetrics, device: torch.device,
        client: ClustererClient | None = None, *, clock: Clock = time,
    ) -> None:  # fmt: skip
        """Build this rank's shard and restore it, or initialize it. Collective.

        Raises LostCheckpoints, or Unrecoverable if the run's checkpoint was trained on other data.
        """
        self.config, self.corpus, self.run, self.metrics, self.device = config, corpus, run, metrics, device
        self.client, self.attempt = client, next_attempt(run)
        self.rank, self.world = rank_and_world()
        checkpoint, skipped = find_checkpoint(run)
        require_initial_weights(config, checkpoint, run)
        self.position, data = Position.start(config), DataIdentity.of(corpus)
        if checkpoint:
            self.position = Position.of(checkpoint)
            data.require_same(checkpoint.meta)
        self.window, self.stragglers = Window(), Stragglers()
        self.skipped_in_a_row = 0
        self.log = RunLog(config, run, metrics, self.position, self.rank)
        self.checkpoints = Checkpointing(
            config, run, data, device, self.log.event, clock=clock,
            last_completed=self.position.step if checkpoint else -1,
        )  # fmt: skip
        self.build()
        if checkpoint:
            restore(checkpoint, self.sharded, self.optimizer)
            if self.regrouping:
                self.regrouping.recorder.restore(checkpoint)
        else:
            self.model.initialize(config.run.seed, common=not self.position.folded)
        self.log.started(attempt=self.attempt, workers=self.world, checkpoint=checkpoint, skipped=skipped)

    def build(self) -> None:
        """Build this rank's model shard (uninitialized), gradients, optimizer and regrouping. Collective."""
        config, membership = self.position.config_now(self.config), self.position.membership
        self.sharded = shard(config.model, membership.assignment, membership.ghosts)
        self.model = self.sharded.transformer.to(self.device)
        self.grains = Grains(self.config, self.corpus, self.device, self.rank, self.world)
        self.gradients = Gradients(self.sharded)
        self.optimizer = Optimizer(self.model, config.train)
        self.checkpoints.attach(self.sharded, self.optimizer)
        self.regrouping: Regrouping | None = None
        if config.model.has_members:
            self.regrouping = Regrouping(
                config, self.sharded, self.optimizer, self.gradients, self.position, self.client, self.log.plan,
                self.probe, self.attempt,
            )  # fmt: skip

    def train(self) -> dict[str, Any]:
        """Train to the last step or to a requested stop. Return the step reached."""
        train, position, stopped = self.config.train, self.position, False
        self.checkpoints.check_space()
        while position.step < train.steps and not stopped:
            report = self.train_step()
            last, stopped = position.step == train.steps, report.stop
            if self.is_logged(position.step) or stopped:
                self.record_window()
            self.checkpoints.update(writing=report.writing, failed=report.failed)
            if (position.step % train.validate_every == 0 or last) and not stopped:
                self.validate(whole=last)
            every = position.step % self.config.checkpoint.every == 0
            if every or last or stopped or report.due or report.requested:
                self.checkpoints.write(position, self.statistics())
            if report.requested:
                self.checkpoints.fulfill_request()
        self.checkpoints.finish(position, self.statistics)
        if stopped:
            self.log.event(name="stopped")
        self.log.close()
        return {"step": position.step, "stopped": stopped, "skipped": position.skipped}

    def is_logged(self, step: int) -> bool:
        """Return whether a train record is written after `step` steps. A stop writes one after any step."""
        return step % self.config.train.log_every == 0 or step == self.config.train.steps

    def train_step(self) -> StepReport:
        """Run one step, with the regrouping before and after it. Raises FloatingPointError after MAX_SKIPPED skipped steps."""
        train, position, started = self.config.train, self.position, time.perf_counter()
        if not position.folded and position.step >= self.config.regroup.burn_in:
            fold_experts(self)
        if self.regrouping:
            self.regrouping.before_step(position.step)
        loss, norm, load, report = self.forward_backward(position.step)
        position.step += 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step(learning_rate(train, position.step - 1))
            balance(self.model, load, bias_rate(train, position.step - 1))
            position.updates += 1
            self.skipped_in_a_row = 0
        else:
            self.skip(loss, norm)
        if self.regrouping:
            self.regrouping.decode_offer(report.plan)
            self.regrouping.after_step(load)
        tokens = train.global_batch * self.config.model.context
        position.tokens += tokens
        self.window.add(
            loss=loss, finite=finite, grad_norm=norm, load=load, sent_bytes=report.sent_bytes, tokens=tokens,
            seconds=time.perf_counter() - started, tokens_hash=report.tokens_hash,
        )  # fmt: skip
        return report

    def skip(self, loss: float, norm: float) -> None:
        """Count a step whose loss or gradient norm is not finite. The weights stay."""
        self.position.skipped += 1
        self.skipped_in_a_row += 1
        self.log.event(name="step_skipped", loss=loss, grad_norm=norm)
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss was not finite for {MAX_SKIPPED} steps in a row, up to step {self.position.step}: "
                "lower train.lr, or resume from an earlier checkpoint"
            )

    def forward_backward(self, step: int) -> tuple[float, float, RoutingLoad, StepReport]:
        """Compute the gradients of a step, reduced and clipped. Return loss, gradient norm, load and report of all ranks."""
        train, started = self.config.train, time.perf_counter()
        tokens, counted = train.global_batch * self.config.model.context, self.grains.targets(step)
        self.gradients.zero()
        loss, checksum, loads = torch.zeros((), device=self.device), 0, Loads.zeros(self.model.model)
        recorder = self.regrouping.recorder if self.regrouping else None
        self.sharded.meter.take()
        for rows, batch in self.grains.training(step):
            checksum += checksum_of(rows, batch)
            self.window.grains += bool(len(rows))
            options = recorder.options(rows) if recorder else {}
            routing = self.is_logged(step + 1)
            seen = Observation(self.model.model, auxiliary=self.config.aux_loss > 0, routing=routing, **options)
            inputs, targets = self.grains.tensors(batch)
            with self.grains.autocast():
                hidden = self.model.hidden(inputs, seen=seen)
                part = self.grains.loss(hidden, self.model.head_weight, targets, batch) / counted
            objective = part
            for auxiliary in seen.auxiliary:
                objective = objective + self.config.aux_loss * auxiliary / tokens
            objective.backward()
            loads = loads + seen.loads()
            if routing:
                self.window.add_routing(seen.routing_sums())
            if recorder:
                recorder.add(rows, seen)
            loss += part.detach()
        own = self.report(loss.item(), checksum, started)
        started = time.perf_counter()
        load, report = sync_stats(own, loads, self.config.model.n_experts, self.device)
        self.gradients.reduce()
        self.window.communication_s += time.perf_counter() - started
        return report.loss, self.gradients.clip(train.clip), load, report

    def report(self, loss: float, checksum: int, started: float) -> StepReport:
        """Return this rank's report of a step whose gradients are computed, and add its times to the window."""
        plan = tuple(self.regrouping.encode_offer()) if self.regrouping else ()
        waited_s = self.sharded.meter.waited_s
        self.window.compute_s += time.perf_counter() - started - waited_s
        self.window.communication_s += waited_s
        checkpoints = self.checkpoints
        return StepReport(
            loss=loss, sent_bytes=self.sharded.meter.take(), tokens_hash=checksum, plan=plan,
            stop=self.rank == 0 and RunFolder(self.run).stop_request.exists(), writing=checkpoints.writing,
            failed=bool(checkpoints.failure), due=checkpoints.due, requested=checkpoints.requested,
        )  # fmt: skip

    def record_window(self) -> None:
        """Write one train record: means since the last one, loads and stragglers. Collective."""
        position, fields = self.position, self.window.record(self.device)
        routing = routing_record(self.model, self.window.routing_HLQ, self.device)
        if epochs := self.grains.epochs(position.step):
            fields["epochs"] = epochs
        self.window = Window()
        rate = learning_rate(self.config.train, position.step - 1)
        self.log.record(
            "train", **fields, **routing, lr=rate, tokens=position.tokens, version=position.version,
            skipped_steps=position.skipped,
        )  # fmt: skip
        for worker in self.stragglers.update(fields["slowness"]):
            self.log.event(name="straggler", worker=worker, factor=fields["slowness"][worker])

    def validate(self, *, whole: bool) -> None:
        """Write one validation record, over the whole validation set or `train.validate_windows` of it. Collective."""
        limit = None if whole else self.config.train.validate_windows
        found, loads, routing_HLQ = validate(self.model, self.grains, limit)
        load, _ = sync_stats(StepReport(), loads, self.config.model.n_experts, self.device)
        routing = routing_record(self.model, routing_HLQ, self.device)
        self.sharded.meter.take()  # train records count the bytes of training steps only
        self.position.validation[self.position.step] = found.loss
        self.log.record("validation", **validation_record(found, load), **routing, whole=whole)

    def probe(self) -> float:
        """Return the loss on a few validation windows. Collective."""
        loss = probe(self.model, self.grains)
        self.sharded.meter.take()
        return loss

    def statistics(self) -> Mapping[str, Tensor]:
        """Return the statistics that a checkpoint stores: on rank 0, those of all ranks by key. Collective."""
        return self.regrouping.recorder.tensors() if self.regrouping else {}


def fold_experts(trainer: Trainer) -> None:
    """Fold independent experts into clusters, at the end of the burn-in of a dense start. Collective."""
    config, position = trainer.config, trainer.position
    trainer.checkpoints.wait_for_checkpoint()  # it is of the flat model
    before, started = trainer.probe(), time.perf_counter()
    assignment, tensors = fold(
        trainer.sharded, trainer.optimizer.moments(), sample_inputs(trainer.model, trainer.grains, position.step),
        clustered=config.model, alpha=config.regroup.alpha, seed=config.run.seed,
    )  # fmt: skip
    position.membership, position.folded = replace(position.membership, assignment=assignment), True
    trainer.build()
    with torch.no_grad():
        for key, view in (trainer.model.logical() | trainer.optimizer.logical()).items():
            view.copy_(tensors[key])
    trainer.optimizer.restore(position.updates)
    pause = time.perf_counter() - started
    trainer.log.plan("folded", ahead=True, pause_ms=1000 * pause, probe_before=before, probe_after=trainer.probe())


def balance(model: Transformer, load: RoutingLoad, rate: float) -> None:
    """Move the routers' selection biases toward equal load."""
    for i, ffn in enumerate(model.ffns):
        clusters, members = (counts[i] if counts.numel() else counts for counts in (load.clusters, load.members))
        ffn.balance(clusters, members, rate)


def threads(config: Config, local_workers: int) -> int:
    """Return the compute threads of a worker: `train.threads`, or its share of the machine's cores."""
    return config.train.threads or max(1, (os.cpu_count() or 1) // local_workers)
