"""The result of a run, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raymoe.config import Config, from_dict
from raymoe.report.facts import bits_per_byte, training_seconds
from raymoe.report.plots import Record, column, find, last
from raymoe.storage.files import CorruptFile, read_json
from raymoe.storage.run_folder import RunFolder, read_records

PLACE = ("run.name", "run.root", "data.cache", "train.resume", "train.metrics_host", "train.tracker")
"""Fields that do not change the result of a run."""


def saved_config(run: Path) -> Config:
    """Return the config of a run's folder. Raises ValueError if it cannot be read."""
    return from_dict(read_json(RunFolder(run).config).get("config"))


def flat_fields(config: Config) -> dict[str, Any]:
    """Return the fields that change the result of a run, by `section.field`."""
    sections: Mapping[str, Any] = asdict(config)
    fields = {f"{s}.{name}": value for s, of in sections.items() if isinstance(of, dict) for name, value in of.items()}
    return {key: value for key, value in fields.items() if key not in PLACE}


def differences(one: Config, other: Config) -> list[str]:
    """Return the fields that differ, as `section.field: one -> other`."""
    a, b = flat_fields(one), flat_fields(other)
    return [f"{key}: {a[key]} -> {b[key]}" for key in a if a[key] != b[key]]


def is_finished(run: Path, config: Config) -> bool:
    """Return whether the run in a folder has reached the last step of `config`.

    Raises ValueError if the folder has a run with another config, or a config that cannot be read.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        return False
    if found := differences(saved_config(run), config):
        raise ValueError(
            f"{run} has another config ({'; '.join(found[:6])}): delete that folder to run it again, or give the "
            "experiment another name with --name"
        )
    validation = _last_validation(read_records(folder.metrics))
    return bool(
        validation and validation["step"] == config.train.steps and _outcome(folder).get("step") == config.train.steps
    )


def _outcome(folder: RunFolder) -> Record:
    try:
        return read_json(folder.outcome) if folder.outcome.is_file() else {}
    except CorruptFile:
        return {}


def _last_validation(records: list[Record]) -> Record | None:
    whole = [r for r in records if r.get("kind") == "validation" and r.get("whole")]
    return whole[-1] if whole else None


def run_result(run: Path) -> Record:
    """Return the result of the run in a folder as JSON values; None for what it has not recorded.

    Raises ValueError if the folder has no run that can be read.
    """
    from raymoe.training.run_summary import active_parameters, parameters  # imports torch

    folder = RunFolder(run)
    config, about, records = saved_config(run), read_json(folder.config), read_records(folder.metrics)
    trains = [r for r in records if r.get("kind") == "train"]
    final = _last_validation(records)
    tokens = config.train.global_batch * config.model.context
    peaks = [sum(r["rss_mb"]) for r in trains if r.get("rss_mb")]
    speeds = column(trains, "tokens_per_s")
    return {
        "folder": str(run),
        "seed": config.run.seed,
        "steps": config.train.steps,
        "step": trains[-1]["step"] if trains else 0,
        "tokens_per_step": tokens,
        "finished": bool(final and final["step"] == config.train.steps and math.isfinite(find(final, "perplexity"))),
        "curve": _curve(about, trains, [r for r in records if r.get("kind") == "validation"], tokens),
        "perplexity": _number(find(final, "perplexity")),
        "bits_per_byte": _number(bits_per_byte(about, final)) if final else None,
        "load_cv": {of: _number(find(final, "load_cv", of)) for of in ("experts", "clusters")},
        "parameters": parameters(config.model),
        "active_parameters": active_parameters(config.model),
        "seconds": _number(last(training_seconds(trains))),
        "tokens_per_s": _number(float(np.nanmedian(speeds))) if np.isfinite(speeds).any() else None,
        "peak_rss_mb": max(filter(math.isfinite, [*peaks, find(_outcome(folder), "peak_rss_mb")]), default=None),
        "skipped_steps": trains[-1].get("skipped_steps") if trains else None,
        "lr": config.train.lr,
        "tune_share": config.data.tune_share,
        "corpus": about.get("corpus_fingerprint"),
        "commit": about.get("commit"),
        "machine": about.get("machine"),
        "started": about.get("started"),
        "config": config.to_dict(),
    }


def _curve(about: Record, trains: list[Record], validations: list[Record], tokens: int) -> list[Record]:
    """Return the validations of a run with the tokens and the training seconds before them."""
    steps, seconds = column(trains, "step"), training_seconds(trains)
    return [
        {
            "step": r["step"],
            "tokens": r["step"] * tokens,
            "seconds": _number(float(np.interp(r["step"], [0, *steps], [0, *seconds]))) if len(steps) else None,
            "perplexity": _number(find(r, "perplexity")),
            "bits_per_byte": _number(bits_per_byte(about, r)),
            "whole": bool(r.get("whole")),
        }
        for r in validations
    ]


def _number(value: float) -> float | None:
    """Return None for a number that JSON cannot represent."""
    return value if math.isfinite(value) else None
