"""Cost of a forced plan in the paper's form of a preset: the benchmark `remap` of `jobs/benchmark.py`."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import report
from benchmarks.models import paper_form
from benchmarks.workers import corpus_for, in_processes, records, timed, trainer
from raymoe.clustering.plan import RemapPlan
from raymoe.clustering.planner import make_plan
from raymoe.clustering.statistics import Statistics
from raymoe.config import Config, override
from raymoe.data.corpus import Corpus
from raymoe.parallel.local import total
from raymoe.parallel.remap import Membership, moved
from raymoe.parallel.remap import remap as change
from raymoe.storage.checkpoint import newest
from raymoe.training.regroup.clients import ReplayClient

PROBE_EVERY = 10


def remap(name: str, data: str, seeds: int, warmup: int, steps: int = 200) -> dict[str, Any]:
    """Compare a forced plan of 4 experts per layer with a branch from the same checkpoint without a plan; 2 processes."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raymoe-remap-") as folder:
        nothing = Path(folder, "none.jsonl")
        nothing.write_text("")
        corpus = corpus_for(paper_form(name), data, folder)
        for seed in range(seeds):
            base = Path(folder, f"warm{seed}")
            changes = [
                f"run.seed={seed}", "train.validate_windows=64", f"regroup.burn_in={warmup}",
                f"regroup.period={warmup}", "regroup.plan_lag=2", "regroup.overlap=32", "regroup.stats_every=10",
                f"train.steps={max(paper_form(name).train.steps, warmup + steps)}",
            ]  # fmt: skip
            report(f"remap  seed {seed}: {warmup} steps to warm up, then 2 branches of {steps}")
            record = [*changes, "regroup.mode=replay", f"regroup.replay={nothing}"]
            in_processes(2, _branch, folder, name, record, str(base), corpus, warmup)
            branches = {"without": Path(folder, f"without{seed}"), "with": Path(folder, f"with{seed}")}
            for branch in branches.values():
                shutil.copytree(base / "checkpoints", branch / "checkpoints")
            plan = forced(paper_form(name, changes), base)
            plans = Path(folder, f"plan{seed}.jsonl")
            plans.write_text(
                json.dumps({"kind": "plan", "step": warmup, "name": "applied", "plan": plan.to_dict()}) + "\n"
            )
            modes = {"without": ["regroup.mode=off"], "with": ["regroup.mode=replay", f"regroup.replay={plans}"]}
            times = {
                side: in_processes(2, _branch, folder, name, [*changes, *modes[side]], str(run), corpus, warmup + steps)
                for side, run in branches.items()
            }
            row = _cost(branches, statistics.median(times["with"]), warmup)
            if seed == 0:
                row["float32"] = _exact(paper_form(name, [*changes, "train.precision=float32"]), corpus, base, plan)  # fmt: skip
                report(f"remap  float32, one process: logits differ by {row['float32']['logits_max_relative']:.1e} of the largest at apply "
                    f"(loss {row['float32']['loss_relative']:+.1e}; {row['float32']['loss_relative_at_once']:+.1e} without an overlap)")  # fmt: skip
            report(f"remap  seed {seed}: {row['moves']} moves, {row['bytes'] / 1e6:.1f} MB; apply {row['apply_ms']:.0f} ms = {row['apply_steps']:.2f} steps, "
                f"overlap over {row['drop_ms']:.0f} ms = {row['drop_steps']:.2f} steps, median step {row['step_ms']:.0f} ms")  # fmt: skip
            report(f"remap  seed {seed}: probe at apply {row['probe_before']:.4f} -> {row['probe_after']:.4f} ({row['probe_relative']:+.1e}); "
                f"over {steps} steps against the branch without: mean {row['mean_percent']:+.3f} %, max {row['max_percent']:+.3f} %")  # fmt: skip
            result[f"seed {seed}"] = row
            for finished in (base, *branches.values()):
                shutil.rmtree(finished)
    return result


