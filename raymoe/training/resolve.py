"""The config of a launch: name, root, and the config of a resumed run or of initial weights.

Imports neither torch nor Ray before the names are checked.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

from raymoe.config import Config, ModelSection, expand, from_dict, override
from raymoe.config.overrides import check_key
from raymoe.storage.files import read_json
from raymoe.storage.run_folder import MANIFEST, RunFolder, find_model, run_folder
from raymoe.storage.run_lock import check_free, own_run

PACKAGE_CACHE = "runtime_resources"
"""Folder of a Ray session into which Ray unpacks the working directories of jobs."""

FREE = ("context", "gate_scale", "rope_theta", "experts_per_token", "clusters_per_token")
"""Fields of the model that a run may change when it starts from the weights of another: no weight depends on them."""


def resolve(config: Config, assignments: Iterable[str]) -> Config:
    """Return the complete config of this launch: overrides applied, run named, root checked.

    With `train.resume=NAME` the saved config of that run is the base and the overrides apply on top. A run
    that exists only at `checkpoint.storage` is copied from there first. With `train.init=NAME` the model section of
    those weights is the base.
    Raises RunInUse, FileNotFoundError, FileExistsError or ValueError.
    """
    assignments = list(assignments)
    config = override(_with_initial_model(config, assignments), assignments)
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


def _with_initial_model(config: Config, assignments: list[str]) -> Config:
    """Return `config` with the model of the weights that `train.init` names, to which the overrides then apply.

    Raises ValueError for an override of the model that does not fit the weights, FileNotFoundError for a wrong name.
    """
    keys = [item.partition("=")[0] for item in assignments]
    names = ("run.root", "train.init", "train.resume")
    named = override(config, [item for key, item in zip(keys, assignments, strict=True) if key in names])
    if not named.train.init or named.train.resume:
        return config
    for key in keys:
        check_key(key)
    check_source_name(named.run.root, named.train.init)
    from raymoe.storage.weights import open_weights  # imports torch

    weights, _ = open_weights(named.run.root, named.train.init)
    based = replace(config, model=weights.config.model, regroup=replace(config.regroup, mode="off", replay=""))
    changes = [item for key, item in zip(keys, assignments, strict=True) if key.startswith("model.")]
    check_model(override(based, changes).model, weights.config.model, named.train.init)
    return replace(config, model=weights.config.model)


def check_source_name(root: str, name: str) -> None:
    """Raise FileNotFoundError unless `name` is an artifact, or a run with a complete checkpoint. Reads no weights."""
    try:
        folder, is_artifact = find_model(root, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"train.init={name} is no artifact, and {error}; check the name and run.root") from None
    if not is_artifact and not any(RunFolder(folder).checkpoints.glob(f"step_*/{MANIFEST}")):
        raise FileNotFoundError(
            f"train.init={name}: the run has no complete checkpoint in {RunFolder(folder).checkpoints}"
        )


def check_model(model: ModelSection, source: ModelSection, name: str) -> None:
    """Raise ValueError with the first field of `model` that the weights of `source` do not allow."""
    dense = model.experts == "dense"  # its width is that of the active experts
    for field, value in asdict(model).items():
        stored = getattr(source, field)
        if value != stored and (field not in FREE or (dense and field == "experts_per_token")):
            raise ValueError(
                f"model.{field}={value} is not allowed: the weights of train.init={name} have model.{field}={stored}; "
                "leave out the override"
            )


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
        remedy = "remove the folder and start the run again" if folder.exists() else "check run.root and the name"
        raise FileNotFoundError(f"no run to resume at {folder}: it has no config.json; {remedy}")
    base = _with_own_files(from_dict(read_json(saved).get("config")), RunFolder(folder))
    resumed = override(base, [*assignments, f"run.name={name}"])
    for section in ("model", "data"):
        if getattr(resumed, section) != getattr(base, section):
            raise ValueError(f"a resumed run keeps its {section}: drop the {section}.* overrides, or start a new run")
    if resumed.train.init != base.train.init:
        raise ValueError(
            f"train.init={resumed.train.init} starts a new run, and train.resume={name} continues one: leave out one of them"
        )
    fixed = ("run.seed", "train.global_batch", "train.mixture")
    if any(attrgetter(field)(resumed) != attrgetter(field)(base) for field in fixed):
        raise ValueError(
            "a resumed run keeps run.seed, train.global_batch and train.mixture, which determine the tokens of each step: "
            "drop these overrides, or start a new run"
        )
    _check_steps_left(resumed, folder)
    return resumed


def _with_own_files(config: Config, run: RunFolder) -> Config:
    """Return `config` with the run's own tokenizer and chat template: their paths change if the run is copied or moved."""
    data = config.data
    if config.train.init and run.tokenizer.is_file():
        data = replace(data, tokenizer=str(run.tokenizer))
    if data.chat_template and run.chat_template.is_file():
        data = replace(data, chat_template=str(run.chat_template))
    return replace(config, data=data)


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
