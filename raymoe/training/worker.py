"""The function that each Ray Train worker runs, from the top after every restart."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from prometheus_client import CollectorRegistry
from ray.train.torch import get_device

from raymoe.config import Config, from_dict
from raymoe.data.corpus import Corpus
from raymoe.metrics import TrainingMetrics, serve
from raymoe.storage.run_folder import RunFolder
from raymoe.storage.scrape_targets import write_targets
from raymoe.training.failures import Unrecoverable, record_unrecoverable, stop_reason
from raymoe.training.loop import Trainer, threads
from raymoe.training.regroup.clients import ActorClient, ClustererClient, ReplayClient

SHARED_TIMEOUT_S = 10.0
"""Seconds until a new file must be visible on every node: NFS caches the content of folders for some seconds."""


@dataclass(frozen=True)
class WorkerJob:
    """Message of the driver to its workers."""

    config: dict[str, Any]
    run: str
    corpus: str
    nonce: str
    """Content of RunFolder.driver_nonce."""
    driver_node: str
    clusterer: str
    """Name of the clusterer's actor; empty without one."""


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Train on one worker to the last step or to an orderly stop. Collective.

    Returns the outcome of `Trainer.train`, `{"unshared": reason}` if a worker cannot read the run's folder, or
    `{"unrecoverable": reason}` if the run must not restart.
    """
    job: WorkerJob = loop_config["job"]
    config, run = from_dict(job.config), Path(job.run)
    if reason := next(filter(None, gathered(unshared(job, ray.util.get_node_ip_address()))), ""):
        return {"unshared": reason}
    if stop_reason(run, config.train.max_failures):
        return {}
    context = ray.train.get_context()
    torch.set_num_threads(threads(config, context.get_local_world_size()))
    metrics = export_metrics(config, run, context.get_world_rank())
    try:
        trainer = Trainer(config, Corpus.open(job.corpus), run, metrics, get_device(), clusterer_client(config, job))
        return trainer.train()
    except Unrecoverable as error:  # returned, because a full disk may not even take the record
        with contextlib.suppress(OSError):
            record_unrecoverable(run, error)
        return {"unrecoverable": str(error)}


def unshared(job: WorkerJob, node: str, timeout_s: float = SHARED_TIMEOUT_S) -> str:
    """Return why this worker, on `node`, cannot train: it cannot read the driver's files. Empty if it can."""
    nonce, corpus = RunFolder(Path(job.run)).driver_nonce, Path(job.corpus) / "corpus.json"
    checks = ((nonce, lambda: nonce.read_text() == job.nonce), (corpus, corpus.is_file))
    deadline = time.monotonic() + timeout_s
    for file, readable in checks:
        while not _succeeds(readable):
            if time.monotonic() > deadline:
                return (
                    f"node {node} cannot read {file.parent}, which the driver wrote on node {job.driver_node}: mount "
                    "one shared file system (NFS, EFS) there on all nodes, or set run.root or RAYMOE_HOME to a folder "
                    "that all nodes share"
                )
            with contextlib.suppress(OSError):
                os.listdir(file.parent)  # makes an NFS client read the folder again
            time.sleep(0.1)
    return ""


def _succeeds(readable: Callable[[], bool]) -> bool:
    try:
        return readable()
    except OSError:
        return False


def gathered(value: Any) -> list[Any]:
    """Return the `value` of every rank, in order. Collective."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def export_metrics(config: Config, run: Path, rank: int) -> TrainingMetrics:
    """Serve this worker's metrics to Prometheus; rank 0 writes the scrape targets of all workers. Collective."""
    registry = CollectorRegistry()
    labels = {"run": config.run.name, "worker": str(rank)}
    metrics = TrainingMetrics(registry, **labels)
    host = config.train.metrics_host
    reachable = ray.util.get_node_ip_address() if host == "0.0.0.0" else host
    targets = gathered((reachable, serve(registry, host), labels))
    if rank == 0:
        write_targets(RunFolder(run).targets, targets)
    return metrics


def clusterer_client(config: Config, job: WorkerJob) -> ClustererClient | None:
    """Return the client of the run's clusterer; None if its experts never regroup."""
    if config.regroups and config.regroup.mode == "replay":
        return ReplayClient(Path(config.regroup.replay))
    return ActorClient(job.clusterer) if job.clusterer else None
