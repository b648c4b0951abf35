"""Regrouping inside the loop: all ranks agree, whatever the clusterer does; what was recorded can be repeated."""

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

from raymoe.config import Config, override, preset
from raymoe.metrics import TrainingMetrics
from raymoe.model.observation import Observation
from raymoe.parallel.sharded import shard
from raymoe.training.load import RoutingLoad
from raymoe.training.loop import Trainer
from raymoe.training.regroup.clients import DirectClient, ReplayClient
from raymoe.training.regroup.clusterer import Clusterer, ClustererStatus, Message
from raymoe.training.regroup.recorder import Recorder
from tests.support import processes
from tests.support.synthetic import Synthetic
from tests.training.test_loop import SMALL, copy_at, losses, records

REGROUP = (
    "regroup.burn_in=10", "regroup.period=10", "regroup.plan_lag=3", "regroup.overlap=4", "regroup.stats_every=2",
    "regroup.sample=32", "regroup.mode=lockstep", "regroup.force=10", "checkpoint.keep=9", "train.validate_every=40",
    "train.lr=1e-2", "checkpoint.every=5",
)  # fmt: skip


def config(*changes: str) -> Config:
    return override(preset("tiny"), [*SMALL, *REGROUP, *changes])


class Gathering(DirectClient):
    """The clusterer in rank 0's process: what ranks post at the same step is gathered to it."""

    def send(self, message: Message) -> None:
        messages: list[Any] = [message]
        if dist.is_initialized():
            messages = [None] * dist.get_world_size()
            dist.all_gather_object(messages, message)
        for each in messages:
            self.clusterer.observe(each)


class Scripted:
    """A clusterer that says what the test says: answers by the number of the poll."""

    def __init__(self, decide: Callable[[int], Any]) -> None:
        self.decide, self.polls, self.lost = decide, 0, 0

    def ready(self) -> bool:
        return True

    def send(self, message: Message) -> None:
        """Nobody listens."""

    def poll(self, attempt: int) -> Any:
        self.polls += 1
        return self.decide(self.polls)

    def flush(self) -> None:
        """Nothing is in flight."""

    wait_for_status = poll


def train(rank: int, world: int, run: str, changes: tuple[str, ...], decide: Any = None) -> dict[str, Any]:
    """A run to its end; what this rank holds, and the version before each step."""
    settings = config(*changes)
    client: Any = Scripted(decide) if decide else Gathering(Clusterer(settings.to_dict()))
    if settings.regroup.replay:
        client = ReplayClient(Path(settings.regroup.replay))
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    trainer = Trainer(settings, Synthetic(31), Path(run), metrics, torch.device("cpu"), client)  # type: ignore[arg-type]
    versions: list[int] = []
    step = trainer.forward_backward

    def watched(number: int) -> Any:
        versions.append(trainer.position.version)
        return step(number)

    trainer.forward_backward = watched  # type: ignore[method-assign]
    trainer.train()
    held = trainer.model.logical() | trainer.optimizer.logical()
    return {
        "held": {k: v.clone() for k, v in held.items()}, "versions": versions,
        "membership": trainer.position.membership, "probe": trainer.probe(),
    }  # fmt: skip


def plans(run: Path, *what: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "plans.jsonl").read_text().splitlines()]
    return [record for record in found if record["name"] in what]


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


# The loop as a whole


@pytest.mark.dist
def test_lockstep_is_deterministic_replay_repeats_it_and_a_resume_goes_on(tmp_path: Path) -> None:
    runs = [fresh(tmp_path / name) for name in ("first", "second")]
    results = [processes.run(2, train, str(run), (), folder=tmp_path) for run in runs]
    first, second = runs
    applied = plans(first, "applied")
    assert applied[0]["plan"]["reason"] == "forced" and applied[0]["step"] == 13 and len(applied) >= 2
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

    # From a checkpoint in the middle of an overlap, on other worlds, the recorded plans go on.
    for world in (1, 3):
        resumed = copy_at(first, tmp_path / f"on{world}", 15)
        shutil.copy(first / "plans.jsonl", resumed)
        if world == 1:
            train(0, 1, str(resumed), changes)
        else:
            processes.run(world, train, str(resumed), changes, folder=tmp_path)
        np.testing.assert_allclose(losses(resumed)[15:35], losses(first)[15:35], rtol=1e-5)
        assert [r["step"] for r in plans(resumed, "applied", "overlap_ended")][:2] == [13, 17]


