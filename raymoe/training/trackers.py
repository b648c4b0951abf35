"""Scalars of a run in TensorBoard, Weights & Biases or MLflow (`train.tracker`), each through its own package.

Rank 0 sends the numbers of train and validation records. The packages are optional extras and are imported when a
run uses them. Addresses and credentials come from each package's environment variables (WANDB_API_KEY, WANDB_MODE,
MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from raymoe.config import Config

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Module that each value of `train.tracker` requires."""
PROJECT = "raymoe"
"""Default project of Weights & Biases, and default experiment of MLflow."""

TRAIN_SCALARS = (
    "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_ms", "load_cv", "load_max_vio", "a2a_bytes_per_token",
    "version", "skipped_steps",
)  # fmt: skip
VALIDATION_SCALARS = ("loss", "perplexity", "domains", "load_cv", "load_max_vio")


class Tracker(Protocol):
    """A destination of scalars."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one record by name."""
        ...

    def close(self) -> None:
        """Send the remaining values and complete the run."""
        ...


def require_tracker(name: str) -> None:
    """Raise ValueError if the package of `train.tracker=name` is not installed."""
    if name and find_spec(PACKAGES[name]) is None:
        raise ValueError(
            f"train.tracker={name} needs the package {PACKAGES[name]!r}, which is not installed: "
            f"run `pip install raymoe[{name}]` on every node"
        )


def start_tracker(config: Config, run: Path, step: int) -> Tracker | None:
    """Return the tracker of a run that continues at `step`, or None without `train.tracker`. Raises ValueError, see `require_tracker`."""
    name = config.train.tracker
    require_tracker(name)
    if name == "tensorboard":
        return TensorBoardTracker(run, step)
    if name == "wandb":
        return WandbTracker(config, run)
    if name == "mlflow":
        return MLflowTracker(config)
    return None


def scalars(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record by name: `train/loss`, `train/load_cv/experts`, `validation/domains/wiki`, ..."""
    found: dict[str, float] = {}
    for name in TRAIN_SCALARS if kind == "train" else VALIDATION_SCALARS:
        value = record.get(name)
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, number in parts:
            if isinstance(number, (int, float)) and math.isfinite(number):
                found[f"{kind}/{name}/{part}".rstrip("/")] = float(number)
    return found


class TensorBoardTracker:
    """Writes event files into the folder `tensorboard` of the run."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)  # hides steps that are repeated

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Sends scalars to Weights & Biases. A resumed run continues the run of the same name."""

    def __init__(self, config: Config, run: Path) -> None:
        wandb: Any = import_module("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=config.run.name,
            name=config.run.name,
            dir=str(run),
            resume="allow",
            config=config.to_dict(),
        )
        self._run.define_metric("*", step_metric="step")  # the service's own step cannot decrease

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflowTracker:
    """Sends scalars to MLflow. A resumed run continues the newest run of the same name in the experiment."""

    def __init__(self, config: Config) -> None:
        mlflow: Any = import_module("mlflow")
        self._client: Any = mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        identifier = found.experiment_id if found else self._client.create_experiment(experiment)
        name = config.run.name
        runs = self._client.search_runs([identifier], f"attributes.run_name = '{name}'", max_results=1)
        self._run: str = (runs[0] if runs else self._client.create_run(identifier, run_name=name)).info.run_id
        self._client.update_run(self._run, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)
