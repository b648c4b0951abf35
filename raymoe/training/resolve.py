"""The config of a launch: name, root, and the saved config of a resumed run. Imports neither torch nor Ray."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from raymoe.config import Config, expand, from_dict, override
from raymoe.storage.files import read_json
from raymoe.storage.run_folder import RunFolder, run_folder
from raymoe.storage.run_lock import check_free, own_run

PACKAGE_CACHE = "runtime_resources"
"""Folder of a Ray session into which Ray unpacks the working directories of jobs."""


def resolve(config: Config, assignments: Iterable[str]) -> Config:
    """Return the complete config of this launch: overrides applied, run named, root checked.

    With `train.resume=NAME` the saved config of that run is the base and the overrides apply on top. A run
    that exists only at `checkpoint.storage` is copied from there first.
    Raises RunInUse, FileNotFoundError, FileExistsError or ValueError.
    """
    assignments = list(assignments)
    config = override(config, assignments)
    check_root(config.run.root, Path.cwd(), os.environ)
    if config.train.resume:
        return _resume(config, assignments)
    if not config.run.name:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        config = override(config, [f"run.name={config.preset}-{stamp}"])
    folder = run_folder(config.run.root, config.run.name)
    check_free(folder)
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists: choose another run.name, or continue the run with train.resume={config.run.name}"
        )
    return config


def check_root(root: str, working_dir: Path, environment: Mapping[str, str]) -> None:
    """Raise ValueError if `root` is inside the temporary package cache of a Ray job."""
    path = expand(root)
    cached = PACKAGE_CACHE in (working_dir / path).resolve().parts
    if cached or (not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment):
        raise ValueError(
            f"run.root={root} is inside the working directory of a Ray job ({working_dir}), a temporary copy that Ray "
            "deletes: set run.root or RAYMOE_HOME to an absolute path that every node sees"
        )


def _resume(config: Config, assignments: list[str]) -> Config:
    name = config.train.resume
    if config.run.name not in ("", name):
        raise ValueError(
            f"run.name={config.run.name} and train.resume={name} name different runs: leave out run.name to resume "
            f"{name}, or leave out train.resume to start {config.run.name}"
        )
    folder = run_folder(config.run.root, name)
    check_free(folder)
    saved = RunFolder(folder).config
    if config.checkpoint.storage and not folder.exists():
        from raymoe.storage.mirror import Mirror  # imports torch

        with own_run(folder):
            skipped = [] if folder.exists() else Mirror(config.checkpoint.storage, name).pull(folder)
        for reason in skipped:
            print(f"skipped: {reason}", file=sys.stderr)
    if not saved.is_file():
        raise FileNotFoundError(f"no run to resume at {folder}: it has no config.json; check run.root and the name")
    base = from_dict(read_json(saved).get("config"))
    resumed = override(base, [*assignments, f"run.name={name}"])
    for section in ("model", "data"):
        if getattr(resumed, section) != getattr(base, section):
            raise ValueError(f"a resumed run keeps its {section}: drop the {section}.* overrides, or start a new run")
    if resumed.run.seed != base.run.seed or resumed.train.global_batch != base.train.global_batch:
        raise ValueError(
            "a resumed run keeps run.seed and train.global_batch, which determine the tokens of each step: drop these "
            "overrides, or start a new run"
        )
    _check_steps_left(resumed, folder)
    return resumed


def _check_steps_left(config: Config, folder: Path) -> None:
    """Raise ValueError if the newest checkpoint has reached `train.steps`, so that no work is left."""
    from raymoe.storage.checkpoint import newest, newest_step  # imports torch

    checkpoints, steps = RunFolder(folder).checkpoints, config.train.steps
    if newest_step(checkpoints) < steps:
        return
    checkpoint, _ = newest(checkpoints)  # a damaged one does not count
    if checkpoint is None or checkpoint.step < steps:
        return
    if checkpoint.step == steps and _mirror_lacks(config, steps):
        return
    done = f"{config.run.name} has completed {checkpoint.step} steps"
    if checkpoint.step == steps:
        raise ValueError(f"{done} of train.steps={steps}, so no step is left: set a larger train.steps to continue")
    raise ValueError(f"train.steps={steps} is not allowed: {done}; set more steps than that to continue")


def _mirror_lacks(config: Config, step: int) -> bool:
    """Whether the last checkpoint must still be copied to `checkpoint.storage`."""
    if not config.checkpoint.storage:
        return False
    from raymoe.storage.mirror import Mirror  # imports torch

    return step not in Mirror(config.checkpoint.storage, config.run.name).steps()
