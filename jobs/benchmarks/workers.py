"""Training in gloo processes for the benchmarks of regrouping: trainers, corpora, step times and records."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from raymoe.config import Config, override
from raymoe.data.prepare import prepare
from raymoe.metrics import TrainingMetrics
from raymoe.parallel.local import gloo, total
from raymoe.storage.run_folder import read_records
from raymoe.training.loop import Trainer
from raymoe.training.regroup.clients import ClustererClient

Records = list[dict[str, Any]]


def records(file: Path, *values: str, key: str = "name") -> Records:
    """Return the records of a JSONL file whose `key` is one of `values`."""
    return [r for r in read_records(file) if r.get(key) in values]


def trainer(config: Config, corpus: Any, run: Path, client: ClustererClient | None, rank: int = 0) -> Trainer:
    metrics = TrainingMetrics(CollectorRegistry(), run="benchmark", worker=str(rank))
    return Trainer(config, corpus, run, metrics, torch.device("cpu"), client)


def corpus_for(config: Config, data: str, root: str) -> str:
    """Prepare token shards with the tokenizer and the held-out part of seed 0, for runs of all seeds."""
    return str(prepare(override(config, [f"data.path={data}", f"run.root={root}"])))


def in_processes(world: int, work: Callable[..., Any], folder: str, *arguments: Any) -> Any:
    """Run `work(rank, *arguments)` in gloo processes with one thread each; return the result of rank 0."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    store = f"{folder}/store{time.time_ns()}"
    processes = [
        context.Process(target=_start_rank, args=(r, world, store, theirs, work, arguments)) for r in range(world)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        result = mine.recv()
    except EOFError:
        raise RuntimeError("a process of the benchmark failed; see its traceback above") from None
    finally:
        for process in processes:
            process.join()
    return result


def _start_rank(
    rank: int, world: int, store: str, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    with gloo(rank, world, store):
        result = work(rank, *arguments)
        if rank == 0:
            pipe.send(result)


def timed(step: Callable[[], Any]) -> float:
    """Return the milliseconds of a step that all ranks start together. Collective."""
    total(0.0)
    started = time.perf_counter()
    step()
    total(0.0)
    return 1000 * (time.perf_counter() - started)
