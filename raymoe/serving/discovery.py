"""Replica discovery: how the processes of an application find each other's addresses, and Prometheus finds them all.

Every replica has the method `endpoint`. Serve's handles broadcast it to all running replicas of a deployment; a trunk
and an api poll the deployments that they use. A `Discovery` runs such a poll at an interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from raymoe.metrics import serve as serve_metrics
from raymoe.serving.transport.handshake import Address
from raymoe.storage.run_folder import serving_targets
from raymoe.storage.scrape_targets import write_targets

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Seconds between polls."""
POLL_INCOMPLETE_S = 0.25
"""Seconds between polls of a replica that has not found what it needs."""
TARGETS_EVERY = 5
"""Polls of an api between two updates of the scrape targets."""
BROADCAST_TIMEOUT_S = 2.0

ScrapeTarget = tuple[str, int, Mapping[str, str]]
"""Host, port and labels of a process that serves metrics."""


@dataclass(frozen=True)
class Endpoint:
    """Where a replica serves."""

    target: ScrapeTarget
    address: Address | None = None
    """Of its row transport or request streams. None: an api."""
    digest: str = ""
    """Of the artifact that it serves."""


def bind_host(host: str) -> str:
    """Return the address to bind for the setting `host`: "node" is the address of this node."""
    return ray.util.get_node_ip_address() if host == "node" else host


def start_metrics(host: str, registry: CollectorRegistry) -> ScrapeTarget:
    """Serve this replica's metrics on a free port of `host`."""
    context = serve.get_replica_context()
    labels = {
        "application": context.app_name, "deployment": context.deployment, "replica": context.replica_id.unique_id,
    }  # fmt: skip
    return host, serve_metrics(registry, host), labels


async def endpoints(handle: DeploymentHandle) -> list[Endpoint] | None:
    """Return the endpoints of all running replicas that reply; None when Serve cannot list them now."""
    try:
        found = await handle.broadcast("endpoint").results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
    except RayServeException:  # the deployment has no replica
        return []
    except (TimeoutError, RayError):
        return None
    except Exception:  # Serve's failures must not end the discovery
        log.exception("replicas could not be listed; trying again")
        return None
    return [endpoint for endpoint in found if isinstance(endpoint, Endpoint)]


def addresses(found: Sequence[Endpoint], digest: str) -> list[Address]:
    """Return the addresses of the replicas of an artifact."""
    return [endpoint.address for endpoint in found if endpoint.address and endpoint.digest == digest]


class Discovery:
    """A task that calls `poll` at an interval. `poll` returns whether it found what the replica needs."""

    def __init__(self, poll: Callable[[], Awaitable[bool]]) -> None:
        self._task = asyncio.create_task(self._run(poll))

    async def _run(self, poll: Callable[[], Awaitable[bool]]) -> None:
        while True:
            complete = await poll()
            await asyncio.sleep(POLL_S if complete else POLL_INCOMPLETE_S)

    def check(self) -> None:
        """Raises RuntimeError when the task has ended."""
        if self._task.done():
            cause = None if self._task.cancelled() else self._task.exception()
            raise RuntimeError("replica discovery has stopped; Serve restarts this replica") from cause

    def close(self) -> None:
        self._task.cancel()


class ClusterDiscovery:
    """The poll of a trunk: the replicas of each cluster. `update` receives their addresses."""

    def __init__(
        self,
        clusters: Sequence[DeploymentHandle],
        digest: str,
        update: Callable[[Mapping[int, Sequence[Address]]], None],
    ) -> None:
        self._clusters, self._digest, self._update = clusters, digest, update
        self._known: dict[int, list[Address]] = {}

    async def poll(self) -> None:
        """Send the addresses to `update`. A cluster that Serve cannot list now keeps its addresses."""
        for c, found in enumerate(await asyncio.gather(*map(endpoints, self._clusters))):
            if found is not None:
                self._known[c] = addresses(found, self._digest)
        await asyncio.to_thread(self._update, dict(self._known))


class ScrapeTargets:
    """The file of one application for Prometheus' discovery: every replica of the given deployments."""

    def __init__(self, root: str, application: str, deployments: Sequence[DeploymentHandle]) -> None:
        self.path = serving_targets(root, application)
        self._deployments = deployments

    async def write(self) -> None:
        """Write the file, unless Serve cannot list a deployment now."""
        found = await asyncio.gather(*map(endpoints, self._deployments))
        if None in found:
            return
        targets = [endpoint.target for of_one in found for endpoint in of_one or []]
        try:
            await asyncio.to_thread(self._replace, targets)
        except OSError as error:
            log.warning("the scrape targets could not be written: %s", error)

    def _replace(self, targets: Sequence[ScrapeTarget]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_targets(self.path, targets)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
