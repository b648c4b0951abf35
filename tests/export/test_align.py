"""Alignment of cluster ids: a permutation of names, which changes nothing that the model computes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.export.align import align_clusters, kept_share, relabel_clusters
from raymoe.storage.artifact import Artifact
from tests.storage.test_artifact import KINDS, UNEVEN, build, export, loaded, logits


@pytest.mark.parametrize("kind", ["clustered", "bases"])
def test_relabelled_clusters_compute_the_same(tmp_path: Path, kind: str) -> None:
    relabel = [[2, 0, 1], [1, 0, 2]]
    plain = Artifact.open(export(tmp_path, KINDS[kind], "plain"))
    tensors, assignment = relabel_clusters(build(KINDS[kind]).logical(), UNEVEN, relabel)
    renamed = Artifact.open(export(tmp_path, KINDS[kind], "renamed", tensors=tensors, assignment=assignment))
    assert renamed.assignment == [[relabel[layer][c] for c in row] for layer, row in enumerate(UNEVEN)]
    before, after = plain.tensors(), renamed.tensors()
    for layer in range(2):
        for c, new in enumerate(relabel[layer]):
            old_key, new_key = (f"layers.{layer}.clusters.{i}.base_up" for i in (c, new))
            assert torch.equal(before[old_key], after[new_key])
            for part in ("weight", "bias"):
                key = f"layers.{layer}.router.{part}"
                assert torch.equal(before[key][c], after[key][new])
    torch.testing.assert_close(logits(loaded(renamed)), logits(loaded(plain)), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 4), clusters=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_alignment_undoes_a_shuffle(layers: int, clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = [np.arange(clusters), *(rng.permutation(clusters) for _ in range(layers - 1))]  # id of topic t in a layer
    coactivation = rng.random((layers - 1, clusters, clusters))
    for layer in range(layers - 1):
        coactivation[layer, true[layer], true[layer + 1]] += clusters + 1  # tokens keep their topic
    relabel = align_clusters(coactivation)
    assert len(relabel) == layers
    for ids, topics in zip(relabel, true, strict=True):
        assert [ids[topics[t]] for t in range(clusters)] == list(range(clusters))


def test_alignment_is_the_best_there_is() -> None:
    counts = np.random.default_rng(1).random((1, 4, 4))
    _, ids = align_clusters(counts)

    def kept(ids: Any) -> float:
        return sum(counts[0, ids[b], b] for b in range(4))

    assert kept(ids) == pytest.approx(max(kept(p) for p in itertools.permutations(range(4))))
    with pytest.raises(ValueError, match="layers-1"):
        align_clusters(np.zeros((4, 4)))


@pytest.mark.parametrize("new_ids", [[[0, 1, 1]] * 2, [[0, 1]] * 2, [[0, 1, 3]] * 2])
def test_ids_that_are_no_permutation_are_refused(new_ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="new ids of layer 0 are not a permutation"):
        relabel_clusters(build(KINDS["clustered"]).logical(), UNEVEN, new_ids)


def test_the_kept_share_counts_transitions_on_one_id() -> None:
    counts = np.array([[[3, 1], [2, 4]]])
    assert kept_share(counts, [[0, 1], [0, 1]]) == pytest.approx(0.7)
    assert kept_share(counts, [[0, 1], [1, 0]]) == pytest.approx(0.3)
    assert kept_share(np.zeros((0, 2, 2)), [[0, 1]]) == 1.0
