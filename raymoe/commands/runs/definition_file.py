"""Experiments as YAML files. Imports neither torch nor Ray.

    title: learning rate of two models
    base: {preset: screen, data: {path: wikitext-103}}
    variants:
      flat: {label: "flat", model: {experts: flat, n_experts: 32, experts_per_token: 2, gate: softmax}}
      wide: {model: {d_expert: 512}, cores: 2}
    seeds: [0, 1, 2]
    cores: 1
    reference: flat
    sweep: {grid: {train.lr: [1e-3, 2e-3]}, select: perplexity, seed: 0, tune_share: 0.05, train: {steps: 366}}
    grid: {variants: [wide], model.layers: [2, 3]}

Sections have the fields of a config. `grid` makes a variant of each combination of values. `sweep` chooses one
combination per variant by a score on the tuning split (`data.tune_share`), before the final runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from raymoe.commands.runs.definition import (
    SCORES,
    Experiment,
    Grid,
    Score,
    Sweep,
    Variant,
    check_keys,
    expanded,
    planned,
    planned_sweep,
)
from raymoe.config import LARGEST_YAML, SECTIONS, hint, override, preset
from raymoe.config.overrides import check_key
from raymoe.config.yaml_text import assignments, compose, pairs, scalar

FOLDER = Path(__file__).resolve().parents[3] / "jobs" / "experiments"
"""The experiments of a checkout."""

TOP = ("title", "base", "variants", "grid", "seeds", "cores", "reference", "sweep")


def find_file(name: str, folder: Path = FOLDER) -> Path:
    """Return the file of an experiment: a path to a YAML file, or a name in `folder`. Raises FileNotFoundError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise FileNotFoundError(f"{path}: no such file")
    if (path := folder / f"{name}.yaml").is_file():
        return path
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    listed = f"one of {', '.join(known)}, or " if known else ""
    raise FileNotFoundError(f"unknown experiment {name!r}{hint(name, known)}; give {listed}the path of a YAML file")


