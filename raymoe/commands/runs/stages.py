"""The stages of an experiment: the sweep chooses settings on the tuning split, then the final runs are trained."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import ray

from raymoe.commands.runs.comparison import compared, result_table, write_page
from raymoe.commands.runs.definition import Experiment, PlannedRun, assign, planned, planned_sweep
from raymoe.commands.runs.pool import Ended, State, run_all
from raymoe.commands.runs.results import is_finished, run_result
from raymoe.commands.runs.selection import at_edge, choose
from raymoe.config import override
from raymoe.data.prepare import prepare
from raymoe.ops.ray_connection import connect, current_ray, find_ray
from raymoe.report.plots import Record
from raymoe.storage.files import write_json
from raymoe.storage.run_folder import RunFolder
from raymoe.storage.run_lock import own_run

RESULTS, PAGE = "results.json", "page.html"


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
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> int:
        """Train all runs that are not finished; return the signal that stopped them, or 0.

        Raises ValueError or OSError before the first run starts.
        """
        self.sweep = planned_sweep(self.experiment)
        if received := self._train("sweep", self.sweep):
            return received
        if self.sweep:
            self.chosen = choose(self.experiment, self.sweep)
        for name, settings in self.chosen.items():
            print(f"chosen    {name}: {', '.join(assign(settings))}", flush=True)
        self.final = [run for run in planned(self.experiment, self.chosen) if self._has_choice(run.variant)]
        return self._train("run", self.final)

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

    def _train(self, kind: str, runs: Sequence[PlannedRun]) -> int:
        """Train the unfinished runs, and write the results after each one; return the signal received, or 0."""
        unfinished = [run for run in runs if not is_finished(run.folder, run.config)]
        if not unfinished:
            return 0
        self._connect()
        cores = self._capacity(unfinished)
        self.folder.mkdir(exist_ok=True)
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

        return run_all(unfinished, corpora, cores, self.folder / "stop", ended)

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
        experiment, sweep = self.experiment, self.experiment.sweep
        return compared(
            experiment.name, _recorded(self.final), {name: v.label for name, v in experiment.variants.items()},
            experiment.reference, title=experiment.title, file=experiment.text, overrides=experiment.overrides,
            seeds=experiment.seeds, expected_runs=len(experiment.variants) * len(experiment.seeds),
            failed=[{"name": e.run.name, "error": e.error, "log": str(RunFolder(e.run.folder).log)} for e in self.failed],
            sweep=None if sweep is None else {
                "select": sweep.select, "seed": sweep.seed, "tune_share": sweep.tune_share,
                "grid": {key: list(values) for key, values in sweep.grid.values.items()},
                "chosen": {name: dict(settings) for name, settings in self.chosen.items()},
                "at_edge": at_edge(sweep, self.chosen),
                "runs": _recorded(self.sweep),
            },
        )  # fmt: skip

    def write(self, copy: Path | None = None) -> None:
        """Write `results.json`, a copy of it, and the page."""
        results = self.results()
        write_json(self.folder / RESULTS, results)
        write_page(results, self.folder / PAGE)
        if copy is not None:
            write_json(copy, results)

    def conclusion(self) -> str:
        """Return the table, the failed runs, and the paths of the results."""
        failed = [f"failed    {e.run.name}: {describe_end(e)}" for e in self.failed]
        lines = [
            result_table(self.results()),
            *failed,
            f"results   {self.folder / RESULTS}",
            f"page      {self.folder / PAGE}",
        ]
        return "\n".join(filter(None, lines))


def _recorded(runs: Sequence[PlannedRun]) -> list[Record]:
    """Return the results of the runs that have records."""
    return [result_of(run) for run in runs if RunFolder(run.folder).metrics.is_file()]


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
