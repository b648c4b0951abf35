"""Facts at the top of a report: the model, the results, and the environment of a run."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from datetime import datetime

import numpy as np

from raymoe.report.plots import Record, column, find, last, number, show

LEVELS = ("experts", "clusters", "workers")
"""Levels at which the load is measured."""


def result_facts(
    about: Record, trains: Sequence[Record], validations: Sequence[Record], events: Sequence[Record]
) -> dict[str, str]:
    """Return the model, its size, the progress and the losses, by title."""
    config = about["config"]
    model, train = _dict(config.get("model")), _dict(config.get("train"))
    groups = {
        "clustered": f", {model.get('n_experts')} in {model.get('n_clusters')} clusters",
        "flat": f", {model.get('n_experts')}",
    }
    kind = str(model.get("experts", "–"))
    facts = {"Preset": str(config.get("preset", "–")), "Experts per layer": kind + groups.get(kind, "")}
    if init := _dict(about.get("init")):
        step = f", step {show(init.get('step'), ',.0f')}" if "step" in init else ""
        facts["Started from"] = f"{init.get('kind', '')} {init.get('folder', '–')}{step}".strip()
    parameters = about.get("parameters")
    for what, count in (parameters if isinstance(parameters, dict) else {"": parameters}).items():
        if not math.isnan(number(count)):
            facts[f"Parameters {what}".strip()] = format(count, ",")
    if trains:
        stopped = ", stopped" if events and events[-1].get("name") == "stopped" else ""
        facts["Steps"] = f"{trains[-1]['step']:,} of {show(train.get('steps'), ',.0f')}{stopped}"
        facts["Tokens"] = show(trains[-1].get("tokens"), ",.0f")
        facts["Workers"] = str(len(trains[-1].get("rss_mb") or []) or "–")
        facts["Training loss"] = f"{show(last(column(trains, 'loss')), '.4f')} nats/token"
    return facts | (_validation_facts(about, validations) if validations else {})


def _validation_facts(about: Record, validations: Sequence[Record]) -> dict[str, str]:
    end, losses = validations[-1], column(validations, "loss")
    windows = "whole set" if end.get("whole") else f"{end.get('windows', '–')} windows"
    facts = {
        "Validation loss": f"{show(end.get('loss'), '.4f')} nats/token, {windows}",
        "Bits per byte": show(bits_per_byte(about, end), ".4f"),
        "Perplexity": f"{show(end.get('perplexity'), ',.2f')} per token",
    }
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        facts["Best validation loss"] = f"{losses[best]:.4f} at step {validations[best]['step']:,}"
    cv = {level: last(column(validations, "load_cv", level)) for level in LEVELS}
    return facts | {f"Load CV, {level}": f"{value:.3f}" for level, value in cv.items() if not math.isnan(value)}


def bits_per_byte(about: Record, validation: Record) -> float:
    """Return the validation loss in bits per UTF-8 byte; NaN if the size of the text is unknown."""
    recorded, size = find(validation, "bits_per_byte"), find(about, "validation_bytes_per_token")
    if not math.isnan(recorded):
        return recorded
    return find(validation, "loss") / math.log(2) / size if size > 0 else math.nan


def environment_facts(about: Record, trains: Sequence[Record]) -> dict[str, str]:
    """Return the command, code, machine and time of a run, by title; unknown facts are left out."""
    machine, command = _dict(about.get("machine")), about.get("command")
    memory = find(machine, "memory") / 2**30
    cores = f"{show(machine.get('cores'), '.0f')} cores" if "cores" in machine else ""
    seconds = training_seconds(trains)
    facts = {
        "Command": shlex.join(map(str, command)) if isinstance(command, list) else "",
        "Commit": re.sub(r"([0-9a-f]{12})[0-9a-f]*", r"\1", _text(about, "commit")),
        "Started": _text(about, "started"),
        "Duration of the last launch": _duration(_wall_seconds(about)),
        "Time of all training steps": _duration(float(seconds[-1]) if len(seconds) else math.nan),
        "Machine of the driver": ", ".join(filter(None, (_text(machine, "host"), _text(machine, "platform")))),
        "Processor": ", ".join(filter(None, (_text(machine, "processor"), cores))),
        "Memory": "" if math.isnan(memory) else f"{memory:,.0f} GiB",
        "Device": _text(machine, "device"),
    }
    versions = {what: str(version) for what, version in _dict(about.get("versions")).items()}
    return {title: value for title, value in facts.items() if value} | versions


def training_seconds(trains: Sequence[Record]) -> np.ndarray:
    """Return the time of all training steps up to each record, in seconds, without validation and restarts."""
    steps = np.diff(column(trains, "step"), prepend=0.0)
    return np.nancumsum(np.maximum(steps, 0) * column(trains, "step_ms")) / 1000


def _wall_seconds(about: Record) -> float:
    try:
        started = datetime.fromisoformat(_text(about, "started")).timestamp()
    except (ValueError, OverflowError):
        return math.nan
    return find(about, "ended") - started


def _duration(seconds: float) -> str:
    if not seconds >= 0:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _dict(value: object) -> Record:
    return value if isinstance(value, dict) else {}


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    return value if isinstance(value, str) else ""
