"""Plans and gains when the domains of the text change: part `shift` of `jobs/benchmark.py regroup`."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import report
from benchmarks.workers import corpus_for, records, trainer
from raymoe.config import override, preset
from raymoe.data.corpus import Batch, Corpus
from raymoe.training.regroup.clients import DirectClient
from raymoe.training.regroup.clusterer import Clusterer

FIRST = ("legal", "novel")
"""Domains of the first half if a corpus has them; otherwise the first half of its domains."""
SHIFT_CHANGES = (
    "model.n_experts=32", "train.lr=4e-3", "train.warmup=50", "train.validate_every=100", "train.validate_windows=256",
    "checkpoint.every=100000", "train.log_every=50", "regroup.period=100", "regroup.burn_in=200",
    "regroup.stats_every=10", "regroup.plan_lag=20", "regroup.overlap=32",
)  # fmt: skip
"""Changes to the preset `tiny`."""


class Shift:
    """A corpus that trains on some domains before step `at` and on the others from `at`; validation has all domains.

    With `at=0` training has all domains throughout. The tokens of a step are a function of (seed, step).
    """

    masked = False
    """All tokens count as targets."""

    def __init__(self, corpus: Corpus, at: int) -> None:
        self.corpus, self.at, self.domains = corpus, at, corpus.domains
        self.validation, self.validation_windows = corpus.validation, corpus.validation_windows
        self.fingerprint, self.tokenizer_fingerprint = f"{corpus.fingerprint}-shift-{at}", corpus.tokenizer_fingerprint
        first = set(FIRST) if set(FIRST) < set(self.domains) else set(self.domains[: len(self.domains) // 2])
        self.halves = (first, set(self.domains) - first) if at else (set(self.domains),) * 2
        self._windows = cache(self._windows)
        self._order = cache(self._order)

    def _windows(self, late: bool, context: int) -> np.ndarray:
        """Return the domain and the first token of each window, [windows, 2]."""
        return np.array([
            (i, start)
            for i, domain in enumerate(self.domains) if domain in self.halves[late]
            for start in range(0, len(self.corpus.stream("train", domain)) - context, context)
        ])  # fmt: skip

    def _order(self, seed: int, late: bool, epoch: int, windows: int) -> np.ndarray:
        return np.random.default_rng([seed, late, epoch]).permutation(windows)

    def batch(self, *, seed: int, step: int, global_batch: int, context: int, rows: range) -> Batch:
        late = bool(self.at) and step >= self.at
        windows = self._windows(late, context)
        tokens = np.empty((len(rows), context + 1), dtype=np.int64)
        domain = np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            epoch, at = divmod((step - late * self.at) * global_batch + row, len(windows))
            domain[i], start = windows[self._order(seed, late, epoch, len(windows))[at]]
            tokens[i] = self.corpus.stream("train", self.domains[domain[i]])[start : start + context + 1]
        return Batch(tokens, domain, np.ones((len(rows), context), dtype=bool))


def shift_run(changes: Sequence[str], corpus: str, at: int, clusterer: type[Clusterer] = Clusterer) -> dict[str, Any]:
    """Train in one process to the end; return the records of plans and the validation losses."""
    torch.set_num_threads(1)
    config = override(preset("tiny"), [*SHIFT_CHANGES, *changes])
    with tempfile.TemporaryDirectory() as folder:
        client = DirectClient(clusterer(config.to_dict())) if config.regroups else None
        trainer(config, Shift(Corpus.open(corpus), at), Path(folder), client).train()
        loss = {r["step"]: r["loss"] for r in records(Path(folder, "metrics.jsonl"), "validation", key="kind")}
        plans = records(Path(folder, "plans.jsonl"), "made", "applied", "refused", "no_plan", "gain_measured")
    return {"plans": plans, "validation": loss, "final": loss[config.train.steps]}


def summarize(run: dict[str, Any], at: int, steps: int) -> dict[str, Any]:
    """Return the counts of plans and the expected and measured gains, before step `at` and after."""
    out: dict[str, Any] = {}
    measured = {r["version"]: r["gain"] for r in run["plans"] if r["name"] == "gain_measured"}
    for half, span in (("before", range(at)), ("after", range(at, steps))):
        made = [r["plan"] for r in run["plans"] if r["name"] == "made" and r["plan"]["made_at_step"] in span]
        applied = [r for r in run["plans"] if r["name"] == "applied" and r["plan"]["made_at_step"] in span]
        pairs = [(r["plan"]["expected_gain"], measured[v]) for r in applied if (v := r["plan"]["version"]) in measured]
        out[half] = {
            "made": len(made),
            "applied": len(applied),
            "moves": sum(r["moves"] for r in applied),
            "none": sum(r["name"] == "no_plan" and r["made_at_step"] in span for r in run["plans"]),
            "refused": sum(r["name"] == "refused" and r["step"] in span for r in run["plans"]),
            "gains": pairs,
        }
    pairs = out["before"]["gains"] + out["after"]["gains"]
    out["measured"] = len(pairs)
    out["measured_positive"] = sum(gain > 0 for _, gain in pairs)
    out["mean_expected"] = statistics.mean(e for e, _ in pairs) if pairs else None
    out["mean_measured"] = statistics.mean(g for _, g in pairs) if pairs else None
    return out


def shift(data: str, seeds: int, steps: int) -> dict[str, Any]:
    """Measure plans and gains when the domains change half-way, and in a control without a change."""
    tasks: dict[str, tuple[list[str], int]] = {}
    sides = {
        "dense start": ["regroup.mode=lockstep", "regroup.start=dense"],
        "factored start": ["regroup.mode=lockstep"],
        "paper similarity": ["regroup.mode=lockstep", "regroup.similarity=paper"],
        "off": ["regroup.mode=off"],
    }
    for seed in range(seeds):
        for mix, at in (("shift", steps // 2), ("control", 0)):
            for side, changes in sides.items():
                if mix == "shift" or side == "dense start":
                    tasks[f"{mix} {side} seed {seed}"] = ([f"run.seed={seed}", f"train.steps={steps}", *changes], at)
    result: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="raymoe-shift-") as folder:
        corpus = corpus_for(override(preset("tiny"), SHIFT_CHANGES), data, folder)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            futures = {task: pool.submit(shift_run, changes, corpus, at) for task, (changes, at) in tasks.items()}
            for task, future in futures.items():
                run = future.result()
                row = {"validation": run["final"], **summarize(run, steps // 2, steps)}
                result[task] = row
                line = f"regroup  {task:32} validation {row['validation']:.4f}"
                if "off" not in task:
                    halves = "; ".join(
                        f"{half}: {row[half]['made']} plans, {row[half]['applied']} applied, {row[half]['moves']} moves, "
                        f"{row[half]['none']} none, {row[half]['refused']} refused" for half in ("before", "after")
                    )  # fmt: skip
                    line += f"  {halves}  measured gain above 0 in {row['measured_positive']} of {row['measured']}"
                if row["measured"]:
                    line += f", mean expected {row['mean_expected']:.4f}, measured {row['mean_measured']:+.4f}"
                report(line)
    return result
