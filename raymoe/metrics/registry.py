"""Declaration of the metrics of one process in a registry, and the HTTP endpoint that Prometheus scrapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

M = TypeVar("M", bound=MetricWrapperBase)


class Totals(Collector):
    """A counter family whose values are totals that other code counts.

    A total that decreases is a counter reset, for example after a restart of the process that counts. The functions
    `rate` and `increase` of Prometheus account for resets.
    """

    def __init__(self, name: str, help: str, own: Mapping[str, str], labels: tuple[str, ...]) -> None:
        """own: labels of all series, with their values. labels: names of the labels that `set` gets values for."""
        self._name, self._help, self._labels, self._own = name, help, (*own, *labels), tuple(own.values())
        self._totals: dict[tuple[str, ...], float] = {}

    def set(self, total: Any, *labels: str) -> None:
        """Set the total of a series. Values that are not finite numbers of 0 or more are ignored."""
        number = to_number(total)
        if 0 <= number < math.inf:
            self._totals[(*self._own, *labels)] = number

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, total in list(self._totals.items()):
            family.add_metric(labels, total)
        yield family


class Metrics:
    """The metrics of one process in a registry. All of them carry the labels `own`."""

    def __init__(self, registry: CollectorRegistry, own: Mapping[str, str]) -> None:
        self.registry = registry
        self._own = dict(own)

    def _declare(self, kind: type[M], name: str, help: str, *labels: str, **options: Any) -> M:
        """Return a metric, bound to the labels `own` unless it has more `labels`."""
        names = (*self._own, *labels)
        metric = kind(name, help, names, namespace="raymoe", registry=self.registry, **options)
        return metric if labels or not self._own else metric.labels(**self._own)

    def _declare_totals(self, name: str, help: str, *labels: str) -> Totals:
        """Return a counter family of totals. Without `labels` its one series starts at 0."""
        totals = Totals(f"raymoe_{name}", help, self._own, labels)
        if not labels:
            totals.set(0)
        self.registry.register(totals)
        return totals


def to_number(value: Any) -> float:
    """Return a float, and NaN for null and for everything else that is not a number."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def serve(registry: CollectorRegistry, host: str = "127.0.0.1") -> int:
    """Serve a registry to Prometheus on a free port of `host`, from a daemon thread. Returns the port."""
    server, _ = start_http_server(0, addr=host, registry=registry)
    return server.server_port
