"""Run a function in several gloo processes, started by a fork server with preloaded imports."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["raymoe.training.loop", "torch._dynamo"])  # optimizers import the latter


class Outcome(NamedTuple):
    """Result of a rank. `error` is empty, or a traceback, or the state of a process without a result."""

    value: Any
    error: str
    seconds: float
    """Seconds from the first outcome of any rank to this one."""


def _main(
    function: Callable[..., Any], rank: int, world: int, store: str, timeout_s: float, args: tuple, pipe: Any
) -> None:
    import torch

    from raymoe.parallel.local import gloo

    torch.set_num_threads(1)
    try:
        with gloo(rank, world, store, timeout_s):
            pipe.send_bytes(pickle.dumps((True, function(rank, world, *args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def outcomes(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    timeout_s: float = 60,
    wait_s: float = 120,
    absent: int | None = None,
) -> list[Outcome]:
    """Run function(rank, world, *args) on `world` processes; return the outcomes by rank.

    function: an importable function. timeout_s: timeout of collectives. wait_s: time after which a rank without an
    outcome counts as hung. absent: a rank whose outcome is not awaited. All processes have ended on return.
    """
    store = folder / f"store-{world}-{len(list(folder.iterdir()))}"
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = _CONTEXT.Pipe(duplex=False)
        arguments = (function, rank, world, str(store), timeout_s, args, theirs)
        process = _CONTEXT.Process(target=_main, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    found: dict[int, Outcome] = {}
    first = None
    deadline = time.monotonic() + wait_s
    try:
        while missing := {pipes[rank]: rank for rank in range(world) if rank not in found and rank != absent}:
            for pipe in wait(list(missing), max(0.0, deadline - time.monotonic())) or missing:
                rank = missing[pipe]  # type: ignore[index]
                if not pipe.poll():  # type: ignore[union-attr]
                    found[rank] = Outcome(None, f"hung: no outcome within {wait_s} s", wait_s)
                    continue
                first = first or time.monotonic()
                seconds = time.monotonic() - first
                try:
                    good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                    found[rank] = Outcome(value, "", seconds) if good else Outcome(None, value, seconds)
                except EOFError:
                    processes[rank].join(30)
                    found[rank] = Outcome(None, f"died: exit code {processes[rank].exitcode}", seconds)
        for rank, process in enumerate(processes):
            if rank in found and not found[rank].error.startswith("hung"):
                process.join(30)
        return [found.get(rank, Outcome(None, "absent", 0.0)) for rank in range(world)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(30)


def run(world: int, function: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Run the importable function(rank, world, *args) on `world` processes; return the results by rank."""
    made = outcomes(world, function, *args, folder=folder)
    failures = [f"rank {rank} of {world}:\n{outcome.error}" for rank, outcome in enumerate(made) if outcome.error]
    assert not failures, "\n".join(failures)
    return [outcome.value for outcome in made]
