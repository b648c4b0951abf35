"""A run of one worker in this process, without Ray Train: experiments, and the demo's comparison."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from raymoe.config import Config
from raymoe.data.corpus import Corpus
from raymoe.metrics import TrainingMetrics
from raymoe.ops.memory import peak_rss_mb
from raymoe.storage.files import write_json
from raymoe.storage.run_folder import RunFolder
from raymoe.storage.run_lock import own_run
from raymoe.training.launch import finish_folder, start_folder
from raymoe.training.loop import Trainer, threads
from raymoe.training.regroup.clients import ClustererClient, DirectClient, ReplayClient
from raymoe.training.regroup.clusterer import Clusterer


def train_here(config: Config, run: Path, corpus: Corpus, stop: Path | None = None) -> dict[str, Any]:
    """Train on the CPU of this process, from the run's newest checkpoint or from step 0, and write its report.

    The file `RunFolder.stop_request` stops the run with a checkpoint at the next step; a file `stop` stops it before the
    first step. Returns the step reached, whether the run was stopped, and the peak memory in MiB; `outcome.json` has
    the same, except for a run that `stop` stopped. The clusterer runs in this process, so the time of a step contains its work.
    Raises RunInUse, ValueError for a run that starts from stored weights, the errors of `Trainer`, and
    FloatingPointError if the last validation loss is not finite.
    """
    if config.train.init:
        raise ValueError(f"train.init={config.train.init} is not supported in an experiment: use raymoe train")
    folder = RunFolder(run)
    with own_run(run):
        start_folder(config, run, corpus)
        if stop is not None and stop.exists():  # after start_folder, which removes an old request
            return {"step": 0, "stopped": True}
        torch.set_num_threads(threads(config, 1))
        metrics = TrainingMetrics(CollectorRegistry(), run=config.run.name, worker="0")
        try:
            trainer = Trainer(config, corpus, run, metrics, torch.device("cpu"), _client(config))
            result = trainer.train()
            loss = trainer.position.validation.get(result["step"], math.nan)
            if not result["stopped"] and not math.isfinite(loss):  # a resumed run may count too few skipped steps
                raise FloatingPointError("the validation loss after the last step is not finite: lower train.lr")
        finally:
            finish_folder(config, run, None)
        outcome = {"step": result["step"], "stopped": result["stopped"], "peak_rss_mb": peak_rss_mb()}
        write_json(folder.outcome, outcome)
        return outcome


def _client(config: Config) -> ClustererClient | None:
    if not config.regroups:
        return None
    if config.regroup.replay:
        return ReplayClient(Path(config.regroup.replay))
    return DirectClient(Clusterer(config.to_dict()))
