"""The definition of an experiment, and the runs that follow from it. Imports neither torch nor Ray."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from raymoe.config import Config, expand, override

Score = Literal["perplexity", "bits_per_byte"]
SCORES: tuple[Score, ...] = ("perplexity", "bits_per_byte")

OWN_KEYS = {
    "run.name": "runs are named by their variant and seed",
    "run.seed": "use `seeds`",
    "train.workers": "each run is one process",
    "train.threads": "use `cores`",
    "train.gpu": "the runs of an experiment use CPUs",
    "train.resume": "unfinished runs resume by themselves",
    "checkpoint.storage": "the runs of an experiment have no copies",
}
"""Fields that an experiment sets itself, and the remedy."""


@dataclass(frozen=True)
class Grid:
    """Values of fields, of which all combinations are run."""

    values: Mapping[str, tuple[str, ...]]
    """Values by `section.field`, as text of overrides."""
    variants: tuple[str, ...] | None = None
    """Names of the variants that it applies to; None: all."""

    def settings(self, variant: str) -> list[dict[str, str]]:
        """Return the combinations for a variant: one empty dict if the grid does not apply to it."""
        if self.variants is not None and variant not in self.variants:
            return [{}]
        return [dict(zip(self.values, chosen, strict=True)) for chosen in itertools.product(*self.values.values())]


@dataclass(frozen=True)
class Sweep:
    """The first stage of an experiment: choose the settings of each variant by a score on the tuning split."""

    grid: Grid
    select: Score = "perplexity"
    seed: int = 0
    tune_share: float = 0.05
    """See `data.tune_share`."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A model or method of an experiment."""

    label: str
    overrides: tuple[str, ...] = ()
    cores: int | None = None
    """Cores of each of its runs; None: those of the experiment."""


@dataclass(frozen=True)
class Experiment:
    """A set of runs: variants with seeds, after an optional sweep."""

    name: str
    base: Config
    variants: Mapping[str, Variant]
    reference: str
    """Name of the variant that others are compared with."""
    title: str = ""
    seeds: tuple[int, ...] = (0,)
    cores: int = 1
    sweep: Sweep | None = None
    base_overrides: tuple[str, ...] = ()
    """Overrides that `base` contains, to know which fields are set."""
    overrides: tuple[str, ...] = ()
    """Applied last, to all runs."""
    text: str = ""
    """Content of the file."""

    @property
    def common(self) -> Config:
        """The base with the overrides of its sections `run` and `data`."""
        return override(self.base, [item for item in self.overrides if item.startswith(("run.", "data."))])

    @property
    def folder(self) -> Path:
        """Folder of the results and of the runs."""
        return expand(self.common.run.root).resolve() / "experiments" / self.name


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    name: str
    variant: str
    seed: int
    config: Config
    cores: int
    settings: Mapping[str, str] = field(default_factory=dict)
    """Values that a sweep tries in this run, or has chosen for it."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.run.root) / self.name


def expanded(given: Mapping[str, Variant], grid: Grid) -> dict[str, Variant]:
    """Return the variants with each combination of a grid as a variant of its own. Raises ValueError for equal names."""
    variants: dict[str, Variant] = {}
    for name, variant in given.items():
        for settings in grid.settings(name):
            own = f"{name}-{short(settings)}" if settings else name
            label = ", ".join([variant.label, *(f"{key.partition('.')[2]}={value}" for key, value in settings.items())])
            if own in variants:
                raise ValueError(f"grid: two variants are named {own}: rename a variant or remove a repeated value")
            variants[own] = replace(variant, label=label, overrides=(*variant.overrides, *assign(settings)))
    return variants


def planned(experiment: Experiment, chosen: Mapping[str, Mapping[str, str]]) -> list[PlannedRun]:
    """Return the runs of the final stage. `chosen`: the settings of the sweep, by variant.

    Runs are ordered by seed, so that the first runs contain all variants. Raises ValueError for a bad config.
    """
    runs = [
        _run(experiment, name, seed, chosen.get(name, {}), f"{name}-seed{seed}")
        for seed in experiment.seeds
        for name in experiment.variants
    ]
    return _distinct(runs)


def planned_sweep(experiment: Experiment) -> list[PlannedRun]:
    """Return the runs of the sweep; none without a sweep. Raises ValueError for a bad config.

    All runs are validated on a tuning split.
    """
    sweep = experiment.sweep
    if sweep is None:
        return []
    tune = (f"data.tune_share={sweep.tune_share}", *sweep.overrides)
    runs = [
        _run(experiment, name, sweep.seed, settings, f"{name}-sweep-{short(settings)}-seed{sweep.seed}", tune)
        for name in experiment.variants
        for settings in sweep.grid.settings(name)
        if settings
    ]
    if not all(run.config.data.tune_share for run in runs):
        raise ValueError("data.tune_share=0 is not allowed in a sweep, which does not read the validation split")
    return _distinct(runs)


def _run(
    experiment: Experiment, variant: str, seed: int, settings: Mapping[str, str], name: str,
    more: Sequence[str] = (),
) -> PlannedRun:  # fmt: skip
    of = experiment.variants[variant]
    cores = of.cores or experiment.cores
    common = experiment.common
    cache = common.data.cache or str(Path(common.run.root) / "cache")
    own = [
        f"run.name={name}", f"run.root={experiment.folder}", f"run.seed={seed}", f"data.cache={cache}", "train.workers=1",
        f"train.threads={cores}", "train.gpu=no",
    ]  # fmt: skip
    changes = [*of.overrides, *assign(settings), *more, *experiment.overrides]
    try:
        config = override(experiment.base, [*changes, *own])
        if not any(item.startswith("train.validate_every=") for item in [*experiment.base_overrides, *changes]):
            config = override(config, [f"train.validate_every={-(-config.train.steps // 4)}"])
    except ValueError as error:
        raise ValueError(f"variants.{variant}: {error}") from None
    return PlannedRun(name, variant, seed, config, cores, dict(settings))


def _distinct(runs: list[PlannedRun]) -> list[PlannedRun]:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runs are named {name}: rename a variant, or remove a repeated value of a grid")
    return runs


def check_keys(assignments: Iterable[str]) -> None:
    """Raise ValueError for an override of a field that an experiment sets itself."""
    for item in assignments:
        key = item.partition("=")[0]
        if key in OWN_KEYS:
            raise ValueError(f"{key} is not allowed in an experiment: {OWN_KEYS[key]}")


def assign(settings: Mapping[str, str]) -> Iterator[str]:
    """Yield settings as overrides."""
    return (f"{key}={value}" for key, value in settings.items())


def short(settings: Mapping[str, str]) -> str:
    """Return settings as a part of a run's name: `lr0.003-alpha0.5`."""
    parts = (f"{key.partition('.')[2]}{value}" for key, value in settings.items())
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))
