"""What an application is built from: the `args` of a Serve config, checked before anything starts."""

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
    """Raises ValueError with the field, the value and what is allowed."""

    artifact: str = NEWEST
    """The export of a run, an artifact's folder, or `newest`: the export that was written last."""
    root: str = dataclasses.field(default_factory=default_root)
    """Where exports live, on every node."""
    name: str = ""
    """How clients call the model. Empty: as the artifact's folder is called."""
    precision: str = "float32"
    """Type to compute in: float32 or bfloat16."""
    threads: int = 1
    """Compute threads of each replica."""
    length: int = 0
    """Tokens of a prompt and its answer together, at most. 0: the context of the training."""
    apis: int = 1
    trunks: int = 1
    """Replicas of these deployments; those of the clusters follow their load."""
    min_replicas: int = 0
    max_replicas: int = 4
    """Replicas of each cluster, at least and at most."""
    resident_bytes: int | str = ALL
    """Weights of clusters that each trunk keeps in its own process: `all`, 0, or bytes."""
    split_rows: int = ClusterPoolSettings.split_rows
    call_timeout_s: float = ClusterPoolSettings.call_timeout_s
    kv_bytes: int = EngineSettings.kv_bytes
    max_running: int = EngineSettings.max_running
    max_queued: int = EngineSettings.max_queued
    step_tokens: int = EngineSettings.step_tokens
    """See `ClusterPoolSettings` and `EngineSettings`; of each trunk."""
    wait_timeout_s: float = 60.0
    """A request waits so long for a trunk, should all have died."""
    drain_s: float = 60.0
    """A trunk or an api that is to end has so long to finish its answers."""
    host: str = "127.0.0.1"
    """Address on which replicas answer each other and Prometheus. `node`: that of their node, for several nodes."""
    cpus: float = 0
    """CPUs of Ray's that each trunk and each replica of a cluster takes."""

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
        """Of the artifact. Raises FileNotFoundError when there is none."""
        return find_artifact(self.root, self.artifact)


def from_dict(args: dict[str, Any]) -> ServeSettings:
    """Raises ValueError for a key that is unknown, a value of the wrong type, or one out of range."""
    known = [field.name for field in dataclasses.fields(ServeSettings)]
    for key in args:
        if key not in known:
            raise ValueError(f"args has an unknown key {key!r}" + hint(key, known))
    return ServeSettings(**args)
