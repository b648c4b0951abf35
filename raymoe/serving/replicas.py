"""The processes of an application: the api, the trunks and the replicas of each cluster.

Plain classes; `app.py` makes them Serve's deployments. Serve starts, checks, scales and ends them, and tells who is
there; what they say to each other goes over connections of their own (`sessions`, `frames`), which begin with the
`secret` of the application.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
import torch
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from raymoe.metrics import ApiMetrics, ClusterMetrics, TrunkMetrics
from raymoe.metrics import serve as serve_metrics
from raymoe.serving.cluster_pool import ClusterPool
from raymoe.serving.engine.cluster import Cluster
from raymoe.serving.engine.engine import Engine
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.thread import EngineThread
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.http.errors import Unavailable
from raymoe.serving.http.server import ApiSettings, create_app
from raymoe.serving.residency import trim
from raymoe.serving.settings import ServeSettings
from raymoe.serving.transport.requests import RequestServer
from raymoe.serving.transport.rows import Address, RowServer
from raymoe.serving.transport.trunk_pool import NoTrunkAvailable, TrunkPool
from raymoe.storage.artifact import Artifact
from raymoe.storage.scrape_targets import write_targets

log = logging.getLogger(__name__)

DISCOVERY_S = 1.0
"""Seconds between looks at who is there."""
STUCK_S = 60.0
"""Seconds after which a step that has not ended never will."""
TARGETS_EVERY = 5
"""Looks from one to the next that also tells Prometheus."""

Endpoint = dict[str, Any]
"""Of a replica: the `target` that Prometheus scrapes; of trunks and clusters `address`, and `digest` of the artifact."""


def _host(settings: ServeSettings) -> str:
    return ray.util.get_node_ip_address() if settings.host == "node" else settings.host


def _target(host: str, registry: CollectorRegistry) -> tuple[str, int, dict[str, str]]:
    """Answer Prometheus; where, and the labels of this replica."""
    context = serve.get_replica_context()
    labels = {
        "application": context.app_name, "deployment": context.deployment, "replica": context.replica_id.unique_id,
    }  # fmt: skip
    return host, serve_metrics(registry, host), labels


async def _endpoints(handle: DeploymentHandle) -> list[Endpoint] | None:
    """Of all running replicas that answer; None when it cannot be known now."""
    try:
        found = await handle.broadcast("endpoint").results_async(timeout_s=2.0, return_exceptions=True)
    except RayServeException:  # there are none
        return []
    except (TimeoutError, RayError):
        return None
    except Exception:  # whatever Serve has come to: who looks again must not end by it
        log.exception("it cannot be known who is there")
        return None
    return [endpoint for endpoint in found if isinstance(endpoint, dict)]


def _addresses(endpoints: Sequence[Endpoint], digest: str) -> list[Address]:
    return [tuple(endpoint["address"]) for endpoint in endpoints if endpoint["digest"] == digest]  # type: ignore[misc]


class _Rate:
    """What grows, per second since it was last asked for."""

    def __init__(self) -> None:
        self._then, self._was = time.monotonic(), 0.0

    def __call__(self, total: float) -> float:
        now = time.monotonic()
        rate = (total - self._was) / max(now - self._then, 1e-3)
        self._then, self._was = now, total
        return rate


class ClusterReplica:
    """One cluster of every layer: rows in, rows out."""

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
        host = _host(settings)
        self._lock = threading.Lock()
        self._busy_s, self._calls = 0.0, 0
        self._busy, self._per_s = _Rate(), _Rate()
        server = RowServer(self._compute, artifact.digest, c, model.d_model, settings.dtype, (host, 0), secret)
        self._server = server
        self._endpoint = {
            "address": (host, server.port), "digest": artifact.digest.hex(), "target": _target(host, registry),
        }  # fmt: skip

    def _compute(self, layer: int, rows: Tensor) -> Tensor:
        if layer >= len(self.layers):
            raise ValueError(f"there is no layer {layer}")
        started = time.perf_counter()
        answers = self.layers[layer](rows)
        seconds = time.perf_counter() - started
        with self._lock:
            self._busy_s += seconds
            self._calls += 1
        self.metrics.rows.inc(rows.shape[0])
        self.metrics.compute_seconds.observe(seconds)
        return answers

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def record_autoscaling_stats(self) -> dict[str, float]:
        """`busy`: share of the time; `latency_s` of a call, as long as it computes."""
        with self._lock:
            busy_s, calls = self._busy_s, self._calls
        busy, calls_per_s = self._busy(busy_s), self._per_s(calls)
        return {"busy": busy, "latency_s": busy / calls_per_s if calls_per_s else 0.0}

    def __del__(self) -> None:
        if server := getattr(self, "_server", None):
            server.close()


class TrunkReplica:
    """An engine over the clusters that are resident, or at replicas."""

    async def __init__(
        self, settings: ServeSettings, folder: str, secret: bytes, clusters: Sequence[DeploymentHandle]
    ) -> None:
        torch.set_num_threads(settings.threads)
        self.settings, self.clusters = settings, clusters
        artifact = Artifact.open(Path(folder))
        model, tokenizer = artifact.model, artifact.tokenizer()
        registry = CollectorRegistry()
        self.metrics = TrunkMetrics(registry, clusters=model.n_clusters)
        self.digest = artifact.digest.hex()
        self.pool = ClusterPool(artifact, settings.dtype, settings.cluster_pool(), self.metrics.observe_call, secret)
        trunk = Trunk(artifact, self.pool, settings.dtype, settings.length or model.context)
        self.engine = Engine(trunk, tokenizer, settings.engine())
        trim()
        self.server = RequestServer(self.digest, secret)
        self.engine_thread = EngineThread(self.engine, self.server.deliver)
        host = _host(settings)
        await self.server.start((host, 0), self.engine_thread)
        self._rates = [_Rate() for _ in clusters]
        self._endpoint = {
            "address": (host, self.server.port), "digest": self.digest, "target": _target(host, registry),
        }  # fmt: skip
        self._discovery = asyncio.create_task(self._discover())

    async def _discover(self) -> None:
        known: dict[int, list[Address]] = {}
        while True:
            found = await asyncio.gather(*map(_endpoints, self.clusters))
            for c, endpoints in enumerate(found):
                if endpoints is not None:
                    known[c] = _addresses(endpoints, self.digest)
            await asyncio.to_thread(self.pool.update, known)
            self._show()
            await asyncio.sleep(DISCOVERY_S)

    def _show(self) -> None:
        engine, pool = self.engine, self.pool
        self.metrics.update(
            running=engine.running, waiting=engine.waiting, kv_usage=1 - engine.cache.free / engine.cache.capacity,
            rows=dict(pool.rows), remote_rows=dict(pool.remote_rows), residency=pool.residency.stats(),
            connected={c: pool.replicas.count(c) for c in pool.sizes},
        )  # fmt: skip

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For each cluster c: `remote_c`, its rows per second that replicas are wanted for; `bytes_c` of a replica."""
        away = {f"remote_{c}": rate(self.pool.remote_rows[c]) for c, rate in enumerate(self._rates)}
        return away | {f"bytes_{c}": size for c, size in self.pool.sizes.items()}

    def check_health(self) -> None:
        if self.engine_thread.failed is not None:
            raise RuntimeError(f"the engine ended: {self.engine_thread.failed}")
        if not self.engine_thread.idle and time.monotonic() - self.engine_thread.stepped > STUCK_S:
            raise RuntimeError(f"the engine has been in one step for more than {STUCK_S:g} s")
        if self._discovery.done():
            raise RuntimeError("nobody looks for replicas any more")

    async def __del__(self) -> None:
        """Serve ends this replica: answers that have begun are finished first."""
        deadline = time.monotonic() + self.settings.drain_s
        while not self.engine_thread.idle and self.engine_thread.failed is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._discovery.cancel()
        await self.server.close()
        self.engine_thread.close()
        self.pool.close()


