"""The choice of a sweep: the settings of each variant with the lowest score on the tuning split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raymoe.commands.runs.definition import Experiment, PlannedRun, Sweep
from raymoe.commands.runs.results import is_finished, run_result
from raymoe.report.plots import find


def choose(experiment: Experiment, runs: Sequence[PlannedRun]) -> dict[str, Mapping[str, str]]:
    """Return the settings with the lowest score by variant, over the finished runs of a sweep.

    A variant without a finished run has no entry.
    """
    assert experiment.sweep is not None
    best: dict[str, tuple[float, Mapping[str, str]]] = {}
    for run in runs:
        if not is_finished(run.folder, run.config):
            continue
        score = find(run_result(run.folder), experiment.sweep.select)
        if math.isfinite(score) and score < best.get(run.variant, (math.inf, {}))[0]:
            best[run.variant] = score, run.settings
    return {variant: settings for variant, (_, settings) in best.items()}


def at_edge(sweep: Sweep, chosen: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return `variant: key=value` for each chosen number at an end of its grid: a better one may be outside."""
    found = []
    for variant, settings in chosen.items():
        for key, value in settings.items():
            numbers = _numbers(sweep.grid.values[key])
            if len(numbers) > 2 and float(value) in (min(numbers), max(numbers)):
                found.append(f"{variant}: {key}={value}")
    return found


def _numbers(texts: Sequence[str]) -> list[float]:
    """Return the values as numbers; none if one is not a number."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []
