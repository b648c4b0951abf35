"""The replicas of an application's deployments: the api, the trunks and the clusters.

Plain classes that `app.py` turns into Serve deployments. Serve starts, checks, scales and ends them and lists them for
`discovery.py`. Requests and rows use connections of their own (`transport`), authenticated by the application's secret.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from raymoe.metrics import ApiMetrics, ClusterMetrics, TrunkMetrics
from raymoe.serving.cluster_pool import ClusterPool
from raymoe.serving.discovery import (
    TARGETS_EVERY,
    ClusterDiscovery,
    Discovery,
    Endpoint,
    ScrapeTargets,
    addresses,
    bind_host,
    endpoints,
    start_metrics,
)
from raymoe.serving.engine.cluster import Cluster
from raymoe.serving.engine.engine import Engine
from raymoe.serving.engine.native import kernel_name
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.thread import EngineThread
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.http.errors import Unavailable
from raymoe.serving.http.server import ApiSettings, create_app
from raymoe.serving.residency import trim
from raymoe.serving.settings import ServeSettings
from raymoe.serving.transport.requests import RequestServer, request_identity
from raymoe.serving.transport.rows import RowServer, row_identity
from raymoe.serving.transport.trunk_pool import NoTrunkAvailable, TrunkPool
from raymoe.storage.artifact import Artifact

STUCK_S = 60.0
"""Seconds after which a step is treated as hung."""


class _Rate:
    """Increase of a total per second, between two calls."""

    def __init__(self) -> None:
        self._at, self._total = time.monotonic(), 0.0

    def __call__(self, total: float) -> float:
        now = time.monotonic()
        rate = (total - self._total) / max(now - self._at, 1e-3)
        self._at, self._total = now, total
        return rate


class ClusterReplica:
    """One cluster of every layer: computes the outputs of rows."""

    def __init__(self, settings: ServeSettings, folder: str, secret: bytes, c: int) -> None:
        torch.set_num_threads(settings.threads)
        artifact = Artifact.open(Path(folder), verify="on_read")
        model, tensors = artifact.model, artifact.cluster(c)
        self.layers = [Cluster(model, tensors, i, c, settings.dtype) for i in range(model.layers)]
        del tensors
        trim()
        registry = CollectorRegistry()
        self.metrics = ClusterMetrics(registry, cluster=str(c))
        self.metrics.resident_bytes.set(sum(layer.bytes for layer in self.layers))
        self._lock = threading.Lock()
        self._busy_s, self._calls = 0.0, 0
        self._busy, self._calls_per_s = _Rate(), _Rate()
        host = bind_host(settings.host)
        identity = row_identity(artifact.digest, c, settings.dtype, kernel_name())
        self._server = RowServer(self._compute, identity, model.d_model, settings.dtype, (host, 0), secret)
        target = start_metrics(host, registry)
        self._endpoint = Endpoint(target, (host, self._server.port), artifact.digest.hex())

    def _compute(self, layer: int, x_RD: Tensor) -> Tensor:
        if layer >= len(self.layers):
            raise ValueError(f"there is no layer {layer}")
        started = time.perf_counter()
        y_RD = self.layers[layer](x_RD)
        seconds = time.perf_counter() - started
        with self._lock:
            self._busy_s += seconds
            self._calls += 1
        self.metrics.rows.inc(x_RD.shape[0])
        self.metrics.compute_seconds.observe(seconds)
        return y_RD

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return `busy`, the share of time spent computing, and `latency_s`, the mean compute time of a call."""
        with self._lock:
            busy_s, calls = self._busy_s, self._calls
        busy, calls_per_s = self._busy(busy_s), self._calls_per_s(calls)
        return {"busy": busy, "latency_s": busy / calls_per_s if calls_per_s else 0.0}

    def __del__(self) -> None:
        if server := getattr(self, "_server", None):
            server.close()


