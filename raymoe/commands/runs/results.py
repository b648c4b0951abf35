"""The result of a run, read from its folder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from raymoe.config import Config, from_dict
from raymoe.config.fields import result_fields
from raymoe.report.facts import bits_per_byte, training_seconds
from raymoe.report.plots import Record, column, find, last, number
from raymoe.storage.files import CorruptFile, read_json
from raymoe.storage.run_folder import RunFolder, read_records


def saved_config(run: Path) -> Config:
    """Return the config of a run's folder. Raises ValueError with the file if it cannot be read."""
    path = RunFolder(run).config
    about = read_json(path)
    try:
        return from_dict(about.get("config"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def differences(one: Config, other: Config) -> list[str]:
    """Return the fields that differ, as `section.field: one -> other`."""
    a, b = result_fields(one.to_dict()), result_fields(other.to_dict())
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
    peaks = [sum(map(number, r["rss_mb"])) for r in trains if isinstance(r.get("rss_mb"), list)]
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
        "machine": about.get("machine") if isinstance(about.get("machine"), dict) else {},
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
