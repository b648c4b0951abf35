"""What regrouping costs and does: the names `remap` and `regroup` of `jobs/benchmark.py`, which is the command."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from raymoe.config import Config, override, preset
from raymoe.data import Batch, Corpus, prepare
from raymoe.metrics import TrainingMetrics
from raymoe.training.clusterer import Clusterer
from raymoe.training.loop import Trainer
from raymoe.training.mailbox import Direct, Mailbox

Records = list[dict[str, Any]]


def say(line: str) -> None:
    print(line, flush=True)


def records(file: Path, *what: str, key: str = "what") -> Records:
    """Records of a run's journal of which `key` is one of `what`."""
    return [r for r in map(json.loads, file.read_text().splitlines()) if r.get(key) in what]


def trainer(config: Config, corpus: Any, run: Path, mailbox: Mailbox | None, rank: int = 0) -> Trainer:
    metrics = TrainingMetrics(CollectorRegistry(), run="benchmark", worker=str(rank))
    return Trainer(config, corpus, run, metrics, torch.device("cpu"), mailbox)


# regroup: what it does when the mix of domains changes.

FIRST = ("legal", "novel")
"""Domains of the first half where a corpus has them; else the first half of its domains."""
RIG = (
    "model.n_experts=32", "train.lr=4e-3", "train.warmup=50", "train.validate_every=100", "train.validate_windows=256",
    "checkpoint.every=100000", "train.log_every=50", "regroup.period=100", "regroup.burn_in=200",
    "regroup.stats_every=10", "regroup.plan_lag=20", "regroup.overlap=32",
)  # fmt: skip
"""Changes to the preset `tiny`."""


class Shift:
    """A corpus of which training sees some domains before step `at` and the others from there; validation sees all.

    `at=0`: all domains throughout. As with a corpus, the tokens of a step are a function of (seed, step).
    """

    def __init__(self, corpus: Corpus, at: int) -> None:
        self.corpus, self.at, self.domains = corpus, at, corpus.domains
        self.validation, self.validation_windows = corpus.validation, corpus.validation_windows
        first = set(FIRST) if set(FIRST) < set(self.domains) else set(self.domains[: len(self.domains) // 2])
        self.halves = (first, set(self.domains) - first) if at else (set(self.domains),) * 2
        self._windows = cache(self._windows)
        self._order = cache(self._order)

    def _windows(self, late: bool, context: int) -> np.ndarray:
        """[windows, 2]: domain and first token of each."""
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
    """One run of one process to its end: the records of its plans and its validation losses."""
    torch.set_num_threads(1)
    config = override(preset("tiny"), [*RIG, *changes])
    with tempfile.TemporaryDirectory() as folder:
        mailbox = Direct(clusterer(config.to_dict())) if config.regroups else None
        trainer(config, Shift(Corpus.open(corpus), at), Path(folder), mailbox).train()
        loss = {r["step"]: r["loss"] for r in records(Path(folder, "metrics.jsonl"), "validation", key="kind")}
        plans = records(Path(folder, "plans.jsonl"), "made", "applied", "refused", "none", "seen")
    return {"plans": plans, "validation": loss, "final": loss[config.train.steps]}


def acts(run: dict[str, Any], at: int, steps: int) -> dict[str, Any]:
    """What a run's regrouping did before step `at` and from there: counts, and gains expected and seen."""
    out: dict[str, Any] = {}
    seen = {r["version"]: r["gain"] for r in run["plans"] if r["what"] == "seen"}
    for half, span in (("before", range(at)), ("after", range(at, steps))):
        made = [r["plan"] for r in run["plans"] if r["what"] == "made" and r["plan"]["made_at_step"] in span]
        applied = [r for r in run["plans"] if r["what"] == "applied" and r["plan"]["made_at_step"] in span]
        pairs = [(r["plan"]["expected_gain"], seen[v]) for r in applied if (v := r["plan"]["version"]) in seen]
        out[half] = {
            "made": len(made),
            "applied": len(applied),
            "moves": sum(r["moves"] for r in applied),
            "none": sum(r["what"] == "none" and r["made_at_step"] in span for r in run["plans"]),
            "refused": sum(r["what"] == "refused" and r["step"] in span for r in run["plans"]),
            "gains": pairs,
        }
    pairs = out["before"]["gains"] + out["after"]["gains"]
    out["seen"] = len(pairs)
    out["seen_positive"] = sum(gain > 0 for _, gain in pairs)
    out["mean_expected"] = statistics.mean(e for e, _ in pairs) if pairs else None
    out["mean_seen"] = statistics.mean(g for _, g in pairs) if pairs else None
    return out


def corpus_for(name: str, data: str, root: str) -> str:
    return str(prepare(override(preset(name), [f"data.path={data}", f"run.root={root}"])))