def test_a_run_that_stops_regrouping_in_an_overlap_ends_it(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=15",))
    result = train(0, 1, str(tmp_path), ("regroup.mode=off", "train.steps=30"))
    assert not any(result["membership"].ghosts) and set(result["versions"]) == {1}
    assert not any("ghosts" in key for key in result["held"])
    assert records(tmp_path, "assignment")[-1]["version"] == 1


def test_statistics_outlive_a_restart(tmp_path: Path) -> None:
    """Saved and restored, they are what an undisturbed run has gathered."""
    gathered = []
    for run in (fresh(tmp_path / "whole"), tmp_path / "resumed"):
        if not run.exists():
            copy_at(tmp_path / "whole", run, 15)
        settings = config("regroup.force=0", "regroup.min_gain=1", "train.steps=20")
        metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
        client = DirectClient(Clusterer(settings.to_dict()))
        trainer = Trainer(settings, Synthetic(31), run, metrics, torch.device("cpu"), client)  # type: ignore[arg-type]
        trainer.train()
        gathered.append(trainer.regrouping.recorder.total.arrays())  # type: ignore[union-attr]
    for key, array in gathered[0].items():
        np.testing.assert_allclose(gathered[1][key], array, rtol=1e-5, atol=1e-8, err_msg=key)


# Ranks agree, whatever comes


def good(version: int = 1, made: int = 5, **changes: Any) -> dict[str, Any]:
    rows = [list(row) for row in config().model.default_assignment()]
    rows[0][0], rows[0][5] = rows[0][5], rows[0][0]
    plan = dict(
        version=version, made_at_step=made, effective_step=made + 3, assignment=rows, reason="r", expected_gain=0.5
    )
    return {"kind": "plan", "plan": plan | changes}


def answers(at: int, *decisions: Any, **changes: Any) -> Callable[[int], Any]:
    """What the decisions are told as at poll `at`, which is after step `at`; before and after it, nothing."""
    return lambda poll: (
        replace(ClustererStatus(1, poll, decisions, 0), **changes) if poll == at else ClustererStatus(1, poll, (), 0)
    )


ROWS = [list(row) for row in config().model.default_assignment()]
GARBAGE = {
    "late": (answers(25, good()), "late"),
    "stale": (answers(5, good(version=3)), "stale"),
    "already applied": (answers(5, good(version=0)), "already applied"),
    "unknown cluster": (answers(5, good(assignment=[[9, *ROWS[0][1:]], ROWS[1]])), "unknown clusters"),
    "too few experts": (answers(5, good(assignment=[ROWS[0][:-1], ROWS[1][:-1]])), "malformed"),
    "too few layers": (answers(5, good(assignment=ROWS[:1])), "malformed"),
    "wrong sizes": (answers(5, good(assignment=[[1, 1, 0, *ROWS[0][3:]], ROWS[1]])), "sizes"),
    "nothing": (answers(5, good(assignment=ROWS)), "nothing moves"),
    "not a plan": (answers(5, {"kind": "plan", "plan": "garbage"}), "malformed"),
    "NaN": (answers(5, good(expected_gain=float("nan"))), "malformed"),
    "a huge version": (answers(5, good(version=10**400)), "malformed"),
    "a huge cluster": (answers(5, good(assignment=[[10**400, *ROWS[0][1:]], ROWS[1]])), "malformed"),
    "a far step": (answers(5, good(effective_step=10**6)), "malformed"),
    "from the future": (answers(5, good(made=9)), "malformed"),
    "no kind": (answers(5, {"plan": 3}), "malformed"),
    "unknown kind": (answers(5, {"kind": "surprise"}), "malformed"),
    "not an answer": (lambda poll: b"\x00" if poll == 5 else None, "malformed"),
    "no decisions": (lambda poll: ClustererStatus(1, 1, None, 0) if poll == 5 else None, "malformed"),  # type: ignore[arg-type]
    "endless messages": (answers(5, refused_messages=float("inf")), "malformed"),
    "an array": (answers(5, incarnation=np.zeros(2)), "malformed"),
    "a step that is none": (answers(5, step="x"), "malformed"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed")
    train(0, 1, str(run), ("regroup.mode=off", "train.steps=30"))
    return losses(run)


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused_with_a_reason_and_training_goes_on(
    what: str, undisturbed: list[float], tmp_path: Path
) -> None:
    decide, reason = GARBAGE[what]
    result = train(0, 1, str(tmp_path), ("regroup.mode=async", "train.steps=30"), decide)
    refused = plans(tmp_path, "refused")
    assert len(refused) == 1 and refused[0]["reason"].startswith(reason), refused
    assert not plans(tmp_path, "applied") and set(result["versions"]) == {0}
    assert losses(tmp_path) == undisturbed


def two_plans(poll: int) -> ClustererStatus:
    """A plan after step 5, and one that would change the same again while the first still waits or overlaps."""
    rows = good()["plan"]["assignment"]
    other = [[*rows[0]], [rows[1][9], *rows[1][1:9], rows[1][0]]]
    return ClustererStatus(1, poll, {5: (good(),), 7: (good(version=2, made=7, assignment=other),)}.get(poll, ()), 0)


def one_rank_hears(poll: int) -> ClustererStatus | None:
    """Rank 1's own client would have it otherwise; and rank 0's first plan comes when its step has begun."""
    if dist.get_rank():
        return ClustererStatus(1, poll, (good(made=poll),), 0)
    return ClustererStatus(1, poll, {12: (good(made=9),), 16: (good(made=16),)}.get(poll, ()), 0)


def garbage_on_rank_0(poll: int) -> Any:
    """One bad answer after another."""
    return list(GARBAGE.values())[poll // 2 % len(GARBAGE)][0](5 if poll % 2 else 25)


@pytest.mark.dist
def test_ranks_never_disagree_on_the_version(tmp_path: Path) -> None:
    run = fresh(tmp_path / "late")
    results = processes.run(
        2, train, str(run), ("regroup.mode=async", "train.steps=35"), one_rank_hears, folder=tmp_path
    )
    assert results[0]["versions"] == results[1]["versions"] == [0] * 19 + [1] * 16
    assert [r["reason"].split(":")[0] for r in plans(run, "refused")] == ["late"]
    run = fresh(tmp_path / "two")
    results = processes.run(2, train, str(run), ("regroup.mode=async", "train.steps=35"), two_plans, folder=tmp_path)
    assert results[0]["versions"] == results[1]["versions"] == [0] * 8 + [1] * 27
    assert [r["reason"].split(":")[0] for r in plans(run, "refused")] == ["busy"]
    run = fresh(tmp_path / "garbage")
    changes = ("regroup.mode=async", "train.steps=45")
    results = processes.run(2, train, str(run), changes, garbage_on_rank_0, folder=tmp_path)
    assert results[0]["versions"] == results[1]["versions"] == [0] * 45
    assert len(plans(run, "refused")) >= len(GARBAGE) and not plans(run, "applied")


def test_what_a_decision_calls_itself_does_not_change_the_record(tmp_path: Path) -> None:
    decision = {"kind": "none", "step": "x", "reason": "r", "made_at_step": 5, "expected_gain": 0.0}
    train(0, 1, str(tmp_path), ("regroup.mode=async", "train.steps=10"), answers(5, decision))
    (record,) = plans(tmp_path, "no_plan")
    assert record["step"] == 5
    train(0, 1, str(tmp_path), ("regroup.mode=off", "train.steps=12"))  # and the run goes on


class Queueing(DirectClient):
    """As an actor takes calls: one by one, some time later, and an answer asked for early is of what was known then."""

    def __init__(self, clusterer: Clusterer) -> None:
        super().__init__(clusterer)
        self.calls: list[Callable[[], Any]] = []
        self.asked: list[ClustererStatus] = []
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
            self.calls.append(lambda: self.asked.append(self.clusterer.poll(attempt)))
            return None
        self.run()
        self.waiting = False
        return self.asked.pop()

    def wait_for_status(self, attempt: int) -> ClustererStatus | None:
        answer = self.poll(attempt)
        return answer or self.poll(attempt)


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


def test_a_resume_at_the_step_of_a_plan_applies_it_once(tmp_path: Path) -> None:
    """The checkpoint of a step is taken before what happens ahead of the next: such a record goes with the cut."""
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


def test_a_step_that_diverges_leaves_no_trace_in_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.forward_backward

    def poisoned(self: Trainer, step: int) -> Any:
        if step not in (5, 9):  # a watched step, and a period's last
            return real(self, step)
        weight = self.model.layers[0].ffn_norm  # type: ignore[union-attr]
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        said = real(self, step)
        with torch.no_grad():
            weight.copy_(saved)
        return said

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
    from raymoe.clustering.statistics import Statistics

    empty = Statistics.empty(version, model.layers, model.n_experts, model.d_model, settings.regroup.beta, step)
    count = np.full((model.layers, model.n_experts), 7.0)
    stats = replace(
        empty, rows_LE=count.astype(np.int64), count_LE=count, gram={"residual": gram, "answer": gram}, sampled=3
    )
    return Message(attempt, rank, world, model.default_assignment(), True, stats)


def kinds(answer: ClustererStatus) -> list[str]:
    return [decision["kind"] for decision in answer.decisions]


def test_the_clusterer_plans_once_a_period_when_all_workers_have_told() -> None:
    clusterer = Clusterer(config().to_dict())
    clusterer.observe(message(1, 8))
    assert kinds(clusterer.poll(1)) == []  # before the burn-in
    clusterer.observe(message(2, 10, rank=0, world=2))
    assert kinds(clusterer.poll(2)) == []
    clusterer.observe(message(2, 10, rank=1, world=2))
    answer = clusterer.poll(2)
    assert kinds(answer) == ["plan"] and answer.step == 10
    assert answer.decisions[0]["plan"]["effective_step"] == 13
    assert kinds(clusterer.poll(2)) == []
    for rank in (0, 1):
        clusterer.observe(message(2, 16, rank=rank, world=2))
    assert kinds(clusterer.poll(2)) == []
    clusterer.observe(message(1, 30))  # from a future that was rolled back
    assert clusterer.poll(2).step == 16 and kinds(clusterer.poll(1)) == []


def test_the_clusterer_tells_what_a_plan_has_gained_by_later_statistics() -> None:
    clusterer = Clusterer(config().to_dict())
    clusterer.observe(message(1, 10))
    plan = clusterer.poll(1).decisions[0]["plan"]
    after = replace(message(1, 20, version=1), assignment=tuple(map(tuple, plan["assignment"])))
    clusterer.observe(after)
    seen = [d for d in clusterer.poll(1).decisions if d["kind"] == "seen"]
    assert len(seen) == 1 and seen[0]["version"] == 1
    assert seen[0]["gain"] == pytest.approx(plan["expected_gain"], rel=1e-9)  # the same statistics


@pytest.mark.parametrize("what", ["nothing", "dictionary", "shapes", "nan", "negative"])
def test_the_clusterer_counts_messages_that_are_not_messages(what: str) -> None:
    clusterer = Clusterer(config().to_dict())
    sound = message(1, 10)
    stats = sound.statistics
    bad: Any = {
        "nothing": None,
        "dictionary": {"attempt": 1},
        "shapes": replace(sound, statistics=replace(stats, count_LE=stats.count_LE[:, 1:])),
        "nan": replace(sound, statistics=replace(stats, count_LE=stats.count_LE * np.nan)),
        "negative": replace(sound, statistics=replace(stats, rows_LE=-stats.rows_LE)),
    }[what]
    clusterer.observe(bad)
    assert clusterer.poll(1).refused_messages == 1 and clusterer.poll(1).decisions == ()
    clusterer.observe(sound)
    assert kinds(clusterer.poll(1)) == ["plan"]


def test_a_clusterer_that_starts_again_is_told_all_again(tmp_path: Path) -> None:
    """Killed at every phase of a period: the next plan comes, from statistics as if nothing had happened."""

    class Mortal(DirectClient):
        """A clusterer that is another one from each given poll on."""

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


def test_planted_swaps_are_found_by_answers_of_a_real_model() -> None:
    """Residuals in families; two experts of two families stand in each other's cluster: the plan puts them back."""
    settings = config("model.d_model=32", "model.d_expert=24", "model.n_experts=16", "regroup.force=0")
    model = settings.model
    true = model.default_assignment()
    planted = [list(row) for row in true]
    for row, (a, b) in zip(planted, ((1, 6), (9, 14)), strict=True):
        row[a], row[b] = row[b], row[a]
    sharded = shard(model, planted)
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
    assignment = tuple(map(tuple, planted))
    recorder.read(10, load, assignment)
    clusterer = Clusterer(settings.to_dict())
    clusterer.observe(Message(1, 0, 1, assignment, False, recorder.total))
    (decision,) = clusterer.poll(1).decisions
    assert decision["kind"] == "plan" and decision["plan"]["assignment"] == [list(row) for row in true]
