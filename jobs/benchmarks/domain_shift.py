"""Plans, gains and perplexity when the domains of the text change: part `shift` of `jobs/benchmark.py regroup`."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import report
from benchmarks.models import paper_form
from benchmarks.workers import corpus_for, records, trainer
from raymoe.clustering.similarity import NEEDED
from raymoe.config import Config, override
from raymoe.data.corpus import Batch, Corpus
from raymoe.training.regroup.clients import DirectClient
from raymoe.training.regroup.clusterer import Clusterer, Message

FIRST = ("legal", "novel")
"""Domains of the first half if a corpus has them; otherwise the first half of its domains."""
SHIFT_CHANGES = (
    "model.n_experts=32", "train.lr=4e-3", "train.warmup=50", "train.validate_every=100", "train.validate_windows=256",
    "checkpoint.every=100000", "train.log_every=50", "regroup.period=100", "regroup.burn_in=200",
    "regroup.stats_every=10", "regroup.plan_lag=20", "regroup.overlap=32",
)  # fmt: skip
"""Changes to the paper's form of the preset `tiny`."""


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

    def batch(
        self, *, seed: int, step: int, global_batch: int, context: int, rows: range,
        mixture: Mapping[str, float] | None = None,
    ) -> Batch:  # fmt: skip
        assert not mixture, "the order of windows is that of the shift"
        late = bool(self.at) and step >= self.at
        windows = self._windows(late, context)
        tokens = np.empty((len(rows), context + 1), dtype=np.int64)
        domain = np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            epoch, at = divmod((step - late * self.at) * global_batch + row, len(windows))
            domain[i], start = windows[self._order(seed, late, epoch, len(windows))[at]]
            tokens[i] = self.corpus.stream("train", self.domains[domain[i]])[start : start + context + 1]
        return Batch(tokens, domain, np.ones((len(rows), context), dtype=bool))


class RandomPlans(Clusterer):
    """A clusterer that swaps random experts in every period: the control for plans with a purpose."""

    def must_force(self, at: int, last: Message) -> bool:
        return True


@dataclass(frozen=True)
class Side:
    """A kind of run: the overrides of its config, and the class that makes its plans."""

    changes: tuple[str, ...]
    clusterer: type[Clusterer] = Clusterer


LIVE = "regroup.mode=lockstep"
SIDES = {
    "static": Side(("regroup.mode=off",)),
    "random": Side((LIVE, "regroup.force=1", "regroup.force_kind=random"), RandomPlans),
    **{kind: Side((LIVE, f"regroup.similarity={kind}")) for kind in NEEDED},
    "dense start": Side((LIVE, "regroup.start=dense")),
}
"""`static` has random clusters: experts start from independent random weights, so which ones share a cluster is random
until experts move. `random` also exchanges random experts in every period. `dense start` needs residual experts and the softmax gate."""
CONTROLS = ("static", "dense start")
"""Sides that also run without a change of domains."""


def side_configs(changes: Sequence[str], steps: int) -> dict[str, Config]:
    """Return the config of each side that the model allows. ValueError for a bad change.

    `changes`: overrides of all sides, for example `model.expert_kind=private`.
    """
    common = paper_form("tiny", [*SHIFT_CHANGES, *changes, f"train.steps={steps}"])
    folds = common.model.expert_kind == "residual" and common.model.gate == "softmax"
    names = [name for name in SIDES if name != "dense start" or folds]
    return {name: override(common, SIDES[name].changes) for name in names}


def shift_run(config: Config, clusterer: type[Clusterer], corpus: str, at: int) -> dict[str, Any]:
    """Train in one process to the end; return the records of plans, and losses on the domains of the second half."""
    torch.set_num_threads(1)
    text = Shift(Corpus.open(corpus), at)
    with tempfile.TemporaryDirectory() as folder:
        client = DirectClient(clusterer(config.to_dict())) if config.regroups else None
        trainer(config, text, Path(folder), client).train()
        validations = records(Path(folder, "metrics.jsonl"), "validation", key="kind")
        plans = records(Path(folder, "plans.jsonl"), "made", "applied", "refused", "no_plan", "gain_measured")
    late = {
        r["step"]: statistics.mean(loss for domain, loss in r["domains"].items() if domain in text.halves[1] and loss is not None)
        for r in validations
    }  # fmt: skip
    return {"plans": plans, "validation": {r["step"]: r["loss"] for r in validations}, "late": late}


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


