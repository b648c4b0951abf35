"""The training loop of one worker. Every rank runs it alike; agreement rides on one collective a step.

A step: gradients of this rank's grains; one small sum over ranks (loss, loads, flags); the trunk's
gradients; the clipped update; the routers' biases. Validation, checkpoints and stopping happen at
step boundaries, on all ranks or on none.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from raymoe.config import Config
from raymoe.data.corpus import Corpus
from raymoe.evaluation import load_cv, load_max_vio
from raymoe.metrics import TrainingMetrics
from raymoe.model.loss import linear_cross_entropy
from raymoe.model.observation import Loads, Observation
from raymoe.parallel.fold import fold
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.sharded import shard
from raymoe.storage.mirror import BackgroundMirror, Mirror
from raymoe.storage.run_folder import RunFolder
from raymoe.training.grains import Grains, checksum_of
from raymoe.training.journal import Journal, next_attempt
from raymoe.training.load import RoutingLoad, Window
from raymoe.training.optimizer import Optimizer, bias_rate, learning_rate
from raymoe.training.regroup.apply import Regrouping
from raymoe.training.regroup.clients import ClustererClient
from raymoe.training.regroup.recorder import sample_inputs
from raymoe.training.state import Checkpointer, Position, find, restore
from raymoe.training.stragglers import Stragglers, ratios
from raymoe.training.validation import probe, validate

SKIPS_IN_A_ROW = 20
"""Steps without a finite loss after which a run gives up."""


class StepReport(NamedTuple):
    """What each rank says at a step, beside its loads: summed over ranks in one collective."""

    loss: float = 0.0
    stop: float = 0.0
    sent_bytes: float = 0.0
    pending: float = 0.0
    failed: float = 0.0
    due: float = 0.0
    """Of rank 0: a checkpoint must be begun now (`checkpoint.max_loss_s`)."""
    asked: float = 0.0
    """Of rank 0: the driver has asked for one (`raymoe.training.elastic`)."""
    tokens_hash: float = 0.0
    """Of the step's tokens, whoever read them: a sum of the grains' checksums, exact in float64."""
    plan: Sequence[float] = ()
    """Of rank 0: a plan that it has heard of (`raymoe.training.regroup.apply`)."""


class Trainer:
    """A worker's run. `run` is the run's folder, a file `stop` in it asks for an orderly stop; `client` reaches the clusterer."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        run: Path,
        metrics: TrainingMetrics,
        device: torch.device,
        client: ClustererClient | None = None,
    ) -> None:
        self.config, self.corpus, self.run, self.metrics, self.device = config, corpus, run, metrics, device
        self.client, self.attempt = client, next_attempt(run)
        checkpoint, passed_over = find(run)
        self.position = Position.of(checkpoint) if checkpoint else Position.start(config)
        self.window, self.stragglers = Window(), Stragglers()
        self.skipped_in_a_row = 0
        self.mirror: BackgroundMirror | None = None
        self.build()
        self.rank, self.world = self.sharded.rank, self.sharded.world
        if checkpoint:
            restore(checkpoint, self.sharded, self.optimizer)
            self.checkpoints.last_sealed = self.position.step
            if self.regrouping:
                self.regrouping.recorder.restore(checkpoint)
        else:
            self.model.initialize(config.run.seed, common=not self.position.folded)
        self.journal = Journal(RunFolder(run).metrics, self.position.step) if self.rank == 0 else None
        self.plans = Journal(RunFolder(run).plans, self.position.step) if self.rank == 0 else None
        if config.checkpoint.storage and self.rank == 0:
            there = Mirror(config.checkpoint.storage, config.run.name)
            self.mirror = BackgroundMirror(there, run, config.checkpoint.keep)
            self.checkpoints.in_use = self.mirror.steps
        for reason in passed_over:
            self.log("event", name="checkpoint_skipped", reason=reason)
        if checkpoint or self.attempt > 1:  # a worker group may be lost before the first checkpoint
            self.log(
                "event",
                name="resumed" if checkpoint else "restarted",
                attempt=self.attempt,
                workers=self.world,
                redone_steps=self.journal.redone if self.journal else 0,
                skipped_steps=self.position.skipped,
                **({"checkpoint": str(checkpoint.folder)} if checkpoint else {}),
            )
        if not checkpoint:
            self.log("assignment", version=self.position.version, assignment=self.position.membership.assignment)

    def build(self) -> None:
        """Make room for what this rank holds of the model as it stands, uninitialised. A collective."""
        config, membership = self.position.config_now(self.config), self.position.membership
        self.sharded = shard(config.model, membership.assignment, membership.ghosts)
        self.model = self.sharded.transformer.to(self.device)
        self.grains = Grains(self.config, self.corpus, self.device, self.sharded.rank, self.sharded.world)
        self.gradients = Gradients(self.sharded)
        self.optimizer = Optimizer(self.model, config.train)
        self.checkpoints = Checkpointer(RunFolder(self.run).checkpoints, self.config, self.sharded, self.optimizer)
        self.regrouping: Regrouping | None = None
        if config.model.experts == "clustered" and config.model.residual_width:
            self.regrouping = Regrouping(
                config, self.sharded, self.optimizer, self.gradients, self.position, self.client, self.log_plan,
                self.probe, self.attempt,
            )  # fmt: skip

    def log(self, kind: str, **fields: Any) -> None:
        """One record: to this worker's metrics, and from rank 0 to the run's journal."""
        record = {**fields, "kind": kind, "step": self.position.step}
        self.metrics.observe(record)
        if self.journal:
            self.journal.write(record)

    def log_plan(self, name: str, **fields: Any) -> None:
        """One record of regrouping: to this worker's metrics, and from rank 0 to the run's plans."""
        record = {**fields, "kind": "plan", "step": self.position.step, "name": name}
        self.metrics.observe(record)
        if self.plans and name not in ("messages", "status"):
            self.plans.write({**record, "time": time.time()})
        if name in ("applied", "folded"):
            position = self.position
            self.log("assignment", ahead=True, version=position.version, assignment=position.membership.assignment)

    def train(self) -> dict[str, Any]:
        """Run to the last step or to an orderly stop. Returns where it stands."""
        train, position = self.config.train, self.position
        stopped = False
        while position.step < train.steps and not stopped:
            said = self.train_step()
            last = position.step == train.steps
            stopped = said.stop > 0
            if position.step % train.log_every == 0 or last or stopped:
                self.report(self.window)
                self.window = Window()
            if self.checkpoints.unsealed and not said.pending:
                self.settle(said.failed > 0)
            if (position.step % train.validate_every == 0 or last) and not stopped:
                self.validate(whole=last)
            if position.step % self.config.checkpoint.every == 0 or last or stopped or said.due or said.asked:
                self.checkpoint()
            if said.asked:
                self.answer()
        self.finish()
        if stopped:
            self.log("event", name="stopped")
        return {"step": position.step, "stopped": stopped, "skipped": position.skipped}

    def train_step(self) -> StepReport:
        """One step, with the regrouping before and after it. Raises FloatingPointError once too many were skipped."""
        train, position = self.config.train, self.position
        started = time.perf_counter()
        if not position.folded and position.step >= self.config.regroup.burn_in:
            self.fold()
        if self.regrouping:
            self.regrouping.before_step(position.step)
        loss, norm, load, said = self.forward_backward(position.step)
        position.step += 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step(learning_rate(train, position.step - 1))
            self.balance(load, bias_rate(train, position.step - 1))
            position.updates += 1
            self.skipped_in_a_row = 0
        else:
            position.skipped += 1
            self.skipped_in_a_row += 1
            self.log("event", name="step_skipped", loss=loss, grad_norm=norm)
            if self.skipped_in_a_row == SKIPS_IN_A_ROW:
                raise FloatingPointError(
                    f"the loss was not finite for {SKIPS_IN_A_ROW} steps in a row, up to step {position.step}: "
                    "lower train.lr, or resume from an earlier checkpoint"
                )
        if self.regrouping:
            self.regrouping.decode_offer(said.plan)
            self.regrouping.after_step(load)
        tokens = train.global_batch * self.config.model.context
        position.tokens += tokens
        seconds = time.perf_counter() - started
        self.window.add(loss if finite else None, norm, load, said.sent_bytes, tokens, seconds, int(said.tokens_hash))
        return said

    # One step.

    def forward_backward(self, step: int) -> tuple[float, float, RoutingLoad, StepReport]:
        """Gradients of step `step` over the global batch, reduced and clipped: (loss, norm, load, what ranks said)."""
        train = self.config.train
        tokens = train.global_batch * self.config.model.context
        self.gradients.zero()
        loss = torch.zeros((), device=self.device)
        loads, auxiliary = Loads.zeros(self.model.model), self.config.aux_loss > 0
        checksum, started = 0, time.perf_counter()
        self.sharded.meter.take()
        for rows, batch in self.grains.training(step):
            checksum += checksum_of(rows, batch)
            self.window.grains += bool(len(rows))
            recorder = self.regrouping.recorder if self.regrouping else None
            options = recorder.options(rows) if recorder else {}
            seen = Observation(self.model.model, auxiliary=auxiliary, **options)
            inputs, targets = self.grains.tensors(batch)
            with self.grains.autocast():
                hidden = self.model.hidden(inputs, seen=seen)
                part = linear_cross_entropy(hidden.flatten(0, 1), self.model.head_weight, targets.flatten()) / tokens
            objective = part
            for auxiliary_loss in seen.auxiliary:
                objective = objective + self.config.aux_loss * auxiliary_loss / tokens
            objective.backward()
            loads = loads + seen.loads()
            if recorder:
                recorder.add(rows, seen)
            loss += part.detach()
        stop = self.rank == 0 and (self.run / "stop").exists()
        due = self.rank == 0 and self.checkpoints.due
        asked = self.rank == 0 and RunFolder(self.run).checkpoint_request.exists()
        pending, failed = self.checkpoints.pending, bool(self.checkpoints.failure)
        plan = self.regrouping.encode_offer() if self.regrouping else []
        total = loss.item()
        self.window.compute_s += time.perf_counter() - started - self.sharded.meter.waited_s
        sent = self.sharded.meter.take()
        report = StepReport(total, stop, sent, pending, failed, due, asked, checksum, plan)
        load, said = self.sync_stats(report, loads)
        self.gradients.reduce()
        norm = self.gradients.clip(train.clip)
        return said.loss, norm, load, said

    def sync_stats(self, says: StepReport, loads: Loads) -> tuple[RoutingLoad, StepReport]:
        """Sum what ranks say and their loads (integers below 2^53 are exact in float64). A collective."""
        clusters, members = loads.clusters_LC, loads.members_LM
        workers = torch.zeros(len(loads.rows_L), self.world, dtype=torch.float64)
        workers[:, self.rank] = loads.rows_L.double()
        *flags, plan = says
        parts = [torch.tensor([*map(float, flags), *plan], dtype=torch.float64), clusters, members, workers]
        vector = torch.cat([p.double().flatten() for p in parts]).to(self.device)
        if self.world > 1:
            dist.all_reduce(vector)
        summed = vector.cpu().split([p.numel() for p in parts])
        said, clusters, members, workers = (s.view(p.shape) for s, p in zip(summed, parts, strict=True))
        load = RoutingLoad(clusters, members, workers, self.config.model.n_experts)
        values = said.tolist()
        return load, StepReport(*values[: len(flags)], plan=values[len(flags) :])

    def balance(self, load: RoutingLoad, rate: float) -> None:
        for i, ffn in enumerate(self.model.ffns):
            clusters, members = (counts[i] if counts.numel() else counts for counts in (load.clusters, load.members))
            ffn.balance(clusters, members, rate)

    # Between steps.

    def report(self, window: Window) -> None:
        """One train record: the means since the last one, and the loads."""
        load = window.load
        workers = torch.zeros(3, self.world, dtype=torch.float64)
        own = (psutil.Process().memory_info().rss, window.compute_s, window.grains)
        workers[:, self.rank] = torch.tensor(own, dtype=torch.float64)
        if self.world > 1:
            workers = workers.to(self.device)
            dist.all_reduce(workers)
        rss, compute, grains = workers.tolist()
        slowness = ratios(compute, grains)
        record = dict(
            loss=window.mean_loss,
            lr=learning_rate(self.config.train, self.position.step - 1),
            grad_norm=window.norm,
            tokens=self.position.tokens,
            tokens_per_s=window.tokens / window.seconds,
            step_ms=1000 * window.seconds / window.steps,
            load_cv=load.measures(load_cv),
            load_max_vio=load.measures(load_max_vio),
            a2a_bytes_per_token=window.sent_bytes / window.tokens,
            tokens_hash=window.tokens_hash,
            version=self.position.version,
            rss_mb=[round(b / 2**20, 1) for b in rss],
            compute_ms=[round(1000 * s / window.steps, 3) for s in compute],
            slowness=slowness,
            skipped_steps=self.position.skipped,
            load_experts=RoutingLoad.shares(load.experts),
            load_clusters=RoutingLoad.shares(load.clusters),
        )
        self.log("train", **record)
        for worker in self.stragglers.named(slowness):
            self.log("event", name="straggler", worker=worker, factor=slowness[worker])

    def validate(self, *, whole: bool) -> None:
        """One validation record: loss over held-out windows, per domain, and which cluster serves which domain."""
        found, loads = validate(self.model, self.grains, None if whole else self.config.train.validate_windows)
        load, _ = self.sync_stats(StepReport(), loads)
        self.sharded.meter.take()  # a train record counts the bytes of its steps alone
        self.position.validation[self.position.step] = found.loss
        record = dict(
            perplexity=math.exp(min(found.loss, 700.0)),
            load_cv=load.measures(load_cv),
            load_max_vio=load.measures(load_max_vio),
            whole=whole,
        )
        self.log("validation", **vars(found), **record)

    def probe(self) -> float:
        """Loss on a few held-out windows. A collective."""
        loss = probe(self.model, self.grains)
        self.sharded.meter.take()
        return loss

    def fold(self) -> None:
        """The burn-in of a dense start is over: independent experts become clusters. A collective."""
        config, position = self.config, self.position
        self.wait_for_checkpoint()  # the checkpoint being written is of the model that was
        before = self.probe()
        started = time.perf_counter()
        assignment, tensors = fold(
            self.sharded, self.optimizer.moments(), sample_inputs(self.model, self.grains, position.step),
            clustered=config.model, alpha=config.regroup.alpha, seed=config.run.seed,
        )  # fmt: skip
        position.membership, position.folded = replace(position.membership, assignment=assignment), True
        sealed = self.checkpoints.last_sealed
        self.checkpoints.writer.close()
        self.build()
        self.checkpoints.last_sealed = sealed
        if self.mirror:
            self.checkpoints.in_use = self.mirror.steps
        with torch.no_grad():
            for key, view in (self.model.logical() | self.optimizer.logical()).items():
                view.copy_(tensors[key])
        self.optimizer.restore(position.updates)
        pause = time.perf_counter() - started
        self.log_plan("folded", ahead=True, pause_ms=1000 * pause, probe_before=before, probe_after=self.probe())

    def checkpoint(self) -> None:
        """Begin one. One that is not complete yet is waited for: where they are so close, training is faster than the disk."""
        self.wait_for_checkpoint()
        extra = self.regrouping.recorder.tensors() if self.regrouping else {}
        self.checkpoints.begin(self.position, extra)

    def answer(self) -> None:
        """Complete the checkpoint that the driver asked for before the next step: the workers are about to be ended."""
        self.wait_for_checkpoint()
        if self.rank == 0:
            RunFolder(self.run).checkpoint_request.unlink(missing_ok=True)

    def settle(self, failed: bool) -> None:
        """The next stage of the checkpoint that no rank works on any more: rank 0 seals it, or what became of it is said."""
        reasons: list[Any] = [self.checkpoints.failure]
        if failed and self.world > 1:
            reasons = [None] * self.world
            dist.all_gather_object(reasons, self.checkpoints.failure)
        event = self.checkpoints.settle(failed)
        if event is None:
            return
        if failed:
            event["reason"] = "; ".join(r for r in reasons if r)
        self.log("event", **event)
        if self.mirror:
            self.report_copies(self.mirror.failures())
            if event["name"] == "checkpoint_completed" and event["checkpoint"] % self.config.checkpoint.every == 0:
                self.mirror.push(event["checkpoint"])

    def report_copies(self, failures: list[tuple[int, str]]) -> None:
        for step, reason in failures:
            self.log("event", name="copy_failed", checkpoint=step, reason=reason)

    def wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint being written and seal it. A collective."""
        while self.checkpoints.unsealed:
            self.checkpoints.finish()
            _, said = self.sync_stats(StepReport(failed=bool(self.checkpoints.failure)), Loads.zeros(self.model.model))
            self.settle(said.failed > 0)

    def finish(self) -> None:
        """The last checkpoint must be there: a run that cannot save it has failed."""
        self.wait_for_checkpoint()
        if self.checkpoints.last_sealed != self.position.step:
            raise OSError(
                f"the checkpoint of step {self.position.step} could not be written under {self.checkpoints.folder}: "
                "see the last events in metrics.jsonl; free disk space and resume"
            )
        if self.mirror:
            step = self.position.step
            if step != self.mirror.newest:
                self.mirror.push(step)
            failures = self.mirror.failures(wait=True)
            self.report_copies(failures)
            if reason := dict(failures).get(step):
                raise OSError(f"the checkpoint of step {step} is in {self.run}, but not at its storage: {reason}")


def threads(config: Config, local_workers: int) -> int:
    """Compute threads of a worker: its share of the machine's cores."""
    return config.train.threads or max(1, (os.cpu_count() or 1) // local_workers)