class TrunkReplica:
    """An engine whose clusters are resident here, or at replicas."""

    async def __init__(
        self, settings: ServeSettings, folder: str, secret: bytes, clusters: Sequence[DeploymentHandle]
    ) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        artifact = Artifact.open(Path(folder), verify="on_read")
        model, tokenizer, digest = artifact.model, artifact.tokenizer(), artifact.digest.hex()
        registry = CollectorRegistry()
        self.metrics = TrunkMetrics(registry, clusters=model.n_clusters)
        self.pool = ClusterPool(
            artifact, settings.dtype, settings.cluster_pool(), self.metrics.observe_call, secret, kernel_name()
        )
        trunk = Trunk(artifact, self.pool, settings.dtype, settings.length or model.context)
        self.engine = Engine(trunk, tokenizer, settings.engine())
        trim()
        self.server = RequestServer(request_identity(digest, kernel_name()), secret)
        self.engine_thread = EngineThread(self.engine, self.server.deliver)
        host = bind_host(settings.host)
        await self.server.start((host, 0), self.engine_thread)
        self._rates = [_Rate() for _ in clusters]
        self._endpoint = Endpoint(start_metrics(host, registry), (host, self.server.port), digest)
        self._clusters = ClusterDiscovery(clusters, digest, self.pool.update)
        self._discovery = Discovery(self._poll)

    async def _poll(self) -> bool:
        await self._clusters.poll()
        engine, pool = self.engine, self.pool
        self.metrics.update(
            running=engine.running, waiting=engine.waiting, kv_usage=1 - engine.cache.free / engine.cache.capacity,
            rows=dict(pool.rows), remote_rows=dict(pool.remote_rows), residency=pool.residency.stats(),
            connected={c: pool.connections.count(c) for c in pool.sizes},
        )  # fmt: skip
        return True

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return `remote_c`, the rows per second of cluster c that replicas serve, and `bytes_c` of a replica."""
        remote = {f"remote_{c}": rate(self.pool.remote_rows[c]) for c, rate in enumerate(self._rates)}
        return remote | {f"bytes_{c}": size for c, size in self.pool.sizes.items()}

    def check_health(self) -> None:
        if self.engine_thread.failed is not None:
            raise RuntimeError(f"the engine has failed: {self.engine_thread.failed}")
        if not self.engine_thread.idle and time.monotonic() - self.engine_thread.stepped > STUCK_S:
            raise RuntimeError(f"the engine has been in one step for more than {STUCK_S:g} s")
        self._discovery.check()

    async def __del__(self) -> None:
        """Complete the active requests, for at most `drain_s`. Serve calls this before it ends the replica."""
        deadline = time.monotonic() + self.settings.drain_s
        while not self.engine_thread.idle and self.engine_thread.failed is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._discovery.close()
        await self.server.close()
        self.engine_thread.close()
        self.pool.close()


class Api:
    """The HTTP server. Owns the requests, runs them on trunks, and maintains the scrape targets."""

    async def __init__(
        self,
        settings: ServeSettings,
        api: ApiSettings,
        folder: str,
        secret: bytes,
        trunk: DeploymentHandle,
        clusters: Sequence[DeploymentHandle],
    ) -> None:
        artifact = Artifact.open(Path(folder), verify="on_read")
        self.digest = artifact.digest.hex()
        self.name = settings.name or Path(folder).name
        self.created = int(artifact.folder.stat().st_mtime)
        self.tokenizer = artifact.tokenizer()
        self.length = settings.length or artifact.model.context
        self.chat_template = artifact.chat_template()
        registry = CollectorRegistry()
        self.metrics = ApiMetrics(registry, model=self.name)
        self.trunks = TrunkPool(
            self.digest, wait_timeout_s=settings.wait_timeout_s, resumed=self.metrics.resumes.inc, secret=secret
        )
        self._settings = api
        self._endpoint = Endpoint(start_metrics(bind_host(settings.host), registry))
        context = serve.get_replica_context()
        apis = serve.get_deployment_handle(context.deployment, context.app_name)
        self._trunk = trunk
        self._targets = ScrapeTargets(settings.root, context.app_name, [apis, trunk, *clusters])
        self._polls = itertools.count()
        self._discovery = Discovery(self._poll)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self, self._settings, self.metrics)

    async def _poll(self) -> bool:
        found = await endpoints(self._trunk)
        if found is not None:
            await self.trunks.update(addresses(found, self.digest))
        if next(self._polls) % TARGETS_EVERY == 0:
            await self._targets.write()
        return self.trunks.ready

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def check_health(self) -> None:
        self._discovery.check()

    async def __del__(self) -> None:
        self._discovery.close()
        self._targets.remove()

    def ready(self) -> bool:
        return self.trunks.ready

    async def generate(self, request: Request) -> AsyncGenerator[Increment, None]:
        try:
            async with aclosing(self.trunks.generate(request)) as increments:
                async for increment in increments:
                    yield increment
        except NoTrunkAvailable as error:
            raise Unavailable(str(error)) from None
