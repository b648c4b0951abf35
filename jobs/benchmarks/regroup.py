"""Cost and effect of regrouping: the benchmarks `remap` and `regroup` of `jobs/benchmark.py`."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from raymoe.clustering.plan import RemapPlan
from raymoe.clustering.planner import make_plan
from raymoe.clustering.statistics import Statistics
from raymoe.config import Config, override, preset
from raymoe.data.corpus import Batch, Corpus
from raymoe.data.prepare import prepare
from raymoe.metrics import TrainingMetrics
from raymoe.parallel.local import gloo, total
from raymoe.parallel.remap import Membership, moved
from raymoe.parallel.remap import remap as change
from raymoe.storage.checkpoint import newest
from raymoe.storage.run_folder import read_records
from raymoe.training.loop import Trainer
from raymoe.training.regroup.clients import ClustererClient, DirectClient, ReplayClient
from raymoe.training.regroup.clusterer import Clusterer, ClustererStatus, Message

Records = list[dict[str, Any]]


def report(line: str) -> None:
    print(line, flush=True)


def records(file: Path, *values: str, key: str = "name") -> Records:
    """Return the records of a JSONL file whose `key` is one of `values`."""
    return [r for r in read_records(file) if r.get(key) in values]


def trainer(config: Config, corpus: Any, run: Path, client: ClustererClient | None, rank: int = 0) -> Trainer:
    metrics = TrainingMetrics(CollectorRegistry(), run="benchmark", worker=str(rank))
    return Trainer(config, corpus, run, metrics, torch.device("cpu"), client)


def corpus_for(config: Config, data: str, root: str) -> str:
    """Prepare token shards with the tokenizer and the held-out part of seed 0, for runs of all seeds."""
    return str(prepare(override(config, [f"data.path={data}", f"run.root={root}"])))


def in_processes(world: int, work: Callable[..., Any], folder: str, *arguments: Any) -> Any:
    """Run `work(rank, *arguments)` in gloo processes with one thread each; return the result of rank 0."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    store = f"{folder}/store{time.time_ns()}"
    processes = [
        context.Process(target=_start_rank, args=(r, world, store, theirs, work, arguments)) for r in range(world)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        result = mine.recv()
    except EOFError:
        raise RuntimeError("a process of the benchmark failed; see its traceback above") from None
    finally:
        for process in processes:
            process.join()
    return result


def _start_rank(
    rank: int, world: int, store: str, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    with gloo(rank, world, store):
        result = work(rank, *arguments)
        if rank == 0:
            pipe.send(result)


def timed(step: Callable[[], Any]) -> float:
    """Return the milliseconds of a step that all ranks start together. Collective."""
    total(0.0)
    started = time.perf_counter()
    step()
    total(0.0)
    return 1000 * (time.perf_counter() - started)


# remap: the cost of a forced plan.

PROBE_EVERY = 10


def remap(name: str, data: str, seeds: int, warmup: int, steps: int = 200) -> dict[str, Any]:
    """Compare a forced plan of 4 experts per layer with a branch from the same checkpoint without a plan; 2 processes."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raymoe-remap-") as folder:
        nothing = Path(folder, "none.jsonl")
        nothing.write_text("")
        corpus = corpus_for(preset(name), data, folder)
        for seed in range(seeds):
            base = Path(folder, f"warm{seed}")
            changes = [
                f"run.seed={seed}", "train.validate_windows=64", f"regroup.burn_in={warmup}",
                f"regroup.period={warmup}", "regroup.plan_lag=2", "regroup.overlap=32", "regroup.stats_every=10",
                f"train.steps={max(preset(name).train.steps, warmup + steps)}",
            ]  # fmt: skip
            report(f"remap  seed {seed}: {warmup} steps to warm up, then 2 branches of {steps}")
            record = [*changes, "regroup.mode=replay", f"regroup.replay={nothing}"]
            in_processes(2, _branch, folder, name, record, str(base), corpus, warmup)
            branches = {"without": Path(folder, f"without{seed}"), "with": Path(folder, f"with{seed}")}
            for branch in branches.values():
                shutil.copytree(base / "checkpoints", branch / "checkpoints")
            plan = forced(override(preset(name), changes), base)
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
                row["float32"] = _exact(override(preset(name), [*changes, "train.precision=float32"]), corpus, base, plan)  # fmt: skip
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
    config = override(preset(name), changes)
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


# regroup, first question: the total cost.


class Piped:
    """A client of a clusterer in a process beside the workers, connected by queues."""

    def __init__(self, rank: int, inbox: Any, statuses: Any, taken: Any) -> None:
        self.lost, self._rank, self._inbox, self._statuses, self._taken = 0, rank, inbox, statuses, taken
        self._sent, self._is_polling = 0, False

    def ready(self) -> bool:
        return self._taken[self._rank] == self._sent

    def send(self, message: Message) -> None:
        self._sent += 1
        self._inbox.put(message)

    def poll(self, attempt: int) -> ClustererStatus | None:
        if not self._is_polling:
            self._inbox.put(attempt)
            self._is_polling = True
        try:
            status = self._statuses.get_nowait()
        except queue.Empty:
            return None
        self._is_polling = False
        return status

    def flush(self) -> None:
        raise RuntimeError("this client does not wait; use regroup.mode=async")

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        raise RuntimeError("this client does not wait; use regroup.mode=async")


def _clusterer(config: dict[str, Any], inbox: Any, statuses: Any, taken: Any) -> None:
    torch.set_num_threads(1)
    clusterer = Clusterer(config)
    while (item := inbox.get()) is not None:
        if isinstance(item, Message):
            clusterer.observe(item)
            taken[item.rank] += 1
        else:
            statuses.put(clusterer.poll(item))


LEAD = 30
"""Steps before the first sample at which the runs start. All but the last 10 are warm-up."""


def overhead(name: str, data: str, periods: int) -> dict[str, Any]:
    """Alternate steps with and without regrouping over whole periods of T=100; 2 processes and a clusterer."""
    period = 100
    changes = [
        "regroup.mode=async", "regroup.min_gain=0", f"regroup.period={period}", f"regroup.burn_in={period}",
        "regroup.plan_lag=20", "regroup.overlap=32", "regroup.stats_every=10", f"train.steps={period * (periods + 2)}",
    ]  # fmt: skip
    config = override(preset(name), changes)
    context = multiprocessing.get_context("spawn")
    inbox, statuses, taken = context.Queue(), context.Queue(), context.Array("q", 2)
    clusterer = context.Process(target=_clusterer, args=(config.to_dict(), inbox, statuses, taken))
    clusterer.start()
    try:
        with tempfile.TemporaryDirectory(prefix="raymoe-overhead-") as folder:
            corpus = corpus_for(config, data, folder)
            rows = in_processes(2, _alternate, folder, name, changes, folder, corpus, periods, (inbox, statuses, taken))
    finally:
        inbox.put(None)
        clusterer.join()
    on, off = (np.array([row[side] for row in rows]) for side in ("on", "off"))
    result: dict[str, Any] = {
        "steps": len(rows),
        "overhead_of_sums": float(on.sum() / off.sum() - 1),
        "overhead_of_medians": float(np.median(on) / np.median(off) - 1),
        "off_median_ms": float(np.median(off)),
        "off_min_ms": float(off.min()),
        "off_max_ms": float(off.max()),
        "kinds": {},
        "rows": rows,
    }
    report(f"regroup  overhead over {len(rows)} steps: {result['overhead_of_sums']:+.2%} of the sums, "
        f"{result['overhead_of_medians']:+.2%} of the medians (median step {np.median(off):.0f} ms [{off.min():.0f}, {off.max():.0f}])")  # fmt: skip
    for kind in ("samples", "applies", "drops", "overlaps", "records", "nothing"):
        of = np.array([row["kind"] == kind for row in rows])
        if of.any():
            share = float((on[of] - off[of]).sum() / off.sum())
            result["kinds"][kind] = {
                "steps": int(of.sum()), "share": share, "on_ms": float(np.median(on[of])), "off_ms": float(np.median(off[of])),
            }  # fmt: skip
            report(
                f"regroup  overhead  {kind:9}{of.sum():4} steps  {share:+.2%} of the time  median on {np.median(on[of]):.0f} ms, off {np.median(off[of]):.0f} ms"
            )
    return result


def _alternate(
    rank: int, name: str, changes: list[str], folder: str, corpus: str, periods: int, mail: Any
) -> list[dict[str, Any]]:
    """Return the milliseconds of each step with and without regrouping, and the kind of the step."""
    config = override(preset(name), changes)
    period, regroup = config.period, config.regroup
    sides: dict[str, Trainer] = {}
    for side, extra, client in (("on", [], Piped(rank, *mail)), ("off", ["regroup.mode=off"], None)):
        run = Path(folder, side)
        run.mkdir(exist_ok=True)
        total(0.0)
        sides[side] = trainer(override(config, extra), Corpus.open(corpus), run, client, rank)
        sides[side].position.step = period - LEAD
    rows: list[dict[str, Any]] = []
    while (step := sides["on"].position.step) < (periods + 1) * period - 10:
        ghosts = any(sides["on"].position.membership.ghosts)
        order = list(sides.items())[:: 1 if step % 2 else -1]  # each side is first in half of the steps
        rows.append({side: timed(one.train_step) for side, one in order} | {"step": step})
        now = any(sides["on"].position.membership.ghosts)
        done = step + 1
        if now != ghosts:
            kind = "applies" if now else "drops"
        elif done % period == 0:
            kind = "samples"
        elif now:
            kind = "overlaps"
        else:
            kind = "nothing" if done % regroup.stats_every else "records"
        rows[-1]["kind"] = kind
        if rank == 0 and done % 20 == 0:
            report(f"regroup  overhead: step {done}, version {sides['on'].position.version}")
    return rows[LEAD - 10 :]


# regroup, second question: the effect when the mix of domains changes.

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


def regroup(name: str, data: str, seeds: int, steps: int, periods: int, parts: Sequence[str]) -> dict[str, Any]:
    """Run both questions, or one of them."""
    result: dict[str, Any] = {}
    if "overhead" in parts:
        result["overhead"] = overhead(name, data, periods)
    if "shift" in parts:
        result["shift"] = shift(data, seeds, steps)
    return result
