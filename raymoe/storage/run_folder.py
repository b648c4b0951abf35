"""Paths of runs and exports, and the reader of a run's JSONL records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.config import expand
from raymoe.data.document import CHAT_TEMPLATE_FILE

MANIFEST = "manifest.json"
TARGETS = "prometheus_targets.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration, versions and parameter counts, as JSON."""
        return self.path / "config.json"

    @property
    def config_yaml(self) -> Path:
        """The configuration as YAML, for `raymoe train --config`."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Records of steps, validations and events, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def plans(self) -> Path:
        """Records of regrouping, one JSON object per line."""
        return self.path / "plans.jsonl"

    @property
    def serving(self) -> Path:
        """Records of replica counts while an export of the run was served."""
        return self.path / "serving.jsonl"

    @property
    def comparison(self) -> Path:
        """Table that compares the run with other models, as JSON: `title`, `head`, `rows` and `note`."""
        return self.path / "comparison.json"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer of a run that started from the weights of another model."""
        return self.path / "tokenizer.json"

    @property
    def chat_template(self) -> Path:
        """Chat template of a run that was trained on conversations."""
        return self.path / CHAT_TEMPLATE_FILE

    @property
    def checkpoints(self) -> Path:
        """Folder with one folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The run on one page."""
        return self.path / "report.html"

    @property
    def outcome(self) -> Path:
        """Outcome of the last process of an experiment's run, as JSON: `step`, `stopped` and `peak_rss_mb`."""
        return self.path / "outcome.json"

    @property
    def log(self) -> Path:
        """Output and errors of an experiment's run."""
        return self.path / "log.txt"

    @property
    def targets(self) -> Path:
        """Scrape targets for Prometheus' file-based discovery."""
        return self.path / TARGETS

    @property
    def failures(self) -> Path:
        """Count of consecutive failures without a newer checkpoint."""
        return self.path / "failures.json"

    @property
    def attempt(self) -> Path:
        """Number of the current worker group."""
        return self.path / "attempt"

    @property
    def checkpoint_request(self) -> Path:
        """Exists while the driver waits for a checkpoint; the workers remove it when that checkpoint is complete."""
        return self.path / "checkpoint_now"

    @property
    def stop_request(self) -> Path:
        """Exists when the workers must write a checkpoint at the next step and leave."""
        return self.path / "stop"

    @property
    def driver_nonce(self) -> Path:
        """Random text of the present driver. A worker that cannot read it does not share the folder."""
        return self.path / "driver_nonce"

    @property
    def ray_storage(self) -> Path:
        """Files of Ray Train, removed when the run ends."""
        return self.path / "ray"

    @property
    def lock(self) -> Path:
        """Lock file of the process that owns the run; beside the folder, which may not exist yet."""
        return self.path.with_name(f".{self.path.name}.lock")


RENAMED = {
    "checkpoint passed over": "checkpoint_skipped",
    "began anew": "restarted",
    "skipped": "step_skipped",
    "slow worker": "straggler",
    "checkpoint": "checkpoint_completed",
    "checkpoint failed": "checkpoint_failed",
    "copy failed": "copy_failed",
    "none": "no_plan",
    "seen": "gain_measured",
    "clusterer restarted": "clusterer_restarted",
    "overlap over": "overlap_ended",
}
"""Event names in records of version 0.1 (field `what`), and their present names (field `name`)."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file in order; an empty list if the file does not exist.

    Damaged lines, and records without an integer `step`, are skipped.
    """
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(errors="replace").split("\n"):
        record = parse_record(line)
        if record is not None:
            yield record


def parse_record(line: str) -> dict[str, Any] | None:
    """Parse one line of a JSONL file. Returns None for a damaged line or a record without an integer `step`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    if "what" in record and "name" not in record:
        old = record.pop("what")
        record["name"] = RENAMED.get(old, old) if isinstance(old, str) else str(old)
    return record


def run_folder(root: str, name: str) -> Path:
    """Return the folder of the run `name`."""
    return expand(root).resolve() / name


def artifact_folder(root: str, name: str) -> Path:
    """Return the folder of the export of run `name`."""
    return expand(root).resolve() / "exports" / name


def find_model(root: str, name: str) -> tuple[Path, bool]:
    """Return the folder of a stored model, and whether it is an artifact.

    `name` is the folder of an artifact, else a run, else the export of a run that was removed. Reads no weights.
    Raises FileNotFoundError.
    """
    folder, export, run = expand(name), artifact_folder(root, name), RunFolder(run_folder(root, name))
    if (folder / MANIFEST).is_file():
        return folder.resolve(), True
    if not run.path.is_dir() and (export / MANIFEST).is_file():
        return export, True
    if not run.config.is_file():
        raise FileNotFoundError(f"there is no run {name!r}: {run.config} does not exist (run.root={root})")
    return run.path, False


def serving_targets(root: str, application: str) -> Path:
    """Return the scrape targets file of a Serve application, in the folder of its name."""
    return expand(root) / "serving" / application / TARGETS


def finetune_folder(root: str, task: str, name: str) -> Path:
    """Return the folder of the fine-tuning results of a run or an artifact on a task."""
    return expand(root).resolve() / "finetune" / task / name


NEWEST = "newest"
"""Name of the export that was written last."""


def find_artifact(root: str, name: str) -> Path:
    """Return the folder of an artifact. `name` is its folder, the name of an exported run, or `newest`.

    Raises FileNotFoundError.
    """
    if name == NEWEST:
        exports = artifact_folder(root, "")
        found = sorted(exports.glob(f"[!.]*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"no export under {exports}: create one with `raymoe export NAME`")
        return found[-1].parent
    for folder in (expand(name), artifact_folder(root, name)):
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    raise FileNotFoundError(f"artifact={name!r}: neither a folder with a {MANIFEST} nor an export under {root}")
