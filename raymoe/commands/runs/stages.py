"""The stages of an experiment: the sweep chooses settings on the tuning split, then the final runs are trained."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from raymoe.commands.runs.definition import Experiment, PlannedRun, planned, planned_sweep
from raymoe.commands.runs.pool import Ended, State, run_all
from raymoe.commands.runs.results import is_finished, run_result
from raymoe.commands.runs.selection import at_edge, choose
from raymoe.config import override
from raymoe.data.prepare import prepare
from raymoe.ops.ray_connection import connect, current_ray, find_ray
from raymoe.report.comparison_page import render_comparison
from raymoe.report.intervals import HEAD, markdown, note, summarize, table_rows
from raymoe.report.plots import Record
from raymoe.storage.files import replace_file, write_json
from raymoe.storage.run_folder import RunFolder
from raymoe.storage.run_lock import own_run
from raymoe.training.run_summary import commit

RESULTS, PAGE = "results.json", "page.html"
FORMAT = 1
"""Version of `results.json`."""


class Session:
    """One execution of an experiment. The context owns its folder, so that two processes do not run it at once."""

    def __init__(self, experiment: Experiment, cores: int | None = None) -> None:
        self.experiment, self.cores = experiment, cores
        self.folder = experiment.folder
        self.chosen: dict[str, Mapping[str, str]] = {}
        self.sweep: list[PlannedRun] = []
        self.final: list[PlannedRun] = []
        self.failed: list[Ended] = []
        self._stack = ExitStack()
        self._corpora: dict[str, Path] = {}

    def __enter__(self) -> Session:
        self._stack.enter_context(own_run(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> int:
        """Train all runs that are not finished; return the signal that stopped them, or 0.

        Raises ValueError or OSError before the first run starts.
        """
        self.sweep = planned_sweep(self.experiment)
        unfinished = [run for run in self.sweep if not is_finished(run.folder, run.config)]
        if not self.sweep:
            self.final = planned(self.experiment, {})
        ready = [run for run in self.final if not is_finished(run.folder, run.config)]
        if unfinished or ready:
            self._connect()
        if received := self._train("sweep", self.sweep, unfinished):
            return received
        if self.sweep:
            self.chosen = choose(self.experiment, self.sweep)
            for name, settings in self.chosen.items():
                print(f"chosen    {name}: {', '.join(f'{k}={v}' for k, v in settings.items())}", flush=True)
            self.final = [run for run in planned(self.experiment, self.chosen) if self._has_choice(run.variant)]
            ready = [run for run in self.final if not is_finished(run.folder, run.config)]
            if ready:
                self._connect()
        return self._train("run", self.final, ready)

    def _has_choice(self, variant: str) -> bool:
        """Return whether the variant needs no choice, or the sweep has made it."""
        return variant in self.chosen or not any(run.variant == variant for run in self.sweep)

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        target = current_ray() or find_ray(os.environ)
        print(f"ray       {target}", flush=True)
        needed = max(v.cores or self.experiment.cores for v in self.experiment.variants.values())
        print(f"ray       {connect(target, needed, self.experiment.name)}", flush=True)

    def _train(self, kind: str, runs: Sequence[PlannedRun], unfinished: Sequence[PlannedRun]) -> int:
        """Train the unfinished runs, and write the results after each one; return the signal received, or 0."""
        if not unfinished:
            return 0
        cores = self._capacity(unfinished)
        corpora = [self._corpus(run) for run in unfinished]
        print(
            f"{kind + 's':<9} {len(unfinished)} of {len(runs)} to train, on {cores:g} cores, in {self.folder}",
            flush=True,
        )
        started, count = time.monotonic(), 0

        def ended(end: Ended) -> None:
            nonlocal count
            count += 1
            if end.state is State.FAILED:
                self.failed.append(end)
            line = f"[{count}/{len(unfinished)}] {end.run.name}: {describe_end(end)}"
            print(f"{line} ({time.monotonic() - started:,.0f} s)", flush=True)
            self.write()

        _, received = run_all(
            unfinished, corpora, cores, self.folder / "stop", ended, lambda line: print(line, flush=True)
        )
        return received

    def _capacity(self, runs: Sequence[PlannedRun]) -> float:
        """Return the cores to use. Raises ValueError for a run that needs more than that."""
        most = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        cores = min(self.cores or float("inf"), ray.cluster_resources().get("CPU", 0.0))
        for run in runs:
            if run.cores > min(most, cores):
                raise ValueError(
                    f"{run.name} needs cores={run.cores}, and {min(most, cores):g} are available to a run: lower `cores` of the "
                    "experiment, raise --cores, or add larger nodes"
                )
        return cores

    def _corpus(self, run: PlannedRun) -> Path:
        """Return the corpus of a run: the one of seed 0 for all seeds, so that all have the same validation text."""
        config = override(run.config, ["run.seed=0"])
        key = repr((config.data, config.model.vocabulary))
        if key not in self._corpora:
            self._corpora[key] = prepare(config)
        return self._corpora[key]

    def results(self) -> Record:
        """Return the content of `results.json`."""
        labels = {name: variant.label for name, variant in self.experiment.variants.items()}
        runs = [result_of(run) for run in self.final if RunFolder(run.folder).metrics.is_file()]
        summaries = summarize(runs, labels, self.experiment.reference)
        sweep = self.experiment.sweep
        return {
            "format": FORMAT,
            "name": self.experiment.name,
            "title": self.experiment.title,
            "file": self.experiment.text,
            "overrides": list(self.experiment.overrides),
            "commit": commit(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "labels": labels,
            "reference": self.experiment.reference,
            "seeds": list(self.experiment.seeds),
            "summaries": [s.to_dict() for s in summaries],
            "runs": runs,
            "expected_runs": len(self.experiment.variants) * len(self.experiment.seeds),
            "sweep": None if sweep is None else {
                "select": sweep.select, "seed": sweep.seed, "tune_share": sweep.tune_share,
                "grid": {key: list(values) for key, values in sweep.grid.values.items()},
                "chosen": {name: dict(settings) for name, settings in self.chosen.items()},
                "at_edge": at_edge(sweep, self.chosen),
                "runs": [result_of(run) for run in self.sweep if RunFolder(run.folder).metrics.is_file()],
            },
            "failed": [{"name": e.run.name, "error": e.error, "log": str(RunFolder(e.run.folder).log)} for e in self.failed],
        }  # fmt: skip

    def write(self, copy: Path | None = None) -> None:
        """Write `results.json`, a copy of it, and the page."""
        results = self.results()
        write_json(self.folder / RESULTS, results)
        replace_file(self.folder / PAGE, render_comparison(results))
        if copy is not None:
            write_json(copy, results)

    def conclusion(self) -> str:
        """Return the table, what failed, and the paths of the results."""
        return conclusion(self.results(), self.folder)


def result_of(run: PlannedRun) -> Record:
    """Return the result of a planned run, with its variant and settings."""
    return {"name": run.name, "variant": run.variant, "settings": dict(run.settings), **run_result(run.folder)}


def describe_end(end: Ended) -> str:
    """Return one line on the end of a run."""
    if end.state is State.FAILED:
        return f"failed: {end.error}; log: {RunFolder(end.run.folder).log}"
    result = run_result(end.run.folder)
    if end.state is State.STOPPED:
        return f"stopped after step {result['step']} of {result['steps']}"
    return f"perplexity {result['perplexity'] or float('nan'):.2f}, {result['tokens_per_s'] or 0:,.0f} tokens/s"


def conclusion(results: Mapping[str, Any], folder: Path) -> str:
    """Return the table of an experiment's results, the failures, and the paths."""
    summaries = summarize(results["runs"], results["labels"], results["reference"])
    lines = (
        [markdown(HEAD, table_rows(summaries)), "", note(results["labels"][results["reference"]])] if summaries else []
    )
    sweep = results["sweep"] or {}
    lines += [f"at the edge of the sweep's grid, extend it: {text}" for text in sweep.get("at_edge", ())]
    lines += [f"failed    {f['name']}: {f['error']}; log: {f['log']}" for f in results["failed"]]
    commits = sorted({r["commit"] or "unknown" for r in results["runs"]})
    if len(commits) > 1:
        lines.append(f"the runs are of different commits: {', '.join(c[:12] + '+' * c.endswith('+') for c in commits)}")
    return "\n".join([*lines, f"results   {folder / RESULTS}", f"page      {folder / PAGE}"])
