"""Measures of routing in a run: any number of ranks has those of one process, and records have all of them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.model.observation import Observation
from raymoe.model.routing_sums import Measures, routing_measures
from raymoe.model.transformer import Transformer
from raymoe.parallel.sharded import shard
from raymoe.training.routing import routing_record
from tests.parallel.test_parallel import MODELS, UNEVEN
from tests.support import processes
from tests.support.synthetic import Synthetic
from tests.training.test_loop import config, records, train

MEASURES = ("bias_forced_share", "chosen_probability", "router_entropy")
BIASES = ("selection_bias_min", "selection_bias_max", "selection_bias_std")


def set_biases(transformer: Transformer) -> None:
    """Give each selection bias a value that follows from its logical key."""
    for key, view in transformer.logical().items():
        if key.endswith("bias"):
            view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))))


def measured(rank: int, world: int, name: str) -> Measures:
    """Return the measures of one batch of 4 grains, divided among the ranks."""
    model = MODELS[name]
    sharded = shard(model, UNEVEN if model.experts == "clustered" else model.default_assignment())
    sharded.transformer.double().initialize(seed=1)
    with torch.no_grad():
        set_biases(sharded.transformer)
    tokens = torch.randint(29, (4, 2, 8), generator=torch.Generator().manual_seed(0))
    sums_HLQ = Observation(model).routing_sums()
    for turn in range(-(-4 // world)):
        index = turn * world + rank
        seen = Observation(model, routing=True)
        sharded.transformer(tokens[index] if index < 4 else tokens[:0].flatten(0, 1), seen=seen)
        sums_HLQ += seen.routing_sums()
    return routing_record(sharded.transformer, sums_HLQ, torch.device("cpu"))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["clustered", "bases alone", "flat"])
def test_several_processes_equal_one(name: str, tmp_path: Path) -> None:
    """With 5 ranks and 4 clusters, two ranks have the same cluster."""
    expected = measured(0, 1, name)
    assert set(expected) == {*MEASURES, *BIASES}
    levels = {"clustered": {"clusters", "experts"}, "bases alone": {"clusters"}, "flat": {"experts"}}[name]
    for world in (2, 5):
        for result in processes.run(world, measured, name, folder=tmp_path):
            for measure, by_level in expected.items():
                assert {level for level, values in by_level.items() if values} == levels
                for level, values in by_level.items():
                    assert result[measure][level] == (values and pytest.approx(values, rel=1e-10)), (measure, level)
    for level in levels:
        assert any(0 < share < 1 for share in expected["bias_forced_share"][level] or [] if share is not None)


def check(record: dict[str, Any], levels: set[str], layers: int) -> None:
    for name in (*MEASURES, *BIASES):
        assert {level for level, values in record[name].items() if values} == levels, name
        assert all(len(record[name][level]) == layers for level in levels)
    for level in levels:
        assert all(0 <= x <= 1 for name in MEASURES for x in record[name][level])
        assert all(x < 0.999 for x in record["router_entropy"][level])
        bounds = zip(record["selection_bias_min"][level], record["selection_bias_max"][level], strict=True)
        assert all(low < 0 < high for low, high in bounds)


@pytest.mark.parametrize(("kind", "levels"), [("clustered", {"clusters", "experts"}), ("flat", {"experts"}), ("dense", set())])  # fmt: skip
def test_records_of_a_run_have_the_measures(kind: str, levels: set[str], tmp_path: Path) -> None:
    train(
        0, 1, str(tmp_path), (f"model.experts={kind}", "train.steps=7", "train.log_every=3", "train.validate_every=5")
    )
    trains, validations = records(tmp_path, "train"), records(tmp_path, "validation")
    assert [r["step"] for r in trains] == [3, 6, 7] and [r["step"] for r in validations] == [5, 7]
    for record in (*trains, *validations):
        check(record, levels, layers=2)


def test_only_logged_steps_observe_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measures cost nothing in other steps. A stop after such a step records the biases alone."""
    from raymoe.training import loop

    asked: list[bool] = []

    class Recording(Observation):
        def __init__(self, *arguments: Any, routing: bool = False, **options: Any) -> None:
            asked.append(routing)
            super().__init__(*arguments, routing=routing, **options)

    monkeypatch.setattr(loop, "Observation", Recording)
    (tmp_path / "stop").touch()
    stopped = train(0, 1, str(tmp_path), ("train.steps=6", "train.log_every=3"))
    assert stopped["stopped"] and set(asked) == {False}
    (record,) = records(tmp_path, "train")
    assert record["bias_forced_share"] == {"clusters": None, "experts": None}
    assert len(record["selection_bias_std"]["clusters"]) == 2
    (tmp_path / "stop").unlink()
    asked.clear()
    train(0, 1, str(tmp_path), ("train.steps=6", "train.log_every=3"))
    grains = len(asked) // 5  # of each of the steps 2 to 6
    assert asked == [step % 3 == 0 for step in range(2, 7) for _ in range(grains)]


def test_a_validation_measures_all_its_windows(tmp_path: Path) -> None:
    """The last record of a run has the measures of one forward of the whole validation set."""
    from prometheus_client import CollectorRegistry

    from raymoe.metrics import TrainingMetrics
    from raymoe.training.loop import Trainer

    settings = config("train.steps=5")
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    trainer = Trainer(settings, Synthetic(31), tmp_path, metrics, torch.device("cpu"))  # type: ignore[arg-type]
    trainer.train()
    batch = Synthetic(31).validation(context=8, limit=None, rows=range(10))
    seen = Observation(settings.model, routing=True)
    with torch.no_grad():
        trainer.model.hidden(torch.from_numpy(batch.tokens[:, :-1]), seen=seen)
    expected = routing_measures(seen.routing_sums())
    found = records(tmp_path, "validation")[-1]
    for name in MEASURES:
        for level, values in expected[name].items():
            assert found[name][level] == pytest.approx(values, rel=1e-4), (name, level)
