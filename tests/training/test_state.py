"""Identity of the data in checkpoints, the report of a step, and loads of models with different levels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.storage.checkpoint import newest
from raymoe.storage.run_folder import RunFolder
from raymoe.training.failures import Unrecoverable
from raymoe.training.load import RoutingLoad
from raymoe.training.state import DataIdentity, Position
from raymoe.training.step_report import StepReport
from tests.support.synthetic import Synthetic
from tests.training.test_loop import losses, records, train

DENSE = (
    "model.expert_kind=residual", "model.gate=softmax", "regroup.start=dense", "train.steps=12", "checkpoint.every=4",
)  # fmt: skip


# Data


@pytest.mark.parametrize("name", ["fingerprint", "tokenizer_fingerprint"])
def test_a_resume_with_other_data_is_refused_with_both_fingerprints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(0, 1, str(tmp_path), ("train.steps=4",))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Synthetic, name, "other")
    with pytest.raises(Unrecoverable, match=r"trained with (corpus|tokenizer) synthetic, and this launch has \1 other"):
        train(0, 1, str(tmp_path), ("train.steps=6",))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    assert train(0, 1, str(tmp_path), ("train.steps=6",))["step"] == 6


def test_a_checkpoint_stores_the_data_and_one_without_it_is_accepted(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=4",))
    checkpoint, _ = newest(RunFolder(tmp_path).checkpoints)
    assert checkpoint and checkpoint.meta["data"] == {"corpus": "synthetic", "tokenizer": "synthetic"}
    manifest = checkpoint.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["meta"]["data"]  # as version 0.1 wrote it
    manifest.write_text(json.dumps(content))
    old, _ = newest(RunFolder(tmp_path).checkpoints)
    assert old and Position.of(old).step == 4
    DataIdentity("a", "b").require_same(old.meta)


# Reports


def test_reports_add_up_over_ranks() -> None:
    first = StepReport(loss=0.5, sent_bytes=3, tokens_hash=2**50, stop=True, plan=(1.0, 2.0))
    second = StepReport(loss=0.25, tokens_hash=1, writing=True, requested=True, plan=(0.0, 0.0))
    total = StepReport.from_vector(first.to_vector() + second.to_vector())
    assert total == StepReport(
        loss=0.75, sent_bytes=3, tokens_hash=2**50 + 1, stop=True, writing=True, requested=True, plan=(1.0, 2.0)
    )
    assert StepReport.from_vector(second.to_vector()) == second


# Loads, and the fold


def test_loads_of_a_flat_and_a_folded_model_add_up_by_expert() -> None:
    none = torch.zeros(0, 0)
    flat = RoutingLoad(none, torch.tensor([[1, 2, 3]]), torch.tensor([[6]]), 3)
    folded = RoutingLoad(torch.tensor([[4, 5]]), torch.tensor([[1, 0, 2, 0, 5, 0]]), torch.tensor([[9]]), 3)
    for total in (flat + folded, folded + flat):
        assert total.experts.tolist() == [[2, 7, 5]] and total.clusters.tolist() == [[4, 5]]
        assert total.workers.tolist() == [[15]]
    assert (flat + folded + folded).experts.tolist() == [[3, 12, 7]]
    assert (folded + folded).members.tolist() == [[2, 0, 4, 0, 10, 0]]
    bases = RoutingLoad(torch.tensor([[4, 5]]), none, torch.tensor([[9]]), 3)
    assert (flat + bases).experts.tolist() == [[1, 2, 3]] and bases.experts.numel() == 0


@pytest.mark.parametrize("burn_in", [3, 4, 5])
def test_a_fold_between_two_train_records_is_trained_through(burn_in: int, tmp_path: Path) -> None:
    """Records are made every 4 steps; the fold comes before, at and after one."""
    changes = (*DENSE, "train.log_every=4", f"regroup.burn_in={burn_in}")
    assert train(0, 1, str(tmp_path), changes)["step"] == 12
    made: list[dict[str, Any]] = records(tmp_path, "train")
    assert [record["step"] for record in made] == [4, 8, 12]
    for record in made:
        clustered = record["step"] > burn_in
        assert bool(record["load_clusters"]) == clustered
        for row in (*record["load_experts"], *record["load_clusters"]):
            assert sum(row) == pytest.approx(1)
        assert [len(row) for row in record["load_experts"]] == [10, 10]
    assert len(losses(tmp_path)) == 3