class Api:
    """The HTTP server: owns requests, asks the trunks, and keeps Prometheus's list of what to scrape."""

    async def __init__(
        self,
        settings: ServeSettings,
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
        template = artifact.folder / "chat_template.jinja"
        self.chat_template = template.read_text() if template.is_file() else None
        registry = CollectorRegistry()
        self.metrics = ApiMetrics(registry, model=self.name)
        self.trunks = TrunkPool(
            self.digest, wait_timeout_s=settings.wait_timeout_s, resumed=self.metrics.resumes.inc, secret=secret
        )
        self._endpoint = {"target": _target(_host(settings), registry)}
        context = serve.get_replica_context()
        self._apis = serve.get_deployment_handle(context.deployment, context.app_name)
        self._trunks, self._clusters = trunk, clusters
        self._targets = Path(settings.root).expanduser() / "serving" / context.app_name / "prometheus_targets.json"
        self._discovery = asyncio.create_task(self._discover())

    def __serve_build_asgi_app__(self) -> Any:
        settings = ApiSettings(api_key=os.environ.get("RAYMOE_API_KEY") or None, send_request_ids=False)
        return create_app(self, settings, self.metrics)

    async def _discover(self) -> None:
        for look in itertools.count():
            endpoints = await _endpoints(self._trunks)
            if endpoints is not None:
                await self.trunks.update(_addresses(endpoints, self.digest))
            if look % TARGETS_EVERY == 0:
                await self._tell_prometheus()
            await asyncio.sleep(DISCOVERY_S if self.trunks.ready else 0.25)

    async def _tell_prometheus(self) -> None:
        """Write all replicas down, unless one deployment's cannot be known now."""
        found = await asyncio.gather(*map(_endpoints, (self._apis, self._trunks, *self._clusters)))
        if None in found:
            return
        targets = [endpoint["target"] for endpoints in found for endpoint in endpoints or []]
        try:
            self._targets.parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(write_targets, self._targets, targets)
        except OSError as error:
            log.warning("Prometheus's targets could not be written: %s", error)

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def check_health(self) -> None:
        if self._discovery.done():
            raise RuntimeError("nobody looks for trunks any more")

    async def __del__(self) -> None:
        self._discovery.cancel()
        self._targets.unlink(missing_ok=True)

    def ready(self) -> bool:
        return self.trunks.ready

    async def generate(self, request: Request) -> AsyncGenerator[Increment, None]:
        try:
            async with aclosing(self.trunks.generate(request)) as answer:
                async for increment in answer:
                    yield increment
        except NoTrunkAvailable as error:
            raise Unavailable(str(error)) from None
