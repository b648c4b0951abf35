"""Perplexity over bytes at rest of trained runs, in FP16, INT4 and INT3: the name `stored` of `jobs/benchmark.py`.

All sides are rounded by the same quantizer: groups of 32 values with a FP16 scale and minimum, the ends of each group's
range clipped where that lowers the squared error. `experts` rounds what an artifact stores in INT4 (residuals and
private experts); `all` rounds every matrix of the feed-forward layers. Embedding and attention stay FP16, norms and
routers float32, as in an artifact.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymoe.commands.runs.results import run_result
from raymoe.config import ModelSection
from raymoe.data.corpus import Corpus
from raymoe.export.judge import judge
from raymoe.export.open import StoredModel, open_run
from raymoe.model.leaves import RESIDUALS
from raymoe.model.quantize import GROUP, balance, rounded
from raymoe.model.transformer import Transformer
from raymoe.report.intervals import Interval
from raymoe.storage.artifact_layout import Part, Place, layout

FORMS: dict[str, tuple[tuple[Part, ...], int]] = {
    "FP16": ((), 16),
    "INT4 experts": (("experts",), 4),
    "INT4 all": (("bases", "experts"), 4),
    "INT3 all": (("bases", "experts"), 3),
}
"""Parts of `artifact_layout` that are rounded, and their bits. The experts of a flat model are `bases`."""


def is_rounded(place: Place, parts: tuple[Part, ...]) -> bool:
    """Return whether a form rounds this tensor: a matrix of one of its parts."""
    return place.part in parts and len(place.shape) == 2


def stored_bytes(places: list[Place], parts: tuple[Part, ...], bits: int) -> int:
    """Return the bytes at rest: codes, and a scale and a minimum in FP16 for each group."""
    total = 0
    for place in places:
        if is_rounded(place, parts):
            groups = math.prod(place.shape) // place.shape[place.axis] * -(-place.shape[place.axis] // GROUP)
            total += groups * (GROUP * bits // 8 + 4)
        else:
            total += math.prod(place.shape) * (4 if place.encoding == "float32" else 2)
    return total


def rounded_tensors(
    tensors: dict[str, Tensor], places: list[Place], parts: tuple[Part, ...], bits: int
) -> dict[str, Tensor]:
    """Return the tensors as a form stores them. Factors of residuals are balanced in pairs first."""
    out = {key: tensor.clone() for key, tensor in tensors.items()}
    for place in places:
        if not is_rounded(place, parts):
            if place.encoding != "float32":
                out[place.key] = out[place.key].half().float()
            continue
        stem, _, end = place.key.rpartition("_")
        if place.key.rpartition(".")[2] in RESIDUALS and end == "in":
            first, second = f"{stem}_in", f"{stem}_out"
            out[first], out[second] = balance(tensors[first].float(), tensors[second].float())
    for place in places:
        if is_rounded(place, parts):
            out[place.key] = rounded(out[place.key], place.axis, bits)
    return out


def forms_of(model: ModelSection) -> list[str]:
    """Return the forms that differ for a model: without residuals or private experts, `INT4 experts` is FP16."""
    return [form for form in FORMS if form != "INT4 experts" or model.has_members]


def run_forms(stored: StoredModel) -> list[dict[str, Any]]:
    """Evaluate a run in each form over its whole validation set."""
    assert stored.corpus is not None  # a run always has a corpus
    corpus = Corpus.open(stored.corpus)
    model: Transformer = stored.model()
    tensors = {key: tensor.detach().clone() for key, tensor in model.logical().items()}
    places = layout(stored.config.model, stored.assignment)
    rows = []
    for form in forms_of(stored.config.model):
        parts, bits = FORMS[form]
        model.load_logical(rounded_tensors(tensors, places, parts, bits))
        with torch.inference_mode():
            found = judge(model, corpus.validation_text(), end_of_text=corpus.end_of_text).whole
        rows.append({
            "form": form,
            "bytes": stored_bytes(places, parts, bits),
            "expert_bytes": stored_bytes([p for p in places if p.part in ("bases", "experts")], parts, bits),
            "perplexity": found.token_perplexity,
        })  # fmt: skip
    return rows


def front(rows: list[dict[str, Any]]) -> set[str]:
    """Return the names of the rows that no other row dominates: fewer bytes at no more perplexity, or the reverse."""
    better = lambda a, b: (  # noqa: E731
        a["bytes"] <= b["bytes"] and a["perplexity"] <= b["perplexity"]
        and (a["bytes"], a["perplexity"]) != (b["bytes"], b["perplexity"])
    )  # fmt: skip
    return {row["name"] for row in rows if not any(better(other, row) for other in rows)}


def stored(folder: Path) -> dict[str, Any]:
    """Print bytes and perplexity of the finished runs in an experiment's folder, as means over the seeds of each variant.

    Raises FileNotFoundError if the folder has none.
    """
    names = sorted(path.parent.name for path in folder.glob("*/config.json") if run_result(path.parent)["finished"])
    if not names:
        raise FileNotFoundError(
            f"{folder} has no finished runs: give the folder of an experiment's runs, RUN_ROOT/experiments/NAME"
        )
    runs = {name: run_forms(open_run(str(folder), name)[0]) for name in names}
    table = []
    for variant in sorted({re.sub(r"-seed\d+$", "", name) for name in names}):
        found = [rows for name, rows in runs.items() if re.sub(r"-seed\d+$", "", name) == variant]
        for of_form in zip(*found, strict=True):
            perplexity = Interval.of(row["perplexity"] for row in of_form)
            exact = Interval.of(rows[0]["perplexity"] for rows in found).mean
            table.append({
                "name": f"{variant} {of_form[0]['form']}", "bytes": of_form[0]["bytes"],
                "expert_bytes": of_form[0]["expert_bytes"], "perplexity": perplexity.mean,
                "half_width": perplexity.half, "of_fp16": perplexity.mean / exact, "runs": perplexity.n,
            })  # fmt: skip
    best = front(table)
    for row in sorted(table, key=lambda row: row["bytes"]):
        row["front"] = row["name"] in best
        shown = Interval(row["perplexity"], row["half_width"], row["runs"]).show(".2f")
        print(f"stored  {row['name']:40}{row['bytes']:>12,} bytes  experts {row['expert_bytes']:>12,}  "
              f"perplexity {shown:16} {row['of_fp16']:.4f} of FP16{'  front' * row['front']}")  # fmt: skip
    return {"runs": runs, "table": table}