def losses(run: dict[str, Any], at: int, steps: int) -> dict[str, float]:
    """Return the perplexities of a run: of all domains at the end, and of those of the second half."""
    return {
        "perplexity": math.exp(run["validation"][steps]),
        "late_perplexity": math.exp(run["late"][steps]),
        "late_perplexity_mean": math.exp(statistics.mean(loss for step, loss in run["late"].items() if step > at)),
    }


def shift(data: str, seeds: int, configs: dict[str, Config]) -> dict[str, Any]:
    """Measure plans, gains and perplexity when the domains change half-way, and in controls without a change.

    All runs have the same model, tokens and order of tokens; those of one seed have the same initial weights.
    configs: from `side_configs`.
    """
    config = configs["static"]
    steps = config.train.steps
    tasks = {
        (mix, name, seed): (override(own, [f"run.seed={seed}"]), SIDES[name].clusterer)
        for seed in range(seeds)
        for mix in ("shift", "control")
        for name, own in configs.items()
        if mix == "shift" or name in CONTROLS
    }
    tokens = steps * config.train.global_batch * config.model.context
    report(f"regroup  {config.model.expert_kind} experts, {len(tasks)} runs of {steps} steps, {tokens:,} tokens each")
    result: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="raymoe-shift-") as folder:
        corpus = corpus_for(config, data, folder)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            futures = {
                task: pool.submit(shift_run, *run, corpus, steps // 2 if task[0] == "shift" else 0)
                for task, run in tasks.items()
            }
            for task, future in futures.items():
                mix, name, seed = task
                run = future.result()
                row = losses(run, steps // 2, steps) | summarize(run, steps // 2, steps)
                result[f"{mix} {name} seed {seed}"] = row
                report(f"regroup  {f'{mix}, {name}, seed {seed}':32} {line_of(row)}")
    for mix in ("shift", "control"):
        compare(mix, result, seeds)
    return result


def line_of(row: dict[str, Any]) -> str:
    """Return the line of a run: its perplexities, plans and gains."""
    line = f"perplexity {row['perplexity']:.2f}, second half's domains {row['late_perplexity']:.2f}"
    halves = [
        f"{half}: {row[half]['made']} plans, {row[half]['applied']} applied, {row[half]['moves']} moves, "
        f"{row[half]['none']} none, {row[half]['refused']} refused"
        for half in ("before", "after") if any(row[half].values())
    ]  # fmt: skip
    line += "".join(f"; {half}" for half in halves)
    if row["measured"]:
        line += (
            f"; gain expected {row['mean_expected']:+.4f}, measured {row['mean_measured']:+.4f}, "
            f"above 0 in {row['measured_positive']} of {row['measured']}"
        )
    return line


def compare(mix: str, result: dict[str, Any], seeds: int) -> None:
    """Report the perplexity of each side over seeds, and its difference to the static clusters of the same seed."""
    for name in SIDES:
        rows = [result[key] for seed in range(seeds) if (key := f"{mix} {name} seed {seed}") in result]
        if not rows:
            continue
        line = f"regroup  {mix}, {name:15}"
        for field, title in (("late_perplexity", "at the end"), ("late_perplexity_mean", "mean after the change")):
            values = [row[field] for row in rows]
            half = (max(values) - min(values)) / 2
            line += f"  {title} {statistics.mean(values):.2f} ±{half:.2f}"
            if name != "static":
                static = [result[f"{mix} static seed {seed}"][field] for seed in range(seeds)]
                differences = [value - other for value, other in zip(values, static, strict=True)]
                line += f" ({statistics.mean(differences):+.2f}, {min(differences):+.2f} to {max(differences):+.2f})"
        report(line)
    report(f"regroup  {mix}: perplexity on the domains of the second half, mean ± half the range of {seeds} seeds; "
           "in parentheses the difference to static of the same seed, mean and range")  # fmt: skip
