"""Stored results of seeds, so that an interrupted comparison continues and a finished one is not repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.export.open import StoredModel
from raymoe.finetune.tasks import Task
from raymoe.finetune.train import Outcome, Settings
from raymoe.storage.files import CorruptFile, read_json, write_json
from raymoe.storage.run_folder import finetune_folder

RECIPE = 1
"""Version of the procedure: results of another version are not used. Increase it when a change alters the scores."""


def digest(stored: StoredModel) -> str:
    """Return a hash of a model: the checksums of its weights, its config and its tokenizer."""
    manifest = json.dumps(stored.source.manifest.content, sort_keys=True).encode()
    return hashlib.sha256(manifest + hashlib.sha256(stored.tokenizer.read_bytes()).digest()).hexdigest()


@dataclass(frozen=True)
class SeedResult:
    """Result of one seed as it is stored."""

    seed: int
    outcome: Outcome
    truncated: dict[str, int]
    """Examples longer than the context: `train`, and each dev set by its split (`dev` for the only one)."""
    stored: bool = False
    """Whether an earlier command computed it."""

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **dataclasses.asdict(self.outcome), "truncated": self.truncated}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], task: Task) -> SeedResult:
        """Raises KeyError, TypeError, AttributeError or ValueError for a damaged result."""
        scores = {name: float(content["scores"][name]) for name in task.scores}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError("a score is not finite")
        outcome = Outcome(scores, float(content["train_loss"]), int(content["steps"]), float(content["seconds"]))
        truncated = {str(name): int(count) for name, count in content["truncated"].items()}
        return cls(int(content["seed"]), outcome, truncated, stored=True)


class Results:
    """The results of one model with one kind of initial weights on one task, a file for each seed."""

    def __init__(self, root: str, stored: StoredModel, task: Task, data_fingerprint: str, settings: Settings) -> None:
        self.task = task
        self.conditions = {
            "recipe": RECIPE, "model": digest(stored), "task": task.name, "data": data_fingerprint,
            **dataclasses.asdict(settings),
        }  # fmt: skip
        self.key = hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = finetune_folder(root, task.name, stored.name)

    def path(self, seed: int) -> Path:
        return self.folder / f"{self.key}-seed{seed}.json"

    def read(self, seed: int) -> SeedResult | None:
        """Return a stored result of the same conditions, or None. Raises CorruptFile if it is damaged."""
        path = self.path(seed)
        if not path.exists():
            return None
        content = read_json(path)
        if content.get("conditions") != self.conditions or content.get("seed") != seed:
            raise CorruptFile(path, "is the result of other conditions")
        try:
            return SeedResult.from_dict(content, self.task)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise CorruptFile(path, f"is not a result ({error!r})") from None

    def write(self, result: SeedResult) -> None:
        """Write a result atomically. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(result.seed), {"conditions": self.conditions, **result.to_dict()})
