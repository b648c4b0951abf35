"""Train the demo's four models on the same tokens with two seeds each, one thread for each run.

    python -m raymoe.commands.demo_compare FOLDER STEPS

All four start from the preset `tiny`, with the same data order, learning rate and balancing (selection biases, no
auxiliary loss). The results are in `results_file(FOLDER)`, which is written after each run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from raymoe.commands.runs.definition import Experiment, Variant
from raymoe.config import override, preset

SEEDS = (0, 1)
VARIANTS = {
    "clustered": Variant("clustered"),
    "flat": Variant(
        "flat",
        (
            "model.experts=flat", "model.n_experts=16", "model.experts_per_token=2", "model.gate=softmax",
            "model.router_std=0.088",
        ),
    ),
    "flat_same_size": Variant(
        "flat, same size",
        (
            "model.experts=flat", "model.d_expert=64", "model.n_experts=22", "model.experts_per_token=8",
            "model.gate=softmax",
        ),
    ),
    "paper": Variant(
        "paper's form",
        (
            "model.expert_kind=residual", "model.gate=softmax", "model.n_experts=16", "model.n_clusters=4",
            "model.experts_per_token=2", "model.residual_width=8",
        ),
    ),
}  # fmt: skip
"""`clustered` is the preset: private experts. `flat` has 16 coarse experts, top 2, and the initial routers that are best
for it. `flat_same_size` has the experts of
`clustered` without clusters: its parameters, and the active width of `flat`. `paper` has bases and residuals, with
the parameters of `clustered`."""


def comparison(folder: Path, steps: int) -> Experiment:
    """Return the experiment: no regrouping, one validation and one checkpoint at the end."""
    base = [
        f"run.root={folder}", f"data.cache={folder.parent / 'cache'}", f"train.steps={steps}",
        f"checkpoint.every={steps}", f"train.validate_every={steps}", "train.aux_loss=0", "regroup.mode=off",
    ]  # fmt: skip
    return Experiment(
        name="compare", base=override(preset("tiny"), base), base_overrides=tuple(base), variants=VARIANTS, seeds=SEEDS,
        reference="clustered",
    )  # fmt: skip


def results_file(folder: Path) -> Path:
    """Return the path of the results of the comparison in `folder`."""
    from raymoe.commands.runs.stages import RESULTS

    return comparison(folder, 1).folder / RESULTS


def main() -> int:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    from raymoe.commands.runs.stages import Session

    with Session(comparison(folder, steps)) as session:
        stopped_by = session.run()
        session.write()
    print(session.conclusion())
    return 1 if stopped_by or session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
