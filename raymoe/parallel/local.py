"""A world of gloo processes on one machine without Ray, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def gloo(rank: int, world: int, store: str, timeout_s: float = 300.0) -> Iterator[None]:
    """Join `world` processes that share the file `store`. A clean exit waits for all ranks; a failure does not."""
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    yield
    dist.barrier()
    dist.destroy_process_group()


def total(value: float) -> float:
    """Return the all-reduced sum. Collective."""
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.item()
