"""The benchmark of regrouping under a change of domains runs for both kinds of experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymoe.data.corpus import Corpus
from tests.support.paths import REPO_ROOT

SHORT = (
    "model.context=32", "model.d_model=32", "model.d_expert=32", "model.clusters_per_token=2", "train.global_batch=4",
    "train.grain=4", "train.validate_every=10", "train.validate_windows=16", "regroup.burn_in=10", "regroup.period=10",
    "regroup.overlap=4", "regroup.plan_lag=3", "regroup.stats_every=5",
)  # fmt: skip


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "jobs/benchmark.py", "regroup", "--part", "shift", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    return subprocess.run(line, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=1200)


def test_a_bad_change_is_refused_with_exit_status_2() -> None:
    done = benchmark("--set", "model.layer=1")
    assert done.returncode == 2 and "did you mean 'model.layers'" in done.stderr


def domains(folder: Path) -> Path:
    """Write four domains of text, two of them of the first half of a shift."""
    for domain, word in (("legal", "law"), ("novel", "sea"), ("drama", "king"), ("speech", "people")):
        lines = (f"The {word} of {n} and the {word}s of {n * n % 97} meet at {n % 13}." for n in range(1500))
        (folder / f"{domain}.txt").write_text("\n".join(lines))
    return folder


def test_domains_change_at_the_step_of_the_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO_ROOT / "jobs"))
    from benchmarks.domain_shift import RandomPlans, Shift, shift_run, side_configs
    from benchmarks.workers import corpus_for

    quick = [
        *SHORT,
        "regroup.burn_in=4",
        "regroup.period=4",
        "regroup.plan_lag=1",
        "regroup.overlap=1",
        "regroup.stats_every=2",
    ]
    config = side_configs(quick, steps=10)["random"]
    corpus = corpus_for(config, str(domains(tmp_path)), str(tmp_path))
    text = Shift(Corpus.open(corpus), 4)
    for step in range(10):
        batch = text.batch(seed=0, step=step, global_batch=4, context=32, rows=range(4))
        assert {text.domains[i] for i in batch.domain} <= ({"legal", "novel"} if step < 4 else {"drama", "speech"})
    run = shift_run(config, RandomPlans, corpus, 4)
    assert max(run["validation"]) == 10 and any(record["name"] == "applied" for record in run["plans"])


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["private", "residual"])
def test_the_benchmark_compares_live_static_and_random_clusters(kind: str, tmp_path: Path) -> None:
    changes = [part for change in (*SHORT, f"model.expert_kind={kind}") for part in ("--set", change)]
    output = tmp_path / "output.json"
    done = benchmark("--data", str(domains(tmp_path)), "--seeds", "1", "--steps", "40", "--json", str(output), *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())["result"]["shift"]
    sides = {"static", "random", "counterfactual", "paper", "coactivation"}
    sides |= {"dense start"} if kind == "residual" else set()
    assert {key.split(" ", 1)[1].removesuffix(" seed 0") for key in result if key.startswith("shift")} == sides
    moves = {side: sum(result[f"shift {side} seed 0"][half]["moves"] for half in ("before", "after")) for side in sides}
    assert moves["static"] == 0 and moves["random"] == 3 * 2 * 4  # three periods, two layers, four experts
    for side in sides:
        row = result[f"shift {side} seed 0"]
        assert 1 < row["late_perplexity"] < 2048 and row["late_perplexity"] <= row["late_perplexity_mean"]
        if moves[side] == 0 and side != "dense start":
            assert row["perplexity"] == result["shift static seed 0"]["perplexity"]
