"""Export of a run: the published file is the one that was evaluated, and every stage is reported."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.commands.stages import StageLines
from raymoe.config import Config
from raymoe.data.corpus import Corpus
from raymoe.data.prepare import prepare
from raymoe.export import export as export_module
from raymoe.export.export import export, table
from raymoe.export.judge import judge
from raymoe.export.open import open_artifact
from raymoe.model import quantize as quantize_module
from raymoe.model.transformer import Transformer
from raymoe.storage import artifact_encoding
from raymoe.storage.artifact import Artifact
from raymoe.storage.checkpoint import step_folder, write_manifest, write_shard
from raymoe.storage.run_folder import RunFolder
from tests.support.presets import residual_tiny

SMALL = [
    "model.layers=2", "model.d_model=32", "model.d_expert=48", "model.n_experts=6", "model.n_clusters=3",
    "model.experts_per_token=2", "model.residual_width=4", "model.heads=2", "model.kv_heads=1",
    "model.vocabulary=300", "model.context=16",
]  # fmt: skip


def write_run(root: Path, *more: str) -> Config:
    """Write a run with one checkpoint of random weights, without training."""
    words = random.Random(0).choices(["the", "cat", "sat", "où", "mat"], k=8000)
    (root / "text.txt").write_text("".join(f"{word}\n" if i % 9 == 8 else f"{word} " for i, word in enumerate(words)))
    fields = [f"data.path={root / 'text.txt'}", f"run.root={root}", "run.name=first", *SMALL, *more]
    config = residual_tiny(*fields)
    model = Transformer(config.model)
    model.initialize(0)
    run = RunFolder(root / "first")
    folder = step_folder(run.checkpoints, 7)
    write_shard(folder, 0, 1, model.logical())
    meta = {"config": config.to_dict(), "assignment": config.model.default_assignment(), "version": 2}
    write_manifest(folder, step=7, world=1, meta=meta)
    run.config.write_text(json.dumps({"config": config.to_dict(), "corpus": str(prepare(config, progress=False))}))
    return config


def test_the_published_file_is_quantized_once_and_is_the_one_that_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path)
    quantized, judged = [], []
    real_quantize, real_judge = quantize_module.quantize, export_module.judge
    monkeypatch.setattr(artifact_encoding, "quantize", lambda x, axis: quantized.append(1) or real_quantize(x, axis))
    monkeypatch.setattr(
        export_module,
        "judge",
        lambda model, *a, **k: (
            judged.append({n: t.clone() for n, t in model.logical().items()}) or real_judge(model, *a, **k)
        ),
    )
    done = export(str(tmp_path), "first", tokens=500)
    artifact = Artifact.open(done.target)
    assert done.target == tmp_path / "exports" / "first" and artifact.metrics == done.metrics
    factors = sum(place.encoding == "int4" for place in artifact.places)
    assert len(quantized) == factors == 2 * config.model.layers * config.model.n_experts * 3
    assert len(judged) == 3
    for form, found in (("int4", judged[1]), ("zero", judged[2])):
        expected = artifact.tensors(form)  # type: ignore[arg-type]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), form


def test_the_metrics_are_those_of_the_artifact(tmp_path: Path) -> None:
    write_run(tmp_path)
    done = export(str(tmp_path), "first")
    stored = open_artifact(done.target)
    corpus = Corpus.open(done.source.corpus or "")
    texts = corpus.validation_text()
    for form in ("int4", "zero"):
        judged = judge(stored.model(form), texts, end_of_text=corpus.end_of_text)  # type: ignore[arg-type]
        found = judged.whole
        assert all(set(levels) == {"clusters", "experts"} for levels in judged.routing.values())
        assert all(x and 0 < x < 1 for x in judged.routing["chosen_probability"]["clusters"] or [None])
        assert done.metrics["perplexity"][form] == pytest.approx(found.token_perplexity, rel=1e-6)
        assert done.metrics["bits_per_byte"][form] == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert (done.metrics["step"], stored.version) == (7, 2)
    assert 0 < done.metrics["coactivation_kept"] <= 1


def test_a_shortened_text_has_its_own_size(tmp_path: Path) -> None:
    """Bits per byte of a part of the text is near that of the whole text, since its bytes are counted."""
    write_run(tmp_path)
    whole = export(str(tmp_path), "first", target=tmp_path / "whole").metrics
    part = export(str(tmp_path), "first", target=tmp_path / "part", tokens=400).metrics
    assert part["perplexity_tokens"] <= 400 < whole["perplexity_tokens"]
    assert part["bits_per_byte"]["full"] == pytest.approx(whole["bits_per_byte"]["full"], rel=0.1)


@pytest.mark.parametrize("kind", ["flat", "dense"])
def test_models_without_clusters_are_exported(tmp_path: Path, kind: str) -> None:
    write_run(tmp_path, f"model.experts={kind}")
    metrics = export(str(tmp_path), "first").metrics
    assert set(metrics["perplexity"]) == {"full", "int4"} and metrics["coactivation_kept"] is None
    assert "this artifact" in table(metrics)


@pytest.mark.parametrize("base_width", [0, 24])
def test_private_experts_are_exported(tmp_path: Path, base_width: int) -> None:
    write_run(tmp_path, "model.expert_kind=private", f"model.base_width={base_width}", "model.gate=sigmoid")
    done = export(str(tmp_path), "first")
    forms = {"full", "int4", "zero"} if base_width else {"full", "int4"}
    assert set(done.metrics["perplexity"]) == forms and done.metrics["coactivation_kept"] is not None
    assert done.metrics["perplexity"]["int4"] == pytest.approx(done.metrics["perplexity"]["full"], rel=0.02)
    text = table(done.metrics)
    assert "INT4 private experts" in text and ("private experts set to zero" in text) == bool(base_width)
    stored = open_artifact(done.target)
    if not base_width:
        with pytest.raises(ValueError, match="residuals=zero needs a model with bases"):
            stored.model("zero")


def test_every_stage_is_reported_from_its_start_to_its_end(tmp_path: Path) -> None:
    write_run(tmp_path)
    calls: list[tuple[str, int, int]] = []
    export(str(tmp_path), "first", progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == [
        "read checkpoint", "evaluate as trained", "quantize and write", "evaluate the artifact",
        "evaluate without residuals",
    ]  # fmt: skip
    for stage in stages:
        done = [done for name, done, _ in calls if name == stage]
        (total,) = {total for name, _, total in calls if name == stage}
        assert done == sorted(done) and done[0] == 0 and done[-1] == total > 0


def test_a_failed_evaluation_leaves_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)

    def failing(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(export_module, "_judge_artifact", failing)
    with pytest.raises(OSError, match="no space"):
        export(str(tmp_path), "first")
    assert list((tmp_path / "exports").iterdir()) == []


def test_the_table_has_units_and_compares_with_flat_models_of_both_precisions(tmp_path: Path) -> None:
    write_run(tmp_path)
    metrics = export(str(tmp_path), "first").metrics
    text = table(metrics)
    sizes = metrics["sizes"]
    assert sizes["flat_int4"]["expert_bytes"] < 0.4 * sizes["flat_float16"]["expert_bytes"]
    for words in ("flat, FP16", "flat, INT4 experts", "clustered, FP16 + INT4", "total MB", "bits per byte", "Lower"):
        assert words in text
    del metrics["bits_per_byte"], sizes["flat_int4"]
    assert "nan" in table(metrics), "artifacts of earlier releases lack some metrics"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_per_stage_and_the_time_left(tmp_path: Path) -> None:
    now, out = [0.0], io.StringIO()
    progress = StageLines(out, clock=lambda: now[0])
    for second in range(31):
        now[0] = float(second)
        progress("evaluate", second, 30)
    progress("write", 0, 1)
    now[0] += 2
    progress("write", 1, 1)
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["evaluate", "33%", "20", "s", "left"],
        ["evaluate", "67%", "10", "s", "left"],
        ["evaluate", "30.0", "s"],
        ["write", "2.0", "s"],
    ]


def test_a_terminal_gets_one_line_that_changes(tmp_path: Path) -> None:
    now, out = [0.0], Terminal()
    progress = StageLines(out, clock=lambda: now[0])
    for second in range(4):
        now[0] = float(second)
        progress("evaluate", second, 3)
    assert out.getvalue().count("\n") == 1 and out.getvalue().count("\r") == 3