def read_experiment(path: Path, overrides: Sequence[str] = (), name: str = "") -> Experiment:
    """Return the experiment of a file, with its grid expanded. `overrides` apply last, to all runs.

    Every config of the experiment is built once, so that no run is refused later. Raises ValueError with the file and
    the field, or OSError.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_YAML + 1)
    try:
        experiment = parse_experiment(content.decode("utf-8-sig"), name or path.stem, overrides)
        tried: dict[str, list[Mapping[str, str]]] = {name: [] for name in experiment.variants}
        for run in planned_sweep(experiment):
            tried[run.variant].append(run.settings)
        for i in range(max(1, *map(len, tried.values()))):
            planned(experiment, {name: settings[i % len(settings)] for name, settings in tried.items() if settings})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return experiment


def parse_experiment(text: str, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of YAML text. Raises ValueError with the field."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise ValueError(f"the name {name!r} is not allowed: letters, digits, '.', '_' and '-'")
    top = _known(compose(text), "the experiment", TOP)
    if "variants" not in top:
        raise ValueError("the experiment has no `variants`: give at least one")
    with _inside("--set"):
        for item in overrides:
            key, equals, _ = item.partition("=")
            if not equals:
                raise ValueError(f"{item!r} is not an override: write section.field=value, for example train.steps=100")
            check_key(key)
        check_keys(overrides)
    with _inside("base"):
        base_nodes = dict(pairs(top["base"], "base")) if "base" in top else {}
        base_name = scalar(base_nodes.pop("preset"), "preset") if "preset" in base_nodes else "screen"
        base_overrides = _sections(base_nodes, ("preset",))
        base = override(preset(base_name), base_overrides)
    variants = {key: _variant(key, node) for key, node in pairs(top["variants"], "variants")}
    if not variants:
        raise ValueError("variants: give at least one")
    grid = _grid(top["grid"], "grid", variants) if "grid" in top else None
    if grid:
        variants = expanded(variants, grid)
    experiment = Experiment(
        name=name, title=scalar(top["title"], "title") if "title" in top else "", base=base, variants=variants,
        seeds=tuple(_integer(v, "seeds", 0) for v in _list(top["seeds"], "seeds")) if "seeds" in top else (0,),
        cores=_integer(scalar(top["cores"], "cores"), "cores", 1) if "cores" in top else 1,
        sweep=_sweep(top["sweep"], variants) if "sweep" in top else None,
        reference=scalar(top["reference"], "reference") if "reference" in top else next(iter(variants)),
        base_overrides=tuple(base_overrides), overrides=tuple(overrides), text=text,
    )  # fmt: skip
    _check(experiment, grid)
    return experiment


def _check(experiment: Experiment, grid: Grid | None) -> None:
    """Raise ValueError for parts of an experiment that contradict each other. `grid`: that of its variants."""
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise ValueError("seeds: a seed occurs twice: remove one")
    labels = [variant.label for variant in experiment.variants.values()]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"variants: two have the label {label!r}: rename one")
    reference = experiment.reference
    if reference not in experiment.variants:
        raise ValueError(f"reference: unknown variant {reference!r}" + _one_of(reference, experiment.variants))
    for of, field in ((grid, "grid"), (experiment.sweep and experiment.sweep.grid, "sweep.grid")):
        for key in of.values if of else ():
            if any(item.startswith(f"{key}=") for item in experiment.overrides):
                raise ValueError(f"{key} is in {field}: an override of it would give all its runs one value")


def _variant(name: str, node: yaml.Node) -> Variant:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise ValueError(f"variants: the name {name!r} is not allowed: letters, digits, '.', '_' and '-'")
    with _inside(f"variants.{name}"):
        nodes = {} if _empty(node) else dict(pairs(node, name))
        label = scalar(nodes.pop("label"), "label") if "label" in nodes else name
        cores = _integer(scalar(nodes.pop("cores"), "cores"), "cores", 1) if "cores" in nodes else None
        return Variant(label, tuple(_sections(nodes, ("label", "cores"))), cores)


def _sweep(node: yaml.Node, variants: Mapping[str, Variant]) -> Sweep:
    with _inside("sweep"):
        nodes = dict(pairs(node, "sweep"))
        for needed in ("grid", "select"):
            if needed not in nodes:
                raise ValueError(f"`{needed}` is missing")
        grid = _grid(nodes.pop("grid"), "grid", variants)
        given = scalar(nodes.pop("select"), "select")
        select: Score | None = next((score for score in SCORES if score == given), None)
        if select is None:
            raise ValueError(f"select={given!r} is not allowed: one of {', '.join(SCORES)}")
        seed = _integer(scalar(nodes.pop("seed"), "seed"), "seed", 0) if "seed" in nodes else 0
        share = scalar(nodes.pop("tune_share"), "tune_share") if "tune_share" in nodes else "0.05"
        tune = override(preset("screen"), [f"data.tune_share={share}"]).data.tune_share
        own = _sections(nodes, ("grid", "select", "seed", "tune_share"))
        return Sweep(grid, select, seed, tune, tuple(own))


def _grid(node: yaml.Node, name: str, variants: Mapping[str, Variant]) -> Grid:
    only, values = None, {}
    with _inside(name):
        for key, found in pairs(node, name):
            if key == "variants":
                only = tuple(_list(found, key))
                for variant in only:
                    if variant not in variants:
                        raise ValueError(f"unknown variant {variant!r}" + _one_of(variant, variants))
                continue
            check_key(key)
            check_keys([key])
            values[key] = tuple(_list(found, key))
            if len(set(values[key])) < len(values[key]):
                raise ValueError(f"{key}: a value occurs twice: remove one")
        if not values:
            raise ValueError("give a list of values of at least one field, for example train.lr: [1e-3, 2e-3]")
    return Grid(values, only)


def _sections(nodes: Mapping[str, yaml.Node], more: Sequence[str]) -> list[str]:
    found = assignments(nodes, (*more, *SECTIONS))
    check_keys(found)
    return found


def _known(node: yaml.Node | None, name: str, known: Sequence[str]) -> dict[str, yaml.Node]:
    found = dict(pairs(node, name))
    for key in found:
        if key not in known:
            raise ValueError(f"unknown key {key!r}" + (hint(key, known) or f": one of {', '.join(known)}"))
    return found


def _list(node: yaml.Node, name: str) -> list[str]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise ValueError(f"{name} must be a list of at least one value (line {node.start_mark.line + 1})")
    return [scalar(item, f"a value of {name}") for item in node.value]


def _integer(text: str, name: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ValueError(f"{name}={text!r} is not allowed: expected an integer of {least} or more")
    return int(text)


def _empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~")


def _one_of(name: str, known: Iterable[str]) -> str:
    return hint(name, known) or f": one of {', '.join(known)}"


@contextmanager
def _inside(field: str) -> Iterator[None]:
    """Name the field of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