def _branch(rank: int, name: str, changes: list[str], run: str, corpus: str, until: int) -> list[float]:
    """Train from the checkpoint in `run` to step `until`, with probes; return the milliseconds of each step."""
    config = paper_form(name, changes)
    client = ReplayClient(Path(config.regroup.replay)) if config.regroup.replay else None
    Path(run).mkdir(exist_ok=True)
    total(0.0)
    one = trainer(config, Corpus.open(corpus), Path(run), client, rank)
    started_at, times = one.position.step, []
    while one.position.step < until:
        times.append(timed(one.train_step))
        if started_at and one.position.step % PROBE_EVERY == 0:
            one.validate(whole=False)
        if rank == 0 and one.position.step % 100 == 0:
            report(f"remap  {Path(run).name}: step {one.position.step}, median {statistics.median(times):.0f} ms")
    if not started_at:
        one.checkpoints.write(one.position, one.statistics())
        one.checkpoints.wait_for_checkpoint()
    return times


def forced(config: Config, run: Path) -> RemapPlan:
    """Make a forced plan with the cheapest moves of every layer, from the statistics in a run's checkpoint."""
    checkpoint, _ = newest(run / "checkpoints")
    assert checkpoint is not None
    keys = [key for key in checkpoint.keys if key.startswith("statistics.")]
    arrays = {key.split(".", 1)[1]: tensor.numpy() for key, tensor in checkpoint.read(keys).items()}
    plan = make_plan(
        Statistics.from_arrays(arrays), checkpoint.meta["assignment"], regroup=config.regroup,
        n_clusters=config.model.n_clusters, seed=config.run.seed, force=True,
    )  # fmt: skip
    assert isinstance(plan, RemapPlan), plan
    return replace(plan, made_at_step=checkpoint.step, effective_step=checkpoint.step + 2)


def _cost(branches: dict[str, Path], step_ms: float, start: int) -> dict[str, Any]:
    (applied,) = records(branches["with"] / "plans.jsonl", "applied")
    (over,) = records(branches["with"] / "plans.jsonl", "overlap_ended")
    losses = {
        side: {r["step"]: r["loss"] for r in records(run / "metrics.jsonl", "validation", key="kind")}
        for side, run in branches.items()
    }
    percent = {s - start: 100 * (loss / losses["without"][s] - 1) for s, loss in losses["with"].items()}
    return {
        "moves": applied["moves"],
        "bytes": applied["bytes"],
        "step_ms": step_ms,
        "apply_ms": applied["pause_ms"],
        "drop_ms": over["pause_ms"],
        "apply_steps": applied["pause_ms"] / step_ms,
        "drop_steps": over["pause_ms"] / step_ms,
        "probe_before": applied["probe_before"],
        "probe_after": applied["probe_after"],
        "probe_relative": applied["probe_after"] / applied["probe_before"] - 1,
        "max_percent": max(percent.values()),
        "mean_percent": statistics.mean(percent.values()),
        "percent_by_step": percent,
    }


@torch.no_grad()
def _exact(config: Config, corpus: str, run: Path, plan: RemapPlan) -> dict[str, float]:
    """Compare logits before a plan, after it, and without an overlap, in one process with float32."""
    text = Corpus.open(corpus)
    one = trainer(override(config, ["regroup.mode=off"]), text, run, None)
    tokens = torch.from_numpy(text.validation(context=config.model.context, limit=16).tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    before = one.position.membership
    overlapping = moved(before, plan.assignment)
    logits, losses = [one.model(inputs)], []
    moments = one.optimizer.moments()
    for was, now in (
        (before, overlapping),
        (overlapping, Membership(overlapping.assignment, ({},) * len(before.ghosts))),
    ):
        moments, _ = change(one.sharded, was, now, one.sharded.placements, moments)
        for ffn in one.model.ffns:
            ffn.set_progress(0.0)  # type: ignore[union-attr]
        logits.append(one.model(inputs))
    losses = [torch.nn.functional.cross_entropy(given.flatten(0, 1), targets.flatten()).item() for given in logits]
    return {
        "logits_max_relative": ((logits[1] - logits[0]).abs().max() / logits[0].abs().max()).item(),
        "loss_relative": losses[1] / losses[0] - 1,
        "loss_relative_at_once": losses[2] / losses[0] - 1,
    }
