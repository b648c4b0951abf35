"""How a worker reaches the clusterer: sending and asking without ever waiting, unless told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import PendingCallsLimitExceeded, RayError

from raymoe.training.regroup.clusterer import Clusterer, ClustererStatus, Message

NAMESPACE = "raymoe"


class ClustererClient(Protocol):
    """Nothing here raises. `attempt` is the start of the worker group that asks."""

    lost: int
    """Messages that did not arrive."""

    def ready(self) -> bool:
        """Whether the last message was taken; while it was not, statistics wait and merge."""
        ...

    def send(self, message: Message) -> None:
        """Send and forget."""
        ...

    def poll(self, attempt: int) -> ClustererStatus | None:
        """The clusterer's next answer, if there is one."""
        ...

    def flush(self) -> None:
        """Wait until the last message was taken."""
        ...

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        """Wait for an answer; None from a clusterer that is not there."""
        ...


class DirectClient:
    """A clusterer in this process, for one worker."""

    def __init__(self, clusterer: Clusterer) -> None:
        self.clusterer, self.lost = clusterer, 0

    def ready(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        self.clusterer.observe(message)

    def poll(self, attempt: int) -> ClustererStatus | None:
        return self.clusterer.poll(attempt)

    def flush(self) -> None:
        """Nothing is ever in flight."""

    wait_for_status = poll


class ReplayClient:
    """The applied plans of a recorded run, one after the other."""

    def __init__(self, plans: Path) -> None:
        """Raises FileNotFoundError, or ValueError for a file that is not a run's plans."""
        self.lost, self._plans = 0, []
        if not plans.is_file():
            raise FileNotFoundError(f"regroup.replay={plans}: there is no such file; name the plans.jsonl of a run")
        for n, line in enumerate(plans.read_bytes().splitlines(), 1):
            try:
                record = json.loads(line)
                if record["kind"] == "plan" and record["name"] == "applied":
                    self._plans.append(record["plan"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"regroup.replay={plans}: line {n} is not a record of plans") from None

    def ready(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        """Nobody listens."""

    def poll(self, attempt: int) -> ClustererStatus | None:
        """All plans at once: each is applied when its step has come."""
        decisions: tuple[dict[str, Any], ...] = tuple({"kind": "plan", "plan": plan} for plan in self._plans)
        self._plans = []
        return ClustererStatus(0, -1, decisions, 0) if decisions else None

    def flush(self) -> None:
        """Nothing is ever in flight."""

    wait_for_status = poll


class ActorClient:
    """The clusterer as a named Ray actor. What it does or fails to do costs regrouping only."""

    def __init__(self, name: str) -> None:
        self.lost, self._name = 0, name
        self._actor: Any = None
        self._sent: Any = None
        self._asked: Any = None

    def _call(self, method: str, *arguments: Any) -> Any:
        """A call's future, or None where there is nobody to call."""
        try:
            self._actor = self._actor or ray.get_actor(self._name, NAMESPACE)
            return getattr(self._actor, method).remote(*arguments)
        except (ValueError, RayError, PendingCallsLimitExceeded):
            return None

    @staticmethod
    def _get(future: Any) -> Any:
        try:
            return ray.get(future)
        except Exception:  # of Ray, or whatever the clusterer raised
            return None

    def ready(self) -> bool:
        if self._sent is None:
            return True
        if not ray.wait([self._sent], timeout=0)[0]:
            return False
        self.flush()
        return True

    def send(self, message: Message) -> None:
        self._sent = self._call("observe", message)
        self.lost += self._sent is None

    def flush(self) -> None:
        if self._sent is not None:
            try:
                ray.get(self._sent)
            except Exception:
                self.lost += 1
            self._sent = None

    def poll(self, attempt: int) -> ClustererStatus | None:
        if self._asked is None:
            self._asked = self._call("poll", attempt)
        if self._asked is None or not ray.wait([self._asked], timeout=0)[0]:
            return None
        asked, self._asked = self._asked, None
        return self._get(asked)

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        asked = self._asked or self._call("poll", attempt)
        self._asked = None
        return None if asked is None else self._get(asked)


def start_clusterer(config: dict[str, Any], name: str) -> Any:
    """Make the clusterer an actor that restarts for ever; returns its handle, with which it ends. Called by the driver."""
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_pending_calls": 64}
    return ray.remote(Clusterer).options(name=name, namespace=NAMESPACE, **options).remote(config)
