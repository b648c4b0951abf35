"""Time of a training step on 1 and 2 workers, and the bytes that cross: the name `step` of `jobs/benchmark.py`."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import paper_form, private_model
from benchmarks.timing import interleaved
from raymoe.config import Config
from raymoe.model.loss import linear_cross_entropy
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.local import gloo, total
from raymoe.parallel.sharded import shard
from raymoe.training.optimizer import Optimizer


def _workers(rank: int, world: int, store: str, config: Config, rounds: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    with gloo(rank, world, store):
        times = _step_times(rank, world, config, rounds)
        if rank == 0:
            pipe.send(times)


def _step_times(rank: int, world: int, config: Config, rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds, tokens/s and all-to-all bytes per token of each variant. Collective."""
    sides, meters = {}, {}
    model, train = config.model, config.train
    variants = {
        "paper": model,
        "private": private_model(model),
        "flat": replace(model, experts="flat"),
        "bases alone": replace(model, residual_width=0),
        "flat, E=C, K=1": replace(model, experts="flat", n_experts=model.n_clusters, experts_per_token=1),
        "dense": replace(model, experts="dense"),
    }
    grains = train.global_batch // train.grain
    tokens = torch.randint(
        model.vocabulary, (grains, train.grain, model.context + 1), generator=torch.Generator().manual_seed(0)
    )
    for name, variant in variants.items():
        sharded = shard(variant, variant.default_assignment())
        sharded.transformer.initialize(0)
        gradients, optimizer = Gradients(sharded), Optimizer(sharded.transformer, train)

        def step(sharded: Any = sharded, gradients: Gradients = gradients, optimizer: Optimizer = optimizer) -> None:
            gradients.zero()
            for index in range(rank, grains, world):
                batch = tokens[index]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=train.precision == "bfloat16"):
                    hidden = sharded.transformer.hidden(batch[:, :-1]).flatten(0, 1)
                    loss = linear_cross_entropy(hidden, sharded.transformer.head_weight, batch[:, 1:].flatten())
                (loss / tokens[..., 1:].numel()).backward()
            gradients.reduce()
            gradients.clip(train.clip)
            optimizer.step(1e-4)

        sides[name], meters[name] = step, sharded
    times = interleaved(sides, rounds, warmup=2)
    per_token = tokens[..., 1:].numel()
    for name, sharded in meters.items():
        times[name]["a2a_bytes_per_token"] = total(sharded.meter.take()) / (rounds + 2) / per_token
        times[name]["tokens_per_s"] = per_token / times[name]["median_ms"] * 1000
    return times


def step(rounds: int, name: str) -> dict[str, Any]:
    """Measure a training step on random tokens, on 1 and 2 gloo processes with one thread each."""
    config = paper_form(name)
    context = multiprocessing.get_context("spawn")
    result: dict[str, Any] = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            mine, theirs = context.Pipe(duplex=False)
            arguments = [(r, world, f"{folder}/store", config, rounds, theirs) for r in range(world)]
            processes = [context.Process(target=_workers, args=a) for a in arguments]
            for process in processes:
                process.start()
            theirs.close()
            times = mine.recv()
            for process in processes:
                process.join()
        for side, t in times.items():
            t["of_flat"] = t["median_ms"] / times["flat"]["median_ms"]
            print(f"{name} {world} worker(s)  {side:16}{t['median_ms']:8.0f} ms [{t['min_ms']:.0f}, {t['max_ms']:.0f}]"
                  f"  {t['of_flat']:.2f} of flat  {t['tokens_per_s']:8,.0f} tokens/s  {t['a2a_bytes_per_token']:6.0f} all-to-all bytes/token")  # fmt: skip
        result[f"{world} workers"] = times
    return result
