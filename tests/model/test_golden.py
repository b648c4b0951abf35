"""Losses and loads equal stored values, so that a change of the code changes no routing decision and no result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.config import ModelSection
from raymoe.model.experts import ClusteredExperts
from raymoe.model.loss import linear_cross_entropy
from raymoe.model.observation import Loads, Observation
from raymoe.model.transformer import Transformer
from tests.support.presets import residual_tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "model_losses.json"
"""File written by `python -m tests.model.test_golden`. Regenerate it only for an intended change of the arithmetic."""

CLUSTERED = replace(residual_tiny().model, context=32)
MODELS: dict[str, ModelSection] = {
    "clustered": CLUSTERED,
    "two clusters per token": replace(CLUSTERED, clusters_per_token=2),
    "one expert per token": replace(CLUSTERED, experts_per_token=1),
    "bases alone": replace(CLUSTERED, residual_width=0),
    "ghosts": CLUSTERED,
    "flat": replace(CLUSTERED, experts="flat"),
    "dense": replace(CLUSTERED, experts="dense"),
}
STEPS, BATCH = 4, 4


def moving_experts() -> tuple[list[list[int]], list[dict[int, int]]]:
    """Return an assignment in which experts 0 and 5 of each layer move, and their ghosts."""
    rows = [list(row) for row in CLUSTERED.default_assignment()]
    ghosts = [{0: row[0], 5: row[5]} for row in rows]
    for row in rows:
        row[0], row[5] = row[5], row[0]
    return rows, ghosts


def steps(name: str) -> dict[str, list[Any]]:
    """Return losses and loads of four float64 steps of two grains, with the auxiliary loss and the balancing of both stages."""
    model = MODELS[name]
    assignment, ghosts = moving_experts() if name == "ghosts" else (None, None)
    transformer = Transformer(model, assignment, ghosts=ghosts).double()
    transformer.initialize(3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.vocabulary, (STEPS, BATCH, model.context + 1), generator=generator)
    out: dict[str, list[Any]] = {"losses": [], "clusters": [], "members": []}
    for step in range(STEPS):
        if ghosts:
            for ffn in transformer.ffns_of(ClusteredExperts):
                ffn.set_progress(step / STEPS)
        transformer.zero_grad()
        loss, loads = 0.0, Loads.zeros(model)
        for batch in tokens[step].split(BATCH // 2):
            seen = Observation(model, auxiliary=True)
            hidden = transformer.hidden(batch[:, :-1], seen=seen).flatten(0, 1)
            part = linear_cross_entropy(hidden, transformer.head_weight, batch[:, 1:].flatten())
            ((part + 0.01 * sum(seen.auxiliary)) / (BATCH * model.context)).backward()
            loss += part.item() / (BATCH * model.context)
            loads = loads + seen.loads()
        with torch.no_grad():
            for p in transformer.parameters():
                p -= 0.5 * p.grad if p.grad is not None else 0.0
        for layer, ffn in enumerate(transformer.ffns):
            clusters, members = (
                load[layer] if load.numel() else load for load in (loads.clusters_LC, loads.members_LM)
            )
            ffn.balance(clusters, members, 0.1)
        out["losses"].append(loss)
        out["clusters"].append(loads.clusters_LC.tolist())
        out["members"].append(loads.members_LM.tolist())
    return out


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_loads_equal_the_golden_values(name: str) -> None:
    golden, found = json.loads(GOLDEN.read_text())[name], steps(name)
    assert found["losses"] == pytest.approx(golden["losses"], rel=1e-11)
    assert {k: found[k] for k in ("clusters", "members")} == {k: golden[k] for k in ("clusters", "members")}


def test_an_observation_does_not_change_the_output() -> None:
    transformer = Transformer(CLUSTERED)
    transformer.initialize(0)
    tokens = torch.randint(CLUSTERED.vocabulary, (2, 32))
    seen = Observation(CLUSTERED, auxiliary=True, input_sums=True, sampled_rows=torch.tensor([3, 40]))
    with torch.no_grad():
        assert torch.equal(transformer(tokens), transformer(tokens, seen=seen))
    assert seen.samples_LND.shape == (2, 2, 128) and len(seen.auxiliary) == len(seen.choices_TP) == 2
    with pytest.raises(AssertionError, match="one forward"):
        transformer(tokens, seen=seen)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: steps(name) for name in MODELS}) + "\n")
