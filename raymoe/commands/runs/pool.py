"""Runs side by side: each is one Ray task in its own process, as many at a time as the cores allow.

A signal makes all runs write a checkpoint and stop. A run that fails does not end the others.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from raymoe.commands.runs.definition import PlannedRun
from raymoe.config import from_dict
from raymoe.storage.run_folder import RunFolder, read_records

POLL_S = 0.5
STATUS_S = 60.0
"""Seconds between two lines that describe the running runs."""


class State(Enum):
    """State of a run after its task."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Ended:
    """The end of a run's task."""

    run: PlannedRun
    state: State
    error: str = ""
    """Last line of the error of a failed run."""


def run_all(
    runs: Sequence[PlannedRun], corpora: Sequence[Path], cores: float, stop: Path,
    ended: Callable[[Ended], None],
) -> int:  # fmt: skip
    """Train `runs`, each on the corpus in its folder of `corpora`, with at most `cores` cores at a time.

    Ray must be connected. `stop`: path of a file that requests a stop. `ended` is called after each run that started.
    Prints a line on the running ones every STATUS_S. Returns the signal that stopped the runs, or 0.
    """
    from raymoe.training.stop_signals import stop_on_signal

    stop.unlink(missing_ok=True)
    waiting = list(zip(runs, corpora, strict=True))
    active: dict[Any, PlannedRun] = {}
    shown = time.monotonic()
    with stop_on_signal(stop) as received:
        while waiting or active:
            if received:
                waiting.clear()
                _stop(active)
            while waiting and sum(r.cores for r in active.values()) + waiting[0][0].cores <= cores:
                run, corpus = waiting.pop(0)
                active[_submit(run, corpus, stop)] = run
            done, _ = ray.wait(list(active), timeout=POLL_S) if active else ([], [])
            for future in done:
                ended(_end(active.pop(future), future))
            if active and time.monotonic() - shown > STATUS_S:
                shown = time.monotonic()
                print(describe(list(active.values()), len(waiting)), flush=True)
    return received[0] if received else 0


def _submit(run: PlannedRun, corpus: Path, stop: Path) -> Any:
    # One call per process: peak memory and compiled code of a run do not depend on the run before it. A task whose
    # process dies is repeated, and resumes from the newest checkpoint.
    task = ray.remote(max_calls=1, num_cpus=run.cores, max_retries=run.config.train.max_failures)(train_logged)
    return task.options(name=run.name).remote(run.config.to_dict(), str(run.folder), str(corpus), str(stop))


def train_logged(config: dict[str, Any], run: str, corpus: str, stop: str) -> dict[str, Any]:
    """Train one run in this process, with its output in `log.txt`. Returns the outcome, or `{"error": text}`."""
    folder = RunFolder(Path(run))
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.log.open("a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            from raymoe.data.corpus import Corpus
            from raymoe.training.single import train_here

            return train_here(from_dict(config), folder.path, Corpus.open(corpus), Path(stop))
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _end(run: PlannedRun, future: Any) -> Ended:
    try:
        outcome: Any = ray.get(future)
    except RayError as error:  # the process died
        return Ended(run, State.FAILED, " ".join(str(error).split())[:300])
    if "error" in outcome:
        return Ended(run, State.FAILED, outcome["error"])
    return Ended(run, State.STOPPED if outcome["stopped"] else State.FINISHED)


def _stop(active: dict[Any, PlannedRun]) -> None:
    """Request a checkpoint and a stop of each run, and remove the tasks that Ray has not started yet from `active`."""
    for future, run in list(active.items()):
        folder = RunFolder(run.folder)
        if folder.lock.exists():
            folder.stop_request.touch()
        elif not ray.wait([future], timeout=0)[0]:  # its process removes the stop request first, then reads `stop`
            ray.cancel(future)
            del active[future]


def describe(active: Sequence[PlannedRun], waiting: int) -> str:
    """Return a line on the progress of the active runs."""
    parts = []
    for run in active:
        trains = [r for r in read_records(RunFolder(run.folder).metrics) if r.get("kind") == "train"]
        parts.append(f"{run.name} {trains[-1]['step'] if trains else 0}/{run.config.train.steps}")
    return f"running: {', '.join(parts)}; {waiting} waiting"
