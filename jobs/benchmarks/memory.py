"""Sizes of the paper's form of a preset, and its all-to-all payload: the name `memory` of `jobs/benchmark.py`."""

from __future__ import annotations

from typing import Any

from benchmarks.models import paper_form
from raymoe.config import ModelSection
from raymoe.storage.artifact_layout import sizes


def payload(model: ModelSection, world: int) -> dict[str, float]:
    """Return the bytes that each token sends, x out and y back, over all ranks: analytic, for a balanced load.

    `flat, naive` sends one row per chosen expert; `flat, by rank` sends a token once to each rank that
    owns a chosen expert (with K float32 weights and K indices), as DeepSpeed and Megatron can.
    """
    row = 2 * model.d_model * 2  # x out, y back, bfloat16
    k = model.experts_per_token
    ranks = world * (1 - (1 - 1 / world) ** k)
    return {
        "clustered": model.clusters_per_token * row,
        "flat, naive": k * row,
        "flat, by rank": ranks * row + k * 8,
        "clustered of naive": model.clusters_per_token / k,
        "clustered of by rank": model.clusters_per_token * row / (ranks * row + k * 8),
    }


def memory(name: str) -> dict[str, Any]:
    """Print the sizes of the weights and the all-to-all payload of the paper's form of a preset."""
    model = paper_form(name).model
    table = sizes(model)
    flat, factored, packed = table["flat_float16"], table["clustered_float16"], table["clustered_int4"]
    for label, row in table.items():
        print(
            f"{name}  {label:20}{row['parameters']:>14,} parameters  {row['bytes']:>14,} bytes  of experts {row['expert_bytes']:>14,}"
        )
    fewer = 1 - factored["parameters"] / flat["parameters"]
    smaller = 1 - packed["expert_bytes"] / flat["expert_bytes"]
    print(f"{name}  {fewer:.1%} fewer parameters than flat; {smaller:.1%} fewer expert bytes at rest than flat float16")
    crossing = {str(world): payload(model, world) for world in (2, 4, 8)}
    for world, row in crossing.items():
        print(f"{name}  {world} workers: all-to-all payload per token and layer: {row['clustered']:.0f} bytes, "
              f"{row['clustered of naive']:.2f} of flat top-{model.experts_per_token} naive, {row['clustered of by rank']:.2f} of flat by rank")  # fmt: skip
    return {"sizes": table, "fewer_parameters": fewer, "fewer_expert_bytes": smaller, "payload_bytes": crossing}
