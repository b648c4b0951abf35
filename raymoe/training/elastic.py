"""Reactions to Ray Train's controller for a run whose workers come and go.

A resize ends the whole worker group and starts another from the newest checkpoint. Before a resize or a
preemption the driver therefore requests a checkpoint, through a file that the workers read at their next
step. The workers complete it before they continue, so that a resize costs one or two steps.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from raymoe.ops.ray_internals import ControllerCallback, TrainState, refresh_cluster_resources, train_state
from raymoe.storage.run_folder import RunFolder
from raymoe.training.failures import record_failure

RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is noticed within this time
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""Environment variables of Ray Train: seconds instead of minutes. Values that are set already win."""

ELASTIC_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
"""For elastic runs: abandon a worker group that was planned for a lost node."""

CHECKPOINT_TIMEOUT_S = 60.0
"""Seconds that a resize waits for the requested checkpoint. After that it proceeds without one."""


class Elastic(ControllerCallback):
    """Callback in the process of Ray Train's controller, which runs beside the driver."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Request a checkpoint, count a failure, or refresh the resources, by state. Raises nothing.

        Ray Train would count an exception here as a failure of the run.
        """
        state = train_state(current_state)
        with contextlib.suppress(OSError):
            if state is TrainState.RESIZING:
                self.request_checkpoint()
                self.wait_for_checkpoint()
            elif state is TrainState.PREEMPTING:
                self.request_checkpoint()
            elif state is TrainState.RESTARTING:
                self.record_failure(current_state.training_failed_error)
        if state in (TrainState.RESTARTING, TrainState.RESCHEDULING, TrainState.RESIZING):
            refresh_cluster_resources()

    def request_checkpoint(self) -> None:
        """Create the file that makes the workers write a checkpoint at their next step."""
        RunFolder(self.run).checkpoint_request.touch()

    def wait_for_checkpoint(self) -> None:
        """Block until the workers have completed the requested checkpoint, at most CHECKPOINT_TIMEOUT_S."""
        deadline = time.monotonic() + CHECKPOINT_TIMEOUT_S
        while RunFolder(self.run).checkpoint_request.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        RunFolder(self.run).checkpoint_request.unlink(missing_ok=True)

    def record_failure(self, error: Exception) -> None:
        """Count a failure of the worker group and withdraw a pending checkpoint request."""
        RunFolder(self.run).checkpoint_request.unlink(missing_ok=True)
        record_failure(self.run, error)


def release_workers() -> None:
    """Remove the placement groups of this driver. Ray Train's cleaner may miss them after its controller died."""
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
