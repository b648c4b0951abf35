"""What Ray Train's controller does for a run whose workers come and go: ask for a checkpoint before it ends
workers that are alive, look at the cluster at once instead of later, and count failures that lead nowhere.

A resize ends the whole worker group and starts another from the newest checkpoint. So one is asked for first, by
a file that the workers see at their next step. They complete it before they go on, and a resize or a node's notice
costs a step or two.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerStateType as State
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from raymoe.storage.checkpoint import newest_step
from raymoe.storage.files import replace_file
from raymoe.storage.run_folder import RunFolder

KNOBS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is seen
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""Of Ray Train, in its environment: seconds instead of minutes. Values that are set already win."""

ELASTIC_KNOBS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}  # a group that was planned for a node that has gone
PATIENCE_S = 60.0
"""How long a resize waits for the checkpoint that it asked for; then it goes on without."""


def dead_end(run: Path, allowed: int) -> str:
    """Why the run must not be tried again, or nothing: more than `allowed` failures in a row at one checkpoint."""
    try:
        found = json.loads(RunFolder(run).failures.read_text())
    except (OSError, ValueError):
        return ""
    if found["in_a_row"] <= allowed:
        return ""
    return f"{found['in_a_row']} failures in a row after the checkpoint of step {found['step']}; the last: {found['error']}"


class Elastic(ControllerCallback):
    """Runs in the controller's process, beside the driver."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """What each change of the controller's state asks for. Nothing here may fail: it would count as a failure."""
        kind = current_state._state_type
        with contextlib.suppress(OSError):
            if kind is State.RESIZING:
                self.ask()
                self.wait()
            elif kind is State.PREEMPTING:
                self.ask()
            elif kind is State.RESTARTING:
                self.count(current_state.training_failed_error)
        if kind in (State.RESTARTING, State.RESCHEDULING, State.RESIZING):
            look_again()

    def ask(self) -> None:
        RunFolder(self.run).checkpoint_request.touch()

    def wait(self) -> None:
        """Until the checkpoint is there."""
        deadline = time.monotonic() + PATIENCE_S
        while RunFolder(self.run).checkpoint_request.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        RunFolder(self.run).checkpoint_request.unlink(missing_ok=True)

    def count(self, error: Exception) -> None:
        """One more failure, in a row with those before it unless there is a newer checkpoint."""
        RunFolder(self.run).checkpoint_request.unlink(missing_ok=True)
        step, before = newest_step(RunFolder(self.run).checkpoints), {}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(RunFolder(self.run).failures.read_text())
        in_a_row = before.get("in_a_row", 0) + 1 if before.get("step") == step else 1
        record = {"in_a_row": in_a_row, "step": step, "error": first_words(error)}
        replace_file(RunFolder(self.run).failures, json.dumps(record))


def first_words(error: Exception) -> str:
    """The lines of an error of Ray Train that say what happened: each worker's last, once."""
    causes = getattr(error, "worker_failures", None) or {0: error}
    lines = dict.fromkeys(str(cause).strip().splitlines()[-1] for cause in causes.values() if str(cause).strip())
    return "; ".join(lines)[:2000] or type(error).__name__


def release_workers() -> None:
    """Give back what this driver's workers hold. Ray Train's own cleaner does not always, once its controller is dead."""
    own = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(own) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def look_again() -> None:
    """Make Ray's coordinator of resources see nodes that came or went: by itself it looks every 20 s."""
    if not ray.is_initialized():  # `get_actor` would start a Ray, or join somebody's
        return
    with contextlib.suppress(Exception):  # it is an actor that need not be there, of a Ray that may be ending
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("raymoe", recompute=True), timeout=2)
