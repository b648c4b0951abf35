"""Memory saved by scaling clusters instead of whole models: part `scaling` of `jobs/benchmark.py serve`.

The engine serves a skewed load in this process while the compute time of each cluster is measured. The autoscaling
policy then computes replicas for several total loads: of each cluster by its share of the time, and of whole models by
all of it. A replica is one process either way, and the numbers are equal except for rounding and the policy's
tolerance. What differs is the weights in each process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine import NEW, PROMPT, TOGETHER, complete, report
from raymoe.commands.load import pieces
from raymoe.serving.autoscaling import ClusterDemand, Policy, decide, start
from raymoe.serving.engine.cluster import LocalClusters, cluster_sizes
from raymoe.serving.engine.engine import Engine
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.settings import ServeSettings
from raymoe.storage.artifact import Artifact

DEMANDS = (0.5, 2.0, 8.0, 32.0)
"""Total loads, in busy replicas of all clusters together."""
ROUNDS = 4


def scaling(artifact: str, root: str, text: str, domain: str | None) -> dict[str, Any]:
    """Measure replicas and bytes of weights by load, with clusters scaled and with whole models scaled."""
    torch.set_num_threads(1)
    opened = Artifact.open(ServeSettings(artifact=artifact, root=root).folder())
    shares = shares_of_time(opened, text, domain)
    sizes = list(cluster_sizes(opened, torch.float32).values())
    result: dict[str, Any] = {"shares": shares, "bytes": sizes, "demands": {}}
    report(f"scaling  share of the time by cluster: {', '.join(f'{share:.1%}' for share in shares)}")
    for demand in DEMANDS:
        clusters = steady(sizes, [demand * share for share in shares])
        (models,) = steady([sum(sizes)], [demand])
        scaled = sum(n * size for n, size in zip(clusters, sizes, strict=True))
        whole = models * sum(sizes)
        result["demands"][str(demand)] = {
            "clusters": clusters,
            "models": models,
            "bytes": scaled,
            "bytes_models": whole,
        }
        report(f"scaling  {demand:4g} busy: clusters {clusters}, {sum(clusters)} processes, {scaled / 2**20:.0f} MiB of weights; "
            f"whole models {models}, {whole / 2**20:.0f} MiB; saves {1 - scaled / whole:.0%}")  # fmt: skip
    return result


def shares_of_time(artifact: Artifact, text: str, domain: str | None) -> list[float]:
    """Return each cluster's share of the compute time, with most prompts from one domain."""
    model, tokenizer = artifact.model, artifact.tokenizer()
    local = LocalClusters(artifact, range(model.n_clusters), torch.float32)
    seconds: Counter[int] = Counter()

    def timed(layer: int, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        outputs = {}
        for c, part in rows.items():
            started = time.perf_counter()
            outputs |= local(layer, {c: part})
            seconds[c] += time.perf_counter() - started  # type: ignore[assignment]
        return outputs

    length = min(PROMPT + NEW, model.context)
    engine = Engine(Trunk(artifact, timed, torch.float32, length), tokenizer)
    texts = pieces(text, domain=domain, share=0.8, words=40, count=ROUNDS * TOGETHER, seed=0)
    prompts = [tokenizer.encode(prompt).ids[: length - NEW] for prompt in texts]
    for first in range(0, len(prompts), TOGETHER):
        complete(engine, prompts[first : first + TOGETHER])
    return [seconds[c] / seconds.total() for c in range(model.n_clusters)]


def steady(sizes: Sequence[int], demands: Sequence[float]) -> list[int]:
    """Return the replicas at which the policy converges, for constant loads in busy replicas."""
    policy = replace(Policy(), maximum=1_000_000)
    now, states = 0.0, start(policy, sizes, 0.0)
    for _ in range(100):
        now += 10.0
        loads = [
            ClusterDemand(s.desired, 1.0 if demand else 0.0, min(1.0, demand / s.desired) if s.desired else 0.0)
            for s, demand in zip(states, demands, strict=True)
        ]
        states = decide(policy, sizes, states, loads, now)
    return [state.desired for state in states]
