"""Files of experiments: the runs that follow from them, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.commands.runs.definition import planned, planned_sweep
from raymoe.commands.runs.definition_file import FOLDER, find_file, read_experiment

BASE = "base: {preset: tiny, train: {steps: 10}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_variants_seeds_grid_and_overrides_become_runs(tmp_path: Path) -> None:
    text = BASE + (
        "variants:\n  flat: {label: flat one, model: {experts: flat}}\n  live:\n  wide: {model: {d_expert: 512}, cores: 2}\n"
        "grid: {variants: [live], regroup.alpha: [0.1, 0.2], regroup.similarity: [paper]}\nseeds: [3, 5]\n"
    )
    experiment = read_experiment(write(tmp_path, text), [f"run.root={tmp_path}", "train.warmup=2"])
    runs = planned(experiment, {})
    names = [
        f"{name}-seed{seed}" for seed in (3, 5)
        for name in ("flat", "live-alpha0.1-similaritypaper", "live-alpha0.2-similaritypaper", "wide")
    ]  # fmt: skip
    assert [run.name for run in runs] == names
    first, live, _, wide = runs[:4]
    assert first.folder == tmp_path.resolve() / "experiments" / "mine" / "flat-seed3"
    assert (first.config.model.experts, first.config.run.seed, first.config.train.warmup) == ("flat", 3, 2)
    assert (live.config.regroup.alpha, live.config.regroup.similarity) == (0.1, "paper")
    assert (wide.cores, wide.config.train.threads, first.config.train.threads) == (2, 2, 1)
    assert {(run.config.train.workers, run.config.train.gpu) for run in runs} == {(1, "no")}
    assert {run.config.train.validate_every for run in runs} == {3}, "each quarter of 10 steps, rounded up"
    assert {run.config.data.cache for run in runs} == {str(tmp_path / "cache")}, "runs share the tokenized text"
    assert experiment.variants["flat"].label == "flat one" and experiment.reference == "flat"


def test_the_interval_of_validations_of_the_file_is_kept(tmp_path: Path) -> None:
    text = "base: {preset: tiny}\nvariants: {a: {train: {validate_every: 7}}, b: }\n"
    a, b = planned(read_experiment(write(tmp_path, text)), {})
    assert (a.config.train.validate_every, b.config.train.validate_every) == (7, 40)


def test_a_sweep_tries_each_setting_on_the_tuning_split_only(tmp_path: Path) -> None:
    text = BASE + (
        "variants: {a: , b: , c: {train: {lr: 0.5}}}\n"
        "sweep: {grid: {variants: [a, b], train.lr: [1e-3, 2e-3]}, select: perplexity, seed: 9, tune_share: 0.1, train: {steps: 6}}\n"
    )
    experiment = read_experiment(write(tmp_path, text))
    tried = planned_sweep(experiment)
    assert [run.name for run in tried] == [f"{v}-sweep-lr{lr}-seed9" for v in "ab" for lr in ("1e-3", "2e-3")]
    assert {(run.config.data.tune_share, run.config.train.steps, run.config.run.seed) for run in tried} == {(0.1, 6, 9)}
    assert [run.config.train.lr for run in tried] == [1e-3, 2e-3] * 2
    final = planned(experiment, {"a": {"train.lr": "2e-3"}, "b": {"train.lr": "1e-3"}})
    assert [(run.config.train.lr, run.config.train.steps, run.config.data.tune_share) for run in final] == [
        (2e-3, 10, 0.0), (1e-3, 10, 0.0), (0.5, 10, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {a: {model: {n_expertz: 3}}}", r"variants\.a: unknown key 'model\.n_expertz': did you mean 'model\.n_experts'"),
        ("variants: {a: {model: {n_experts: many}}}", r"variants\.a: model\.n_experts='many' is not allowed: expected int"),
        ("variants: {a: {model: {n_clusters: 99}}}", r"variants\.a: model\.n_clusters=99 is not allowed"),
        ("variants: {a: {modell: {n_clusters: 9}}}", r"variants\.a: unknown config section 'modell': did you mean 'model'"),
        ("variants: {a: {run: {seed: 1}}}", r"variants\.a: run\.seed is not allowed in an experiment: use `seeds`"),
        ("variants: {a: {train: {workers: 2}}}", r"train\.workers is not allowed in an experiment: each run is one process"),
        ("variants: {'a b': }", r"variants: the name 'a b' is not allowed"),
        ("variants: {a: , a: }", r"has the key 'a' twice"),
        ("variants: {a: {label: x}, b: {label: x}}", "two have the label 'x'"),
        ("variants: {}", "variants: give at least one"),
        ("seeds: [1]", "has no `variants`"),
        ("variants: {a: }\nseed: [1]", "unknown key 'seed': did you mean 'seeds'"),
        ("variants: {a: }\nseeds: 3", "seeds must be a list"),
        ("variants: {a: }\nseeds: [1, 1]", "seeds: a seed occurs twice"),
        ("variants: {a: }\nseeds: [-1]", "seeds='-1' is not allowed: expected an integer of 0 or more"),
        ("variants: {a: }\ncores: 0", "cores='0' is not allowed: expected an integer of 1 or more"),
        ("variants: {a: }\nreference: b", "reference: unknown variant 'b'"),
        ("variants: {a: }\nbase: {preset: huge}", "base: unknown preset 'huge'"),
        ("variants: {a: }\ngrid: {train.lr: 3}", r"grid: train\.lr must be a list"),
        ("variants: {a: }\ngrid: {train.lr: []}", r"grid: train\.lr must be a list of at least one value"),
        ("variants: {a: }\ngrid: {train.lrr: [1]}", r"grid: unknown key 'train\.lrr': did you mean 'train\.lr'"),
        ("variants: {a: }\ngrid: {train.lr: [-1]}", r"variants\.a-lr-1: train\.lr=-1\.0 is not allowed"),
        ("variants: {a: }\ngrid: {train.lr: [1, 1]}", r"grid: train\.lr: a value occurs twice"),
        ("variants: {a: }\ngrid: {variants: [b], train.lr: [1]}", "grid: unknown variant 'b'"),
        ("variants: {a: }\ngrid: {variants: [a]}", "grid: give a list of values"),
        ("variants: {a: }\nsweep: {grid: {train.lr: [1, 2]}}", "sweep: `select` is missing"),
        ("variants: {a: }\nsweep: {grid: {train.lr: [1]}, select: loss}", "sweep: select='loss' is not allowed: one of perplexity, bits_per_byte"),
        ("variants: {a: }\nsweep: {grid: {train.lr: [1]}, select: perplexity, tune_share: 0}", r"data\.tune_share=0 is not allowed in a sweep"),
        ("variants: {a: }\nsweep: {grid: {train.lr: [1]}, select: perplexity, tune_share: 0.7}", r"sweep: data\.tune_share=0\.7 is not allowed"),
        ("variants: {a: }\nsweep: {grid: {train.lr: [1]}, select: perplexity, model: {layers: x}}", r"model\.layers='x'"),
        ("variants: {a: }\nsweep: {grid: {model.n_clusters: [2, 99]}, select: perplexity}", r"variants\.a: model\.n_clusters=99"),
        ("variants: {a: &x }", "anchor"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_file_and_the_field(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text if "preset" in text else f"base: {{preset: tiny}}\n{text}")
    with pytest.raises(ValueError, match=message) as error:
        read_experiment(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'"),
        ("train.lr=3", "train.lr is in grid: an override of it would give all its runs one value"),
        ("run.seed=3", "run.seed is not allowed in an experiment"),
        ("train.steps", "not an override"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "variants: {a: }\ngrid: {train.lr: [1e-3, 2e-3]}\n")
    with pytest.raises(ValueError, match=message):
        read_experiment(path, [override])


def test_an_override_does_not_move_a_sweep_to_the_validation_split(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "variants: {a: }\nsweep: {grid: {train.lr: [1e-3]}, select: perplexity}\n")
    with pytest.raises(ValueError, match=r"data\.tune_share=0 is not allowed in a sweep"):
        read_experiment(path, ["data.tune_share=0"])


def test_an_experiment_is_found_by_name_or_path(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert find_file("mine", tmp_path) == path and find_file(str(path)) == path
    with pytest.raises(FileNotFoundError, match="unknown experiment 'min': did you mean 'mine'"):
        find_file("min", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_file(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_of_the_checkout_are_valid(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.title and experiment.reference in experiment.variants
    runs = planned(experiment, {})
    assert len({run.name for run in runs}) == len(experiment.variants) * len(experiment.seeds)
    set_by_variant = {
        name for name, variant in experiment.variants.items() if any("aux_loss=" in item for item in variant.overrides)
    }
    assert all(run.config.aux_loss == 0 for run in runs if run.variant not in set_by_variant), "all balance alike"
