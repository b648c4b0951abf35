"""Clients of the clusterer: a worker sends statistics and polls for decisions without blocking a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import PendingCallsLimitExceeded, RayError

from raymoe.clustering.plan import RemapPlan
from raymoe.storage.run_folder import read_records
from raymoe.training.regroup.clusterer import Clusterer, ClustererStatus, Message, PlanMade

NAMESPACE = "raymoe"


class ClustererClient(Protocol):
    """A worker's connection to the clusterer. No method raises. `attempt` is the number of the worker group."""

    lost: int
    """Number of messages that did not arrive."""

    def ready(self) -> bool:
        """Return whether the last message arrived. Until then, statistics merge into the next message."""
        ...

    def send(self, message: Message) -> None:
        """Send a message without waiting for its arrival."""
        ...

    def poll(self, attempt: int) -> ClustererStatus | None:
        """Return the clusterer's status if one is available, without blocking."""
        ...

    def flush(self) -> None:
        """Wait until the last message arrived or is lost."""
        ...

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        """Wait for the clusterer's status. Returns None if the clusterer is not reachable."""
        ...


class DirectClient:
    """Calls a clusterer in this process, for a run of one worker."""

    def __init__(self, clusterer: Clusterer) -> None:
        self.clusterer, self.lost = clusterer, 0

    def ready(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        self.clusterer.observe(message)

    def poll(self, attempt: int) -> ClustererStatus | None:
        return self.clusterer.poll(attempt)

    def flush(self) -> None:
        """Return at once: `send` is synchronous."""

    wait_for_status = poll


class ReplayClient:
    """Returns the applied plans of a recorded run; there is no clusterer."""

    def __init__(self, path: Path) -> None:
        """Read `plans.jsonl` of a run. Raises FileNotFoundError, or ValueError for another kind of file."""
        self.lost, self._plans = 0, read_applied_plans(path)

    def ready(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        """Drop the message."""

    def poll(self, attempt: int) -> ClustererStatus | None:
        """Return all plans with the first poll. The worker applies each at its step."""
        decisions = tuple(PlanMade(plan, 0.0, None) for plan in self._plans)
        self._plans = []
        return ClustererStatus(0, -1, decisions, 0) if decisions else None

    def flush(self) -> None:
        """Return at once: no message is sent."""

    wait_for_status = poll


def read_applied_plans(path: Path) -> list[RemapPlan]:
    """Return the applied plans in `plans.jsonl` of a run, in order. An empty file has none.

    Damaged lines are skipped. Raises FileNotFoundError, or ValueError for a file without records of plans or with
    a malformed plan.
    """
    if not path.is_file():
        raise FileNotFoundError(f"regroup.replay={path}: no such file; name the plans.jsonl of a run")
    records = [record for record in read_records(path) if record.get("kind") == "plan"]
    if not records and path.read_bytes().strip():
        raise ValueError(f"regroup.replay={path}: the file has no records of plans; name the plans.jsonl of a run")
    applied = [record for record in records if record.get("name") == "applied"]
    try:
        return [RemapPlan.from_dict(record.get("plan")) for record in applied]
    except ValueError as error:
        raise ValueError(f"regroup.replay={path}: malformed plan ({error}); name the plans.jsonl of a run") from None


class ActorClient:
    """Calls the clusterer as a named Ray actor. Failures of the actor stop regrouping, never training."""

    def __init__(self, name: str) -> None:
        self.lost, self._name = 0, name
        self._actor: Any = None
        self._sent: Any = None
        """Future of the last message, until it arrived."""
        self._polled: Any = None
        """Future of the current poll."""

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the actor. Returns the future, or None if the actor is not reachable."""
        try:
            self._actor = self._actor or ray.get_actor(self._name, NAMESPACE)
            return getattr(self._actor, method).remote(*arguments)
        except (ValueError, RayError, PendingCallsLimitExceeded):
            return None

    @staticmethod
    def _get(future: Any) -> Any:
        try:
            return ray.get(future)
        except Exception:  # of Ray or of the clusterer
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
            except Exception:  # of Ray or of the clusterer
                self.lost += 1
            self._sent = None

    def poll(self, attempt: int) -> ClustererStatus | None:
        if self._polled is None:
            self._polled = self._call("poll", attempt)
        if self._polled is None or not ray.wait([self._polled], timeout=0)[0]:
            return None
        polled, self._polled = self._polled, None
        return self._get(polled)

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        polled = self._polled or self._call("poll", attempt)
        self._polled = None
        return None if polled is None else self._get(polled)


def start_clusterer(config: dict[str, Any], name: str) -> Any:
    """Start the clusterer as an actor with unlimited restarts; return its handle. The driver ends it."""
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_pending_calls": 64}
    return ray.remote(Clusterer).options(name=name, namespace=NAMESPACE, **options).remote(config)
