"""Share of regrouping in the training time of the paper's form: part `overhead` of `jobs/benchmark.py regroup`."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import report
from benchmarks.models import paper_form
from benchmarks.workers import corpus_for, in_processes, timed, trainer
from raymoe.config import override
from raymoe.data.corpus import Corpus
from raymoe.parallel.local import total
from raymoe.training.loop import Trainer
from raymoe.training.regroup.clusterer import Clusterer, ClustererStatus, Message


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
    config = paper_form(name, changes)
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
    config = paper_form(name, changes)
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
