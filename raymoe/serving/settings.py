"""Settings of an application: the `args` of a Serve config, validated before anything starts."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raymoe.config import check_field, default_root, hint
from raymoe.serving.cluster_pool import ClusterPoolSettings
from raymoe.serving.engine.engine import EngineSettings
from raymoe.storage.run_folder import NEWEST, find_artifact

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL = "all"


@dataclass(frozen=True)
class ServeSettings:
    """Raises ValueError with the field, its value and the allowed values."""

    artifact: str = NEWEST
    """Name of a run with an export, folder of an artifact, or `newest`: the export with the latest manifest."""
    root: str = dataclasses.field(default_factory=default_root)
    """Folder of runs and exports, the same on every node."""
    name: str = ""
    """Model name in the API. Empty: the name of the artifact's folder."""
    precision: str = "float32"
    """Compute type: float32 or bfloat16."""
    threads: int = 1
    """Compute threads of each replica."""
    length: int = 0
    """Maximum tokens of a prompt and its completion together. 0: the context length of the training."""
    apis: int = 1
    """Replicas of the api."""
    trunks: int = 1
    """Replicas of the trunk."""
    min_replicas: int = 0
    """Minimum replicas of each cluster; between both limits they follow the cluster's load."""
    max_replicas: int = 4
    """Maximum replicas of each cluster."""
    resident_bytes: int | str = ALL
    """Bytes of cluster weights that each trunk keeps in its own process: `all`, 0, or a number."""
    split_rows: int = ClusterPoolSettings.split_rows
    """Rows above which a call is split over the replicas of its cluster."""
    call_timeout_s: float = ClusterPoolSettings.call_timeout_s
    """Seconds after which a call to a replica is retried elsewhere."""
    kv_bytes: int = EngineSettings.kv_bytes
    """Bytes of each trunk's KV cache."""
    max_running: int = EngineSettings.max_running
    """Maximum requests in each trunk's batch."""
    max_queued: int = EngineSettings.max_queued
    """Maximum requests in each trunk's queue."""
    step_tokens: int = EngineSettings.step_tokens
    """Maximum tokens of all requests in one step of a trunk."""
    wait_timeout_s: float = 60.0
    """Seconds that a request waits for a trunk while no trunk runs."""
    drain_s: float = 60.0
    """Seconds that an ending trunk or api has to complete its requests."""
    host: str = "127.0.0.1"
    """Address on which replicas listen for each other and for Prometheus. `node`: that of their node, which an
    application on several nodes needs."""
    cpus: float = 0
    """Ray CPUs that each trunk and each cluster replica reserves."""
    allow_unauthenticated: bool = False
    """Allow clients on other machines without RAYMOE_API_KEY. Without it an application with `http_options.host` other
    than loopback and without a key is refused."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        for name, kind in typing.get_type_hints(ServeSettings).items():
            kinds = typing.get_args(kind) or ((int, float) if kind is float else (kind,))
            require(name, "expected " + " or ".join(k.__name__ for k in kinds), type(getattr(self, name)) in kinds)
        require("precision", " or ".join(PRECISIONS), self.precision in PRECISIONS)
        for name in ("threads", "apis", "trunks", "max_replicas"):
            require(name, "at least 1", getattr(self, name) >= 1)
        for name in ("length", "min_replicas", "wait_timeout_s", "drain_s", "cpus"):
            require(name, "0 or more", getattr(self, name) >= 0)
        require("max_replicas", f"at least min_replicas={self.min_replicas}", self.max_replicas >= self.min_replicas)
        require("resident_bytes", "all, or bytes", self.resident_bytes == ALL or type(self.resident_bytes) is int)
        self.engine()
        self.cluster_pool()

    def engine(self) -> EngineSettings:
        return EngineSettings(
            kv_bytes=self.kv_bytes,
            max_running=self.max_running,
            max_queued=self.max_queued,
            step_tokens=self.step_tokens,
        )

    def cluster_pool(self) -> ClusterPoolSettings:
        resident = None if isinstance(self.resident_bytes, str) else self.resident_bytes
        return ClusterPoolSettings(resident, self.split_rows, self.call_timeout_s)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def folder(self) -> Path:
        """Return the artifact's folder. Raises FileNotFoundError."""
        return find_artifact(self.root, self.artifact)


def from_dict(args: dict[str, Any]) -> ServeSettings:
    """Return the settings. Raises ValueError for an unknown key, a wrong type or a value out of range."""
    known = [field.name for field in dataclasses.fields(ServeSettings)]
    for key in args:
        if key not in known:
            raise ValueError(f"args has an unknown key {key!r}" + hint(key, known))
    return ServeSettings(**args)
