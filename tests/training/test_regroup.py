"""Regrouping in the training loop: ranks agree for any behavior of the clusterer, and recorded plans replay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry

from raymoe.clustering.plan import RemapPlan
from raymoe.clustering.planner import NoPlan, NoPlanReason
from raymoe.clustering.similarity import NEEDED
from raymoe.clustering.statistics import Statistics
from raymoe.config import Config
from raymoe.metrics import TrainingMetrics
from raymoe.model.observation import Observation
from raymoe.parallel.sharded import shard
from raymoe.training.load import RoutingLoad
from raymoe.training.loop import Trainer
from raymoe.training.regroup.clients import DirectClient, ReplayClient
from raymoe.training.regroup.clusterer import (
    Clusterer,
    ClustererStatus,
    GainMeasured,
    Message,
    NoPlanMade,
    PlanMade,
)
from raymoe.training.regroup.recorder import Recorder
from tests.support import processes
from tests.support.presets import residual_tiny
from tests.support.synthetic import Synthetic
from tests.training.test_loop import SMALL, copy_at, losses, records

REGROUP = (
    "regroup.burn_in=10", "regroup.period=10", "regroup.plan_lag=3", "regroup.overlap=4", "regroup.stats_every=2",
    "regroup.sample=32", "regroup.mode=lockstep", "regroup.force=10", "checkpoint.keep=9", "train.validate_every=40",
    "train.lr=1e-2", "checkpoint.every=5",
)  # fmt: skip


def config(*changes: str) -> Config:
    return residual_tiny(*SMALL, *REGROUP, *changes)


class Gathering(DirectClient):
    """Calls a clusterer in each process. Messages of all ranks at a step are gathered to it."""

    def send(self, message: Message) -> None:
        messages: list[Any] = [message]
        if dist.is_initialized():
            messages = [None] * dist.get_world_size()
            dist.all_gather_object(messages, message)
        for each in messages:
            self.clusterer.observe(each)


class Scripted:
    """A client whose statuses the test defines by the number of the poll."""

    def __init__(self, decide: Callable[[int], Any]) -> None:
        self.decide, self.polls, self.lost = decide, 0, 0

    def ready(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        """Drop the message."""

    def poll(self, attempt: int) -> Any:
        self.polls += 1
        return self.decide(self.polls)

    def flush(self) -> None:
        """Return at once: no message is sent."""

    wait_for_status = poll


def train(rank: int, world: int, run: str, changes: tuple[str, ...], decide: Any = None) -> dict[str, Any]:
    """Train to the end. Return this rank's tensors, and the version before each step."""
    settings = config(*changes)
    client: Any = Scripted(decide) if decide else Gathering(Clusterer(settings.to_dict()))
    if settings.regroup.replay:
        client = ReplayClient(Path(settings.regroup.replay))
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    trainer = Trainer(settings, Synthetic(31), Path(run), metrics, torch.device("cpu"), client)  # type: ignore[arg-type]
    versions: list[int] = []
    step = trainer.forward_backward

    def record_version(number: int) -> Any:
        versions.append(trainer.position.version)
        return step(number)

    trainer.forward_backward = record_version  # type: ignore[method-assign]
    trainer.train()
    tensors = trainer.model.logical() | trainer.optimizer.logical()
    return {
        "tensors": {k: v.clone() for k, v in tensors.items()}, "versions": versions,
        "membership": trainer.position.membership, "probe": trainer.probe(),
    }  # fmt: skip


def plans(run: Path, *what: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "plans.jsonl").read_text().splitlines()]
    return [record for record in found if record["name"] in what]


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


# The whole loop


