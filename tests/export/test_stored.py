"""The benchmark of bytes at rest: its forms equal the artifact where they overlap, and its front is the undominated rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.storage.artifact import Artifact
from raymoe.storage.artifact_layout import layout, sizes
from tests.storage.test_artifact import KINDS, UNEVEN, build, export
from tests.support.paths import REPO_ROOT


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPO_ROOT / "jobs"))
    from benchmarks import stored

    return stored


@pytest.mark.parametrize("kind", ["clustered", "private", "private with a base"])
def test_int4_experts_are_those_of_the_artifact(stored: Any, tmp_path: Path, kind: str) -> None:
    model, places = build(KINDS[kind]), layout(KINDS[kind], UNEVEN)
    parts, bits = stored.FORMS["INT4 experts"]
    ours = stored.rounded_tensors(model.logical(), places, parts, bits)
    theirs = Artifact.open(export(tmp_path, KINDS[kind])).tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert stored.stored_bytes(places, parts, bits) == sizes(KINDS[kind])["clustered_int4"]["bytes"]


def test_norms_and_routers_stay_float32(stored: Any) -> None:
    places, tensors = layout(KINDS["flat"], UNEVEN), {k: t.clone() for k, t in build(KINDS["flat"]).logical().items()}
    kept = [key for key in tensors if key.endswith("norm") or "router" in key]
    for key in kept:
        tensors[key].fill_(1.0001)  # not a float16
    found = stored.rounded_tensors(tensors, places, *stored.FORMS["INT3 all"])
    assert kept and all(torch.equal(found[key], tensors[key]) for key in kept)


def test_a_folder_without_finished_runs_is_refused(stored: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no finished runs"):
        stored.stored(tmp_path)


def test_flat_experts_in_four_and_three_bits(stored: Any) -> None:
    places, counted = layout(KINDS["flat"], UNEVEN), sizes(KINDS["flat"])
    bytes_of = {form: stored.stored_bytes(places, *stored.FORMS[form]) for form in stored.forms_of(KINDS["flat"])}
    assert list(bytes_of) == ["FP16", "INT4 all", "INT3 all"]
    assert (
        bytes_of["FP16"] == counted["flat_float16"]["bytes"] and bytes_of["INT4 all"] == counted["flat_int4"]["bytes"]
    )
    # Rows of 48 and 32 values take 2 groups and 1 group, in each of 7 experts of 2 layers.
    groups = 2 * 7 * (32 * 2 + 32 * 2 + 48 * 1)
    assert bytes_of["INT4 all"] - bytes_of["INT3 all"] == groups * 4
    tensors = build(KINDS["flat"]).logical()
    exact = stored.rounded_tensors(tensors, places, *stored.FORMS["FP16"])
    error = {
        form: sum(float((stored.rounded_tensors(tensors, places, *stored.FORMS[form])[k] - exact[k]).square().sum()) for k in exact)
        for form in bytes_of
    }  # fmt: skip
    assert error["FP16"] == 0 < 3 * error["INT4 all"] < error["INT3 all"]


def test_the_front_has_the_rows_that_no_other_dominates(stored: Any) -> None:
    rows = [
        {"name": name, "bytes": size, "perplexity": perplexity}
        for name, size, perplexity in (("a", 1, 9.0), ("b", 2, 9.0), ("c", 2, 7.0), ("d", 3, 7.5), ("e", 4, 5.0))
    ]
    assert stored.front(rows) == {"a", "c", "e"}
