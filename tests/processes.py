"""Run a function in several gloo processes, started from a fork server that has torch imported once."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["raymoe.parallel.gradients"])


def _main(function: Callable[..., Any], rank: int, world: int, store: str, args: tuple, pipe: Any) -> None:
    import torch

    from raymoe.parallel.local import gloo

    torch.set_num_threads(1)
    try:
        with gloo(rank, world, store, timeout_s=60):
            pipe.send_bytes(pickle.dumps((True, function(rank, world, *args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run(world: int, function: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """function(rank, world, *args) on `world` processes; the results by rank. `function` must be importable."""
    store = folder / f"store-{world}-{len(list(folder.iterdir()))}"
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_main, args=(function, rank, world, str(store), args, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(120), f"rank {rank} of {world} did not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        failures = [f"rank {rank} of {world}:\n{value}" for rank, (good, value) in enumerate(answers) if not good]
        assert not failures, "\n".join(failures)
        results = [value for _, value in answers]
        for process in processes:
            process.join(30)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