@pytest.mark.dist
def test_lockstep_is_deterministic_and_replay_repeats_it_before_and_after_a_resume(tmp_path: Path) -> None:
    runs = [fresh(tmp_path / name) for name in ("first", "second")]
    results = [processes.run(2, train, str(run), (), folder=tmp_path) for run in runs]
    first, second = runs
    applied = plans(first, "applied")
    assert applied[0]["plan"]["forced"] and applied[0]["step"] == 13 and len(applied) >= 2
    assert losses(first) == losses(second)  # bit for bit
    strip = lambda record: {k: v for k, v in record.items() if k not in ("pause_ms", "time", "seconds")}  # noqa: E731
    everything = ("made", "applied", "refused", "no_plan", "gain_measured", "overlap_ended")
    assert [strip(r) for r in plans(first, *everything)] == [strip(r) for r in plans(second, *everything)]
    for ranks in results:
        assert ranks[0]["versions"] == ranks[1]["versions"]
        assert ranks[0]["membership"] == ranks[1]["membership"]
    for record in applied:
        assert record["probe_after"] == pytest.approx(record["probe_before"], rel=1e-5)
        assert record["bytes"] > 0 and record["pause_ms"] > 0
    off = fresh(tmp_path / "off")
    processes.run(2, train, str(off), ("regroup.mode=off",), folder=tmp_path)
    assert losses(off)[:13] == losses(first)[:13] and losses(off)[13:] != losses(first)[13:]

    again = fresh(tmp_path / "replay")
    changes = ("regroup.mode=replay", f"regroup.replay={first / 'plans.jsonl'}")
    processes.run(2, train, str(again), changes, folder=tmp_path)
    np.testing.assert_allclose(losses(again), losses(first), rtol=1e-5)
    assert [r["plan"]["assignment"] for r in plans(again, "applied")] == [r["plan"]["assignment"] for r in applied]

    # From a checkpoint within an overlap, with other numbers of workers, the recorded plans are applied.
    for world in (1, 3):
        resumed = copy_at(first, tmp_path / f"on{world}", 15)
        shutil.copy(first / "plans.jsonl", resumed)
        if world == 1:
            train(0, 1, str(resumed), changes)
        else:
            processes.run(world, train, str(resumed), changes, folder=tmp_path)
        np.testing.assert_allclose(losses(resumed)[15:35], losses(first)[15:35], rtol=1e-5)
        assert [r["step"] for r in plans(resumed, "applied", "overlap_ended")][:2] == [13, 17]


PRIVATE = ("model.expert_kind=private", "model.expert_width=5", "model.clusters_per_token=2")
COACTIVATION = ("regroup.similarity=coactivation", "regroup.force_kind=random")


@pytest.mark.dist
@pytest.mark.parametrize("base", [0, 7])
def test_private_experts_regroup_and_two_workers_equal_one(base: int, tmp_path: Path) -> None:
    """The plans of one and two workers are equal, and a resume within an overlap continues the run."""
    changes = (*PRIVATE, f"model.base_width={base}", *COACTIVATION, "train.lr=1e-3", "regroup.min_gain=0")
    runs = [fresh(tmp_path / name) for name in ("one", "two")]
    train(0, 1, str(runs[0]), changes)
    processes.run(2, train, str(runs[1]), changes, folder=tmp_path)
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-5)
    applied = [plans(run, "applied") for run in runs]
    assert applied[0] and applied[0][0]["plan"]["forced"] and applied[0][0]["moves"] == 8
    assert [r["plan"]["assignment"] for r in applied[0]] == [r["plan"]["assignment"] for r in applied[1]]
    for record in applied[0]:
        assert record["probe_after"] == pytest.approx(record["probe_before"], rel=1e-5)
    (made, *others) = plans(runs[0], "made", "no_plan", "gain_measured")
    assert made["similarity_kind"] == "coactivation" and made["force_kind"] == "random"
    assert others and all(r["similarity_kind"] == "coactivation" and "force_kind" not in r for r in others)
    resumed = copy_at(runs[0], tmp_path / "resumed", 15)
    processes.run(3, train, str(resumed), changes, folder=tmp_path)
    np.testing.assert_allclose(losses(resumed), losses(runs[0]), rtol=1e-5)
    assert [r["plan"]["assignment"] for r in plans(resumed, "applied")] == [
        r["plan"]["assignment"] for r in applied[0] if r["step"] > 15
    ]


