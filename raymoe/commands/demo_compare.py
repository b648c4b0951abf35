"""Train the demo's four models on the same tokens, one process and one thread for each seed.

    python -m raymoe.commands.demo_compare FOLDER SEED STEPS

All four use the preset `tiny`, the same data order, learning rate and balancing (selection biases, no auxiliary
loss). Writes `compare-SEED.jsonl` into FOLDER: one record per model when it is trained.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.config import Config, override, preset


@dataclass(frozen=True)
class Variant:
    """One model of the comparison: its label in the table and its changes to the preset `tiny`."""

    label: str
    overrides: tuple[str, ...]


VARIANTS = {
    "clustered": Variant("clustered", ()),
    "flat": Variant("flat", ("model.experts=flat",)),
    "flat_same_size": Variant(
        "flat, same size",
        ("model.experts=flat", "model.d_expert=64", "model.n_experts=22", "model.experts_per_token=8"),
    ),
    "bases_alone": Variant("bases alone", ("model.residual_width=0",)),
}
"""`flat` has the same 16 experts, top 2. `flat_same_size` has 22 experts of a quarter of the width, top 8: the
parameters of `clustered` and the active width of `flat`. `bases_alone` is `clustered` without residuals."""


def config(root: str, name: str, seed: int, steps: int) -> Config:
    """Return the configuration of one model: one worker, no regrouping, one checkpoint at the end."""
    common = [
        f"run.root={root}", f"run.seed={seed}", f"train.steps={steps}", f"checkpoint.every={steps}",
        f"train.validate_every={steps}", "train.workers=1", "train.threads=1", "train.aux_loss=0", "regroup.mode=off",
    ]  # fmt: skip
    return override(preset("tiny"), [*common, *VARIANTS[name].overrides])


def train(root: str, name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one model in this process; return its record. The corpus must be prepared with seed 0."""
    import torch
    from prometheus_client import CollectorRegistry

    from raymoe.data.corpus import Corpus
    from raymoe.data.prepare import prepare
    from raymoe.metrics import TrainingMetrics
    from raymoe.storage.run_folder import RunFolder, read_records
    from raymoe.training.loop import Trainer

    settings = config(root, name, seed, steps)
    corpus = Corpus.open(prepare(override(settings, ["run.seed=0"])))
    folder.mkdir(parents=True)
    metrics = TrainingMetrics(CollectorRegistry(), run=folder.name, worker="0")
    trainer = Trainer(settings, corpus, folder, metrics, torch.device("cpu"))
    trainer.train()
    records = read_records(RunFolder(folder).metrics)
    validation = [r for r in records if r["kind"] == "validation"][-1]
    speeds = sorted(r["tokens_per_s"] for r in records if r["kind"] == "train")
    return {
        "name": name,
        "seed": seed,
        "step": steps,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "perplexity": validation["perplexity"],
        "tokens_per_s": speeds[len(speeds) // 2],
        "load_cv": validation["load_cv"],
    }


def main() -> int:
    folder, seed, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    import torch

    torch.set_num_threads(1)
    with (folder / f"compare-{seed}.jsonl").open("w", buffering=1) as file:
        for name in VARIANTS:
            record = train(str(folder.parent), name, seed, steps, folder / f"{name}-seed{seed}")
            file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
