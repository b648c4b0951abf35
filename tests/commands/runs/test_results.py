"""Results of runs from their folders: finished or not, the choice of a sweep, and runs grouped by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymoe.commands.runs.comparison import compared, grouped, result_table, warnings
from raymoe.commands.runs.definition import Experiment, Grid, PlannedRun, Sweep, Variant, planned, planned_sweep
from raymoe.commands.runs.results import is_finished, run_result
from raymoe.commands.runs.selection import at_edge, choose
from raymoe.config import Config, override, preset
from tests.support.recorded_runs import record_run


def config(root: Path, name: str = "first", *changes: str) -> Config:
    return override(preset("tiny"), [f"run.root={root}", f"run.name={name}", "train.steps=8", *changes])


def test_a_result_has_the_curve_the_sizes_and_the_conditions(tmp_path: Path) -> None:
    found = run_result(record_run(config(tmp_path, "first", "run.seed=7"), perplexity=40.0))
    assert [(p["step"], p["perplexity"], p["seconds"], p["whole"]) for p in found["curve"]] == [
        (2, 160.0, 1.0, False), (4, 120.0, 2.0, False), (6, 80.0, 3.0, False), (8, 40.0, 4.0, True),
    ]  # fmt: skip
    assert found["curve"][0]["tokens"] == 2 * 16 * 128
    assert (found["perplexity"], found["seconds"], found["tokens_per_s"], found["seed"]) == (40.0, 4.0, 1004.5, 7)
    assert found["peak_rss_mb"] == 250.0, "the peak of the process, not of the records"
    assert found["parameters"] > found["active_parameters"] > 0
    assert (found["commit"], found["corpus"], found["lr"]) == ("0123456789abcdef", "c0ffee", 4e-3)
    assert found["bits_per_byte"] == pytest.approx(2.0 / 0.6931472 / 4.0)
    json.dumps(found, allow_nan=False)


def test_a_run_without_records_has_no_numbers(tmp_path: Path) -> None:
    found = run_result(record_run(config(tmp_path), step=0))
    assert (found["finished"], found["perplexity"], found["peak_rss_mb"], found["step"]) == (False, None, None, 0)
    json.dumps(found, allow_nan=False)


def test_a_run_is_finished_at_its_last_step_with_an_equal_config(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    assert not is_finished(tmp_path / "first", wanted), "it does not exist"
    run = record_run(wanted)
    assert is_finished(run, wanted)
    assert is_finished(run, config(tmp_path / "moved", "first", f"data.cache={tmp_path}")), "its place does not count"
    with pytest.raises(ValueError, match=r"has another config \(train\.lr: 0\.004 -> 0\.001\): delete that folder"):
        is_finished(run, config(tmp_path, "first", "train.lr=1e-3"))
    (run / "outcome.json").write_text(json.dumps({"step": 4, "stopped": True}))
    assert not is_finished(run, wanted), "its last process has stopped earlier"
    assert not is_finished(record_run(config(tmp_path, "half"), step=4), config(tmp_path, "half"))


def test_a_config_of_an_earlier_version_is_equal_if_its_new_fields_have_their_defaults(tmp_path: Path) -> None:
    run = record_run(config(tmp_path))
    about = json.loads((run / "config.json").read_text())
    del about["config"]["data"]["tune_share"]
    (run / "config.json").write_text(json.dumps(about))
    assert is_finished(run, config(tmp_path))


# The choice of a sweep


def swept(root: Path) -> tuple[Experiment, list[PlannedRun]]:
    base = override(preset("tiny"), [f"run.root={root}", "train.steps=8"])
    sweep = Sweep(Grid({"train.lr": ("1e-3", "2e-3", "4e-3")}, ("a", "b")))
    experiment = Experiment(name="e", base=base, variants={"a": Variant("A"), "b": Variant("B"), "c": Variant("C")}, reference="a", sweep=sweep)  # fmt: skip
    return experiment, planned_sweep(experiment)


def test_the_lowest_score_on_the_tuning_split_is_chosen(tmp_path: Path) -> None:
    experiment, runs = swept(tmp_path)
    scores = {"a": (30.0, 20.0, 25.0), "b": (9.0, 12.0, 15.0)}
    for i, run in enumerate(runs):
        record_run(run.config, perplexity=scores[run.variant][i % 3])
    chosen = choose(experiment, runs)
    assert chosen == {"a": {"train.lr": "2e-3"}, "b": {"train.lr": "1e-3"}}
    assert experiment.sweep and at_edge(experiment.sweep, chosen) == ["b: train.lr=1e-3"]
    assert [run.config.train.lr for run in planned(experiment, chosen)] == [2e-3, 1e-3, 4e-3]


def test_unfinished_runs_and_scores_that_are_no_number_are_not_chosen(tmp_path: Path) -> None:
    experiment, runs = swept(tmp_path)
    record_run(runs[0].config, perplexity=float("nan"))
    record_run(runs[1].config, perplexity=1.0, step=4)
    record_run(runs[2].config, perplexity=50.0)
    assert choose(experiment, runs) == {"a": {"train.lr": "4e-3"}}


# Comparison of any runs


def test_runs_that_differ_in_the_seed_only_are_one_variant(tmp_path: Path) -> None:
    runs = [record_run(config(tmp_path, f"flat-seed{s}", f"run.seed={s}", "model.experts=flat"), perplexity=60.0 + s) for s in (0, 1)]  # fmt: skip
    runs.append(record_run(config(tmp_path / "elsewhere", "mine", "run.seed=1"), perplexity=30.5))
    runs.append(record_run(config(tmp_path, "slow", "train.lr=1e-3"), perplexity=55.0))
    records, labels = grouped(runs)
    assert list(labels.values()) == ["flat", "mine", "slow"]
    assert [labels[r["variant"]] for r in records] == ["flat", "flat", "mine", "slow"]
    text = result_table(compared("c", records, labels, "1"))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "60.50 ±6.35" in rows["flat"] and "30.50" in rows["mine"]
    assert "0.5000" in rows["mine"], "paired with the seed 1 of flat"


def test_two_runs_of_one_config_and_seed_are_refused(tmp_path: Path) -> None:
    runs = [record_run(config(tmp_path, name)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="have the same config and seed"):
        grouped(runs)


def test_what_limits_a_comparison_is_stated(tmp_path: Path) -> None:
    runs = [record_run(config(tmp_path, "a")), record_run(config(tmp_path, "b", "train.steps=12", "data.tune_share=0.1"))]  # fmt: skip
    about = json.loads((runs[1] / "config.json").read_text()) | {"corpus_fingerprint": "other"}
    (runs[1] / "config.json").write_text(json.dumps(about))
    found = "\n".join(warnings(compared("c", *grouped(runs), "1")))
    assert "different corpora: c0ffee, other" in found and "different numbers of tokens: 16,384, 24,576" in found
    assert "tuning split" in found and "commits" not in found