def test_a_resume_with_another_similarity_waits_for_its_sample(tmp_path: Path) -> None:
    """A checkpoint without counts of co-activation is read; the first plan follows the next sample."""
    train(0, 1, str(tmp_path), ("train.steps=15", "regroup.force=0"))
    train(0, 1, str(tmp_path), ("train.steps=25", "regroup.force=20", *COACTIVATION))
    made = [r for r in plans(tmp_path, "made") if r["similarity_kind"] == "coactivation"]
    assert [r["step"] for r in made] == [20]
    train(0, 1, str(tmp_path), ("train.steps=35", "regroup.force=0"))
    early, sampled = [r for r in plans(tmp_path, "made", "no_plan") if r["step"] == 30]
    assert early["reason"] == "not sampled" and sampled.get("reason") != "not sampled"
    assert early["similarity_kind"] == sampled["similarity_kind"] == "counterfactual"


def test_a_resume_without_regrouping_ends_the_overlap(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=15",))
    result = train(0, 1, str(tmp_path), ("regroup.mode=off", "train.steps=30"))
    assert not any(result["membership"].ghosts) and set(result["versions"]) == {1}
    assert not any("ghosts" in key for key in result["tensors"])
    assert records(tmp_path, "assignment")[-1]["version"] == 1


def test_train_records_split_the_step_time(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=4", "regroup.mode=off"))
    for record in records(tmp_path, "train"):
        (compute,), (communication,) = record["compute_ms"], record["communication_ms"]
        assert compute > 0 and communication > 0 and compute + communication <= record["step_ms"]


@pytest.mark.parametrize("similarity", ["counterfactual", "paper", "coactivation"])
def test_statistics_survive_a_restart(similarity: str, tmp_path: Path) -> None:
    """Saved and restored, they equal those of an uninterrupted run."""
    gathered: list[dict[str, np.ndarray]] = []
    for run in (fresh(tmp_path / "whole"), tmp_path / "resumed"):
        if not run.exists():
            copy_at(tmp_path / "whole", run, 15)
        settings = config("regroup.force=0", "regroup.min_gain=1", "train.steps=20", f"regroup.similarity={similarity}")
        metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
        client = DirectClient(Clusterer(settings.to_dict()))
        trainer = Trainer(settings, Synthetic(31), run, metrics, torch.device("cpu"), client)  # type: ignore[arg-type]
        trainer.train()
        gathered.append(trainer.regrouping.recorder.total.arrays())  # type: ignore[union-attr]
    assert {key for key in gathered[0] if key.startswith("gram.")} == {f"gram.{name}" for name in NEEDED[similarity]}
    for key, array in gathered[0].items():
        np.testing.assert_allclose(gathered[1][key], array, rtol=1e-5, atol=1e-8, err_msg=key)


# Ranks agree for any status


def good(version: int = 1, made: int = 5, **changes: Any) -> PlanMade:
    """Return a valid decision after step `made`; `changes` to the plan's fields can make it malformed."""
    rows = [list(row) for row in config().model.default_assignment()]
    rows[0][0], rows[0][5] = rows[0][5], rows[0][0]
    plan = RemapPlan(version, made, made + 3, tuple(map(tuple, rows)), 0.5)
    return PlanMade(replace(plan, **changes), 0.1, None)


def statuses(at: int, *decisions: Any, **changes: Any) -> Callable[[int], Any]:
    """Return the decisions with poll `at`, which follows step `at`, and no decisions with other polls."""

    def decide(poll: int) -> ClustererStatus:
        return replace(ClustererStatus(1, poll, decisions, 0), **changes) if poll == at else empty(poll)

    return decide


def empty(poll: int) -> ClustererStatus:
    return ClustererStatus(1, poll, (), 0)


ROWS = config().model.default_assignment()
MALFORMED = {
    "late": (statuses(25, good()), "late"),
    "stale": (statuses(5, good(version=3)), "stale"),
    "already applied": (statuses(5, good(version=0)), "already applied"),
    "unknown cluster": (statuses(5, good(assignment=((9, *ROWS[0][1:]), ROWS[1]))), "unknown clusters"),
    "too few experts": (statuses(5, good(assignment=(ROWS[0][:-1], ROWS[1][:-1]))), "malformed"),
    "too few layers": (statuses(5, good(assignment=ROWS[:1])), "malformed"),
    "wrong sizes": (statuses(5, good(assignment=((1, 1, 0, *ROWS[0][3:]), ROWS[1]))), "sizes"),
    "nothing moves": (statuses(5, good(assignment=ROWS)), "nothing moves"),
    "no plan": (statuses(5, PlanMade("garbage", 0.1, None)), "malformed"),  # type: ignore[arg-type]
    "NaN": (statuses(5, good(expected_gain=float("nan"))), "malformed"),
    "a huge version": (statuses(5, good(version=10**400)), "malformed"),
    "a huge cluster": (statuses(5, good(assignment=((10**400, *ROWS[0][1:]), ROWS[1]))), "malformed"),
    "another effective step": (statuses(5, good(effective_step=10**6)), "malformed"),
    "a future step": (statuses(5, good(made=9)), "malformed"),
    "a dict": (statuses(5, {"plan": 3}), "malformed"),
    "a decision without fields": (statuses(5, NoPlanMade(None, None)), "malformed"),  # type: ignore[arg-type]
    "an array as gain": (statuses(5, GainMeasured(1, np.zeros(2), None)), "malformed"),  # type: ignore[arg-type]
    "no status": (lambda poll: b"\x00" if poll == 5 else None, "malformed"),
    "no decisions": (lambda poll: ClustererStatus(1, 1, None, 0) if poll == 5 else None, "malformed"),  # type: ignore[arg-type]
    "infinite messages": (statuses(5, refused_messages=float("inf")), "malformed"),
    "an array": (statuses(5, incarnation=np.zeros(2)), "malformed"),
    "a step that is no int": (statuses(5, step="x"), "malformed"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed")
    train(0, 1, str(run), ("regroup.mode=off", "train.steps=30"))
    return losses(run)


@pytest.mark.parametrize("case", MALFORMED)
def test_wrong_statuses_are_refused_with_a_reason_and_training_continues(
    case: str, undisturbed: list[float], tmp_path: Path
) -> None:
    decide, reason = MALFORMED[case]
    result = train(0, 1, str(tmp_path), ("regroup.mode=async", "train.steps=30"), decide)
    (refused,) = plans(tmp_path, "refused")
    assert refused["reason"] == reason and isinstance(refused["detail"], str), refused
    assert not plans(tmp_path, "applied") and set(result["versions"]) == {0}
    assert losses(tmp_path) == undisturbed


def two_plans(poll: int) -> ClustererStatus:
    """Return a plan after step 5, and after step 7 another while the first is pending or overlaps."""
    rows = good().plan.assignment
    other = rows[0], (rows[1][9], *rows[1][1:9], rows[1][0])
    decisions = {5: (good(),), 7: (good(version=2, made=7, assignment=other),)}
    return replace(empty(poll), decisions=decisions.get(poll, ()))


def different_by_rank(poll: int) -> ClustererStatus:
    """Return other plans to rank 1, which does not poll; the first plan of rank 0 is late."""
    if dist.get_rank():
        return replace(empty(poll), decisions=(good(made=poll),))
    decisions = {12: (good(made=9),), 16: (good(made=16),)}
    return replace(empty(poll), decisions=decisions.get(poll, ()))


def malformed_on_rank_0(poll: int) -> Any:
    """Return one malformed status after another."""
    return list(MALFORMED.values())[poll // 2 % len(MALFORMED)][0](5 if poll % 2 else 25)


@pytest.mark.dist
def test_all_ranks_have_the_same_version_at_every_step(tmp_path: Path) -> None:
    run = fresh(tmp_path / "late")
    results = processes.run(
        2, train, str(run), ("regroup.mode=async", "train.steps=35"), different_by_rank, folder=tmp_path
    )
    assert results[0]["versions"] == results[1]["versions"] == [0] * 19 + [1] * 16
    assert [r["reason"] for r in plans(run, "refused")] == ["late"]
    run = fresh(tmp_path / "two")
    results = processes.run(2, train, str(run), ("regroup.mode=async", "train.steps=35"), two_plans, folder=tmp_path)
    assert results[0]["versions"] == results[1]["versions"] == [0] * 8 + [1] * 27
    assert [r["reason"] for r in plans(run, "refused")] == ["busy"]
    run = fresh(tmp_path / "garbage")
    changes = ("regroup.mode=async", "train.steps=45")
    results = processes.run(2, train, str(run), changes, malformed_on_rank_0, folder=tmp_path)
    assert results[0]["versions"] == results[1]["versions"] == [0] * 45
    assert len(plans(run, "refused")) >= len(MALFORMED) and not plans(run, "applied")


def test_a_period_without_a_plan_is_recorded_and_nothing_is_refused(tmp_path: Path) -> None:
    no_plan = NoPlan(5, NoPlanReason.NOTHING_TO_GAIN, "the best layer gains 0 of min_gain 0.01", 0.0)
    train(0, 1, str(tmp_path), ("regroup.mode=async", "train.steps=10"), statuses(5, NoPlanMade(no_plan, 0.1)))
    (record,) = plans(tmp_path, "no_plan")
    assert (record["step"], record["reason"], record["detail"]) == (5, "nothing to gain", no_plan.detail)
    assert not plans(tmp_path, "refused")


class Queueing(DirectClient):
    """Executes calls in order and later, as an actor does. An early poll returns an early status."""

    def __init__(self, clusterer: Clusterer) -> None:
        super().__init__(clusterer)
        self.calls: list[Callable[[], Any]] = []
        self.polled: list[ClustererStatus] = []
        self.waiting = False

    def run(self) -> None:
        while self.calls:
            self.calls.pop(0)()

    def ready(self) -> bool:
        return not self.calls

    def send(self, message: Message) -> None:
        self.calls.append(lambda: self.clusterer.observe(message))

    def flush(self) -> None:
        self.run()

    def poll(self, attempt: int) -> ClustererStatus | None:
        if not self.waiting:
            self.waiting = True
            self.calls.append(lambda: self.polled.append(self.clusterer.poll(attempt)))
            return None
        self.run()
        self.waiting = False
        return self.polled.pop()

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        return self.poll(attempt) or self.poll(attempt)


def test_lockstep_does_not_depend_on_the_clusterers_pace(tmp_path: Path) -> None:
    runs = []
    for kind in (DirectClient, Queueing):
        run = fresh(tmp_path / kind.__name__)
        settings = config("regroup.plan_lag=1")
        metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
        client = kind(Clusterer(settings.to_dict()))
        Trainer(settings, Synthetic(31), run, metrics, torch.device("cpu"), client).train()  # type: ignore[arg-type]
        runs.append(run)
    assert plans(runs[0], "applied") and losses(runs[0]) == losses(runs[1])
    assert [r["step"] for r in plans(runs[0], "applied")] == [r["step"] for r in plans(runs[1], "applied")]


def test_a_resume_at_the_effective_step_applies_a_plan_once(tmp_path: Path) -> None:
    """The checkpoint of a step precedes the plan of the next step; a resume removes the plan's record."""
    settings = ("train.steps=30", "regroup.plan_lag=5")
    whole = fresh(tmp_path / "whole")
    train(0, 1, str(whole), settings)
    assert plans(whole, "applied")[0]["step"] == 15
    resumed = copy_at(whole, tmp_path / "resumed", 15)
    shutil.copy(whole / "plans.jsonl", resumed)
    replay = ("regroup.mode=replay", f"regroup.replay={whole / 'plans.jsonl'}")
    train(0, 1, str(resumed), (*settings, *replay))
    versions = [r["plan"]["version"] for r in plans(resumed, "applied")]
    assert versions == sorted(set(versions)) and [r["version"] for r in records(resumed, "assignment")].count(1) <= 1


def test_a_diverged_step_does_not_change_the_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.forward_backward

    def poisoned(self: Trainer, step: int) -> Any:
        if step not in (5, 9):  # a recorded step, and the last step of a period
            return real(self, step)
        weight = self.model.layers[0].ffn_norm  # type: ignore[union-attr]
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        result = real(self, step)
        with torch.no_grad():
            weight.copy_(saved)
        return result

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    settings = config("regroup.force=0", "train.steps=20")
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    client = DirectClient(Clusterer(settings.to_dict()))
    trainer = Trainer(settings, Synthetic(31), tmp_path, metrics, torch.device("cpu"), client)  # type: ignore[arg-type]
    trainer.train()
    assert all(np.isfinite(array).all() for array in trainer.regrouping.recorder.total.arrays().values())  # type: ignore[union-attr]
    assert client.clusterer.poll(1).refused_messages == 0
    assert trainer.position.skipped == 2


# The clusterer


def message(attempt: int, step: int, rank: int = 0, world: int = 1, version: int = 0, seed: int = 0) -> Message:
    settings = config()
    model = settings.model
    chance = np.random.default_rng([seed, rank])
    vectors = chance.standard_normal((model.layers, model.n_experts, 50))
    gram = vectors @ vectors.transpose(0, 2, 1)
    if world > 1:
        gram[[layer for layer in range(model.layers) if layer % world != rank]] = 0.0
    empty = Statistics.empty(version, model.layers, model.n_experts, model.d_model, settings.regroup.beta, step)
    count = np.full((model.layers, model.n_experts), 7.0)
    stats = replace(
        empty, rows_LE=count.astype(np.int64), count_LE=count, gram={"residual": gram, "answer": gram}, sampled=3
    )
    return Message(attempt, rank, world, model.default_assignment(), True, stats)


def kinds(status: ClustererStatus) -> list[type]:
    return [type(decision) for decision in status.decisions]


def only_plan(status: ClustererStatus) -> RemapPlan:
    (decision,) = status.decisions
    assert isinstance(decision, PlanMade)
    return decision.plan


def test_the_clusterer_plans_once_per_period_after_all_workers_reported() -> None:
    clusterer = Clusterer(config().to_dict())
    clusterer.observe(message(1, 8))
    assert kinds(clusterer.poll(1)) == []  # before the burn-in
    clusterer.observe(message(2, 10, rank=0, world=2))
    assert kinds(clusterer.poll(2)) == []
    clusterer.observe(message(2, 10, rank=1, world=2))
    status = clusterer.poll(2)
    assert kinds(status) == [PlanMade] and status.step == 10
    assert only_plan(status).effective_step == 13
    assert kinds(clusterer.poll(2)) == []
    for rank in (0, 1):
        clusterer.observe(message(2, 16, rank=rank, world=2))
    assert kinds(clusterer.poll(2)) == []
    clusterer.observe(message(1, 30))  # from an attempt that was rolled back
    assert clusterer.poll(2).step == 16 and kinds(clusterer.poll(1)) == []


def test_the_clusterer_measures_the_gain_of_a_plan_on_later_statistics() -> None:
    clusterer = Clusterer(config().to_dict())
    clusterer.observe(message(1, 10))
    plan = only_plan(clusterer.poll(1))
    clusterer.observe(replace(message(1, 20, version=1), assignment=plan.assignment))
    (measured,) = [d for d in clusterer.poll(1).decisions if isinstance(d, GainMeasured)]
    assert measured.version == 1
    assert measured.gain == pytest.approx(plan.expected_gain, rel=1e-9)  # the same statistics


@pytest.mark.parametrize("case", ["nothing", "dictionary", "shapes", "nan", "negative"])
def test_the_clusterer_counts_malformed_messages(case: str) -> None:
    clusterer = Clusterer(config().to_dict())
    sound = message(1, 10)
    stats = sound.statistics
    bad: Any = {
        "nothing": None,
        "dictionary": {"attempt": 1},
        "shapes": replace(sound, statistics=replace(stats, count_LE=stats.count_LE[:, 1:])),
        "nan": replace(sound, statistics=replace(stats, count_LE=stats.count_LE * np.nan)),
        "negative": replace(sound, statistics=replace(stats, rows_LE=-stats.rows_LE)),
    }[case]
    clusterer.observe(bad)
    assert clusterer.poll(1).refused_messages == 1 and clusterer.poll(1).decisions == ()
    clusterer.observe(sound)
    assert kinds(clusterer.poll(1)) == [PlanMade]


def test_a_restarted_clusterer_receives_all_statistics_again(tmp_path: Path) -> None:
    """Killed in each phase of a period, it makes the next plan from complete statistics."""

    class Mortal(DirectClient):
        """Replaces the clusterer at given polls."""

        polls = 0

        def poll(self, attempt: int) -> ClustererStatus | None:
            self.polls += 1
            if self.polls in deaths:
                self.clusterer = Clusterer(settings.to_dict())
            return super().poll(attempt)

        wait_for_status = poll

    settings = config("regroup.mode=async", "regroup.force=0", "train.steps=40", "regroup.min_gain=1e-9")
    for deaths in ((3,), (9, 10), (11,), (14, 19, 29)):
        run = fresh(tmp_path / "-".join(map(str, deaths)))
        metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
        client = Mortal(Clusterer(settings.to_dict()))
        trainer = Trainer(settings, Synthetic(31), run, metrics, torch.device("cpu"), client)  # type: ignore[arg-type]
        trainer.train()
        assert len(plans(run, "clusterer_restarted")) == len(deaths)
        assert len(losses(run)) == 40 and len(plans(run, "applied")) >= 1
        recorder = trainer.regrouping.recorder  # type: ignore[union-attr]
        known = client.clusterer._by_rank[0]
        np.testing.assert_allclose(known.count_LE, recorder.total.count_LE)


def test_swapped_experts_of_a_real_model_are_restored() -> None:
    """Residuals form families, and two experts are in each other's cluster. The plan restores them."""
    settings = config("model.d_model=32", "model.d_expert=24", "model.n_experts=16", "regroup.force=0")
    model = settings.model
    true = model.default_assignment()
    swapped = [list(row) for row in true]
    for row, (a, b) in zip(swapped, ((1, 6), (9, 14)), strict=True):
        row[a], row[b] = row[b], row[a]
    sharded = shard(model, swapped)
    sharded.transformer.initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        families: dict[tuple[int, str], torch.Tensor] = {}
        for key, view in sharded.transformer.logical().items():
            if ".experts." in key and key.endswith(("_in", "_out")):
                layer, e, leaf = int(key.split(".")[1]), int(key.split(".")[3]), key.split(".")[-1]
                family = (layer, f"{true[layer][e]}{leaf}")
                shared = families.setdefault(family, 0.3 * torch.randn(view.shape, generator=generator))
                view.copy_(shared + 0.1 * torch.randn(view.shape, generator=generator))
    recorder = Recorder(settings, sharded, 0, 0)
    recorder.arm(10)
    corpus = Synthetic(model.vocabulary)
    rows = range(settings.train.global_batch)
    seen = Observation(model, **recorder.options(rows))
    batch = corpus.batch(seed=0, step=0, global_batch=len(rows), context=model.context, rows=rows)
    sharded.transformer(torch.from_numpy(batch.tokens)[:, :-1], seen=seen)
    recorder.add(rows, seen)
    loads = seen.loads()
    load = RoutingLoad(loads.clusters_LC, loads.members_LM, loads.rows_L[:, None], model.n_experts)
    assignment = tuple(map(tuple, swapped))
    recorder.read(10, load, assignment)
    clusterer = Clusterer(settings.to_dict())
    clusterer.observe(Message(1, 0, 1, assignment, False, recorder.total))
    assert only_plan(clusterer.poll(1)).assignment == tuple(map(tuple, true))
