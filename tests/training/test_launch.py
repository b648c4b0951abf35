"""The driver before and after the workers: what is refused, what is printed, how a run stops and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymoe.config import Config, from_yaml, override, preset
from raymoe.data.corpus import Corpus
from raymoe.data.prepare import prepare
from raymoe.ops.ray_connection import RayTarget
from raymoe.storage.run_folder import RunFolder
from raymoe.storage.run_lock import RunInUse, own_run
from raymoe.training import launch as launching
from raymoe.training import worker
from raymoe.training.failures import TooManyFailures, Unrecoverable, record_failure, record_unrecoverable, stop_reason
from raymoe.training.launch import Outcome, RunFolderNotShared, launch
from raymoe.training.progress import Progress, TimeLeft, duration
from raymoe.training.resolve import check_root, resolve
from raymoe.training.stop_signals import stop_on_signal
from raymoe.training.worker import WorkerJob, unshared
from tests.storage.test_checkpoint import META, save

# What is refused before anything starts


@pytest.mark.parametrize(
    ("root", "working_dir", "environment"),
    [
        ("runs", "/home/me", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}),
        ("runs", "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1", {}),
        ("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs", "/home/me", {}),
    ],
)
def test_a_root_in_the_package_cache_of_a_job_is_refused(root: str, working_dir: str, environment: dict) -> None:
    with pytest.raises(ValueError, match=rf"run\.root={root} is inside the working directory of a Ray job.*absolute"):
        check_root(root, Path(working_dir), environment)


def test_a_root_elsewhere_is_accepted() -> None:
    check_root("runs", Path("/home/me"), {})
    check_root("/mnt/raymoe", Path("/tmp/ray/s/runtime_resources/p"), {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    check_root("~/raymoe", Path("/tmp/ray/s/runtime_resources/p"), {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})


def test_a_relative_home_is_refused_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYMOE_HOME", "runs")
    assert resolve(preset("tiny"), ["run.name=first"]).run.root == "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match="RAYMOE_HOME to an absolute path"):
        resolve(preset("tiny"), ["run.name=first"])


def a_run(root: Path, *, steps: int = 20, done: int = 10) -> bytes:
    """Make the run `first` of `steps` steps with a checkpoint of step `done`; return its config.json."""
    config = override(preset("tiny"), [f"run.root={root}", "run.name=first", f"train.steps={steps}"])
    save(root / "first" / "checkpoints" / f"step_{done:08d}", done, meta=META)
    (root / "first" / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return (root / "first" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.name=second"], "run.name=second and train.resume=first name different runs"),
        (["train.steps=10"], "has completed 10 steps of train.steps=10, so no step is left"),
        (["train.steps=5"], "train.steps=5 is not allowed: first has completed 10 steps"),
        (["model.layers=3"], "keeps its model"),
        (["run.seed=3"], "keeps run.seed"),
        (["train.mixture=a:1"], "keeps run.seed, train.global_batch and train.mixture"),
    ],
)
def test_a_resume_without_sense_is_refused_and_changes_nothing(
    changes: list[str], message: str, tmp_path: Path
) -> None:
    before = a_run(tmp_path)
    with pytest.raises(ValueError, match=message):
        resolve(preset("tiny"), [f"run.root={tmp_path}", "train.resume=first", *changes])
    assert (tmp_path / "first" / "config.json").read_bytes() == before


def test_a_resume_with_steps_left_is_accepted(tmp_path: Path) -> None:
    a_run(tmp_path)
    given = [f"run.root={tmp_path}", "train.resume=first"]
    assert resolve(preset("tiny"), given).train.steps == 20
    assert resolve(preset("tiny"), [*given, "run.name=first"]).run.name == "first"
    shard = next((tmp_path / "first" / "checkpoints" / "step_00000010").glob("*.safetensors"))
    shard.write_bytes(b"x")  # a damaged checkpoint has completed nothing
    assert resolve(preset("tiny"), [*given, "train.steps=5"]).train.steps == 5


def test_the_last_checkpoint_may_still_have_to_be_copied(tmp_path: Path) -> None:
    a_run(tmp_path, steps=10)
    given = [f"run.root={tmp_path}", "train.resume=first"]
    assert resolve(preset("tiny"), [*given, f"checkpoint.storage=file://{tmp_path}/store"]).train.steps == 10
    with pytest.raises(ValueError, match="no step is left"):
        resolve(preset("tiny"), given)


def test_the_owner_of_a_run_is_named_before_its_name_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path)
    with own_run(tmp_path / "first"):
        for given in ("run.name=first", "train.resume=first"):
            with pytest.raises(RunInUse, match=f"process {os.getpid()}"):
                resolve(preset("tiny"), [f"run.root={tmp_path}", given])
    with pytest.raises(FileExistsError, match="train.resume=first"):
        resolve(preset("tiny"), [f"run.root={tmp_path}", "run.name=first"])


# The order of a launch


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a small text of some words, again and again\n" * 300)
    return tmp_path / "text.txt"


def config_of(root: Path, text: Path, *changes: str) -> Config:
    small = ["model.vocabulary=300", "model.context=16", "train.workers=1", "train.steps=10"]
    return override(
        preset("tiny"), [f"run.root={root}", "run.name=first", f"data.path={text}", *small, *changes]
    )  # fmt: skip


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace Ray; the list names what a launch does, in order."""
    done: list[str] = []

    def record(name: str, result: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            done.append(name)
            return result

        return call

    def prepared(config: Config) -> Path:
        done.append("prepare")
        return prepare(config, progress=False)

    monkeypatch.setattr(launching, "find_ray", record("find", RayTarget("")))
    monkeypatch.setattr(launching, "connect", record("connect", "local"))
    monkeypatch.setattr(launching, "prepare", prepared)
    monkeypatch.setattr(launching, "wants_gpus", lambda _: False)
    monkeypatch.setattr(launching, "check_capacity", lambda *_: None)
    monkeypatch.setattr(launching, "train", record("train", (Outcome(True, None, {"step": 10}), [])))
    return done


def test_a_launch_owns_the_run_and_reads_the_data_before_it_joins_ray(
    text: Path, tmp_path: Path, without_ray: list[str], capsys: pytest.CaptureFixture
) -> None:
    run, number = launch(config_of(tmp_path, text))
    assert without_ray == ["find", "prepare", "connect", "train"] and number == 0
    about = json.loads((run / "config.json").read_text())
    assert about["command"] == sys.argv and about["machine"]["cores"] >= 1 and about["corpus_fingerprint"]
    repeated = from_yaml((run / "config.yaml").read_text())
    assert override(repeated, ["run.name=first"]) == config_of(tmp_path, text)
    shown = capsys.readouterr().out
    assert shown.index("a local one starts") < shown.index("ray       local") < shown.index("training and")
    for words in (
        f"run       {run}",
        "1, each on a CPU with gloo",
        "1 domain",
        "parameters, 2 layers",
        "10 of 256 tokens",
    ):
        assert words in shown, words


def test_the_same_command_twice_is_refused_before_any_work(text: Path, tmp_path: Path, without_ray: list[str]) -> None:
    config = config_of(tmp_path, text)
    with own_run(tmp_path / "first"), pytest.raises(RunInUse, match=f"process {os.getpid()}"):
        launch(config)
    assert without_ray == ["find"]
    launch(config)
    with pytest.raises(FileExistsError):  # resolved before the first launch had made the folder
        launch(config)


def test_a_missing_file_is_refused_before_ray_and_leaves_nothing(tmp_path: Path, without_ray: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        launch(config_of(tmp_path, tmp_path / "nothing.txt"))
    assert "connect" not in without_ray and not (tmp_path / "first").exists()


def test_a_mixture_of_unknown_domains_is_refused_before_ray(text: Path, tmp_path: Path, without_ray: list[str]) -> None:
    with pytest.raises(ValueError, match="names the domain 'other', and the text has text"):
        launch(config_of(tmp_path, text, "train.mixture=other:1"))
    assert "connect" not in without_ray and not (tmp_path / "first").exists()
    launch(config_of(tmp_path, text, "train.mixture=text:1"))


def test_a_resume_continues_with_its_own_corpus_or_names_both(
    text: Path, tmp_path: Path, without_ray: list[str]
) -> None:
    config = config_of(tmp_path, text)
    run, _ = launch(config)
    first = json.loads((run / "config.json").read_text())
    text.write_text(text.read_text() + "other words that came later\n" * 200)
    again = override(config, ["train.resume=first"])
    without_ray.clear()
    launch(again)
    assert "prepare" not in without_ray and json.loads((run / "config.json").read_text())["corpus"] == first["corpus"]
    (Path(first["corpus"]) / "corpus.json").unlink()
    before = (run / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=rf"gives corpus \w+, and first was trained on corpus {first['corpus_fingerprint']}"
    ):
        launch(again)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_well_or_badly_leaves_no_scrape_targets(
    fails: bool, text: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, run: Path, *_: Any) -> Any:
        RunFolder(run).targets.write_text('[{"targets": ["127.0.0.1:1"]}]')
        return Outcome(True, RuntimeError("lost") if fails else None), []

    monkeypatch.setattr(launching, "train", train)
    if fails:
        with pytest.raises(RuntimeError, match="lost"):
            launch(config_of(tmp_path, text))
    else:
        launch(config_of(tmp_path, text))
    assert json.loads((tmp_path / "first" / "prometheus_targets.json").read_text()) == []
    assert (tmp_path / "first" / "report.html").exists() and not RunFolder(tmp_path / "first").lock.exists()


# A folder that not all nodes share


def test_a_worker_that_cannot_read_the_drivers_files_names_node_and_folder(tmp_path: Path) -> None:
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    job = WorkerJob({}, str(run), str(corpus), "nonce", "10.0.0.1", "")
    for step, folder in ((lambda: None, run), (lambda: run.mkdir(), run), (lambda: (run / "driver_nonce").write_text("old"), run),
                         (lambda: (run / "driver_nonce").write_text("nonce"), corpus)):  # fmt: skip
        step()
        reason = unshared(job, "10.0.0.2", timeout_s=0)
        assert f"node 10.0.0.2 cannot read {folder}, which the driver wrote on node 10.0.0.1" in reason
    corpus.mkdir()
    (corpus / "corpus.json").touch()
    assert unshared(job, "10.0.0.2", timeout_s=0) == ""


def test_all_workers_return_when_one_does_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is gathered from all ranks: a rank that can read the folder does not wait for the others."""
    gathered: list[Any] = []

    def from_both_ranks(value: Any) -> list[Any]:
        gathered.append(value)
        return [value, "node 10.0.0.2 cannot read"]

    monkeypatch.setattr(worker, "gathered", from_both_ranks)
    monkeypatch.setattr(worker, "Trainer", None)  # nothing else is read before the check
    (tmp_path / "driver_nonce").write_text("nonce")
    (tmp_path / "corpus.json").touch()
    job = WorkerJob(preset("tiny").to_dict(), str(tmp_path), str(tmp_path), "nonce", "10.0.0.1", "")
    assert worker.train_worker({"job": job}) == {"unshared": "node 10.0.0.2 cannot read"}
    assert gathered == [""]


def test_a_run_whose_folder_is_not_shared_is_refused_and_removed(
    text: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "train", lambda *_: (Outcome(True, None, {"unshared": "node b cannot read"}), []))
    with pytest.raises(RunFolderNotShared, match="node b cannot read"):
        launch(config_of(tmp_path, text))
    assert not (tmp_path / "first").exists()


# Signals, failures, progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_requests_a_stop_and_a_second_one_acts_as_before(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    second: list[int] = []
    before = signal.signal(number, lambda n, _: second.append(n))
    try:
        with stop_on_signal(tmp_path / "stop") as received:
            os.kill(os.getpid(), number)
            assert received == [number] and (tmp_path / "stop").exists() and not second
            os.kill(os.getpid(), number)
            assert second == [number]
        assert f"{signal.Signals(number).name}: the workers write a checkpoint" in capsys.readouterr().err
    finally:
        signal.signal(number, before)


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(tmp_path / "stop") as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received and not (tmp_path / "stop").exists()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_ends_neither_the_stop_nor_the_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        encoding = "utf-8"

        def write(self, _: str) -> None:
            raise OSError(5, "Input/output error")

        flush = close = lambda self: self.write("")
        isatty = lambda self: False  # noqa: E731

    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, 9)
    path.write_text('{"kind": "event", "step": 1, "name": "stopped"}\n')
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores the signal
    try:
        with stop_on_signal(tmp_path / "stop") as received:
            os.kill(os.getpid(), signal.SIGHUP)
            progress.update()
    finally:
        signal.signal(signal.SIGHUP, before)
    progress.close()
    assert received == [signal.SIGHUP] and (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "step": null}',
        '{"kind": "train", "step": 3}',
        '{"kind": "train", "step": 3, "loss": "x", "tokens_per_s": 1, "load_cv": {"experts": 1, "clusters": 1}}',
        '{"kind": "train", "step": 3, "loss": 1, "tokens_per_s": [], "load_cv": []}',
        '{"kind": "event", "step": 3}',
        '{"kind": [], "step": 3}',
        "{",
    ],
)
def test_a_damaged_record_does_not_end_the_driver(line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, 9)
    path.write_text(line + '\n{"kind": "event", "step": 4, "name": "stopped"}\n')
    progress.update()
    progress.close()
    assert "step 4/9  stopped" in capsys.readouterr().out


def test_an_unrecoverable_failure_ends_the_run_at_once(tmp_path: Path) -> None:
    record_failure(tmp_path, RuntimeError("one"))
    assert not stop_reason(tmp_path, allowed=3)
    record_unrecoverable(tmp_path, Unrecoverable("the disk is full: free 3 GB"))
    record_failure(tmp_path, RuntimeError("the worker group failed"))
    assert stop_reason(tmp_path, allowed=3) == "the disk is full: free 3 GB"


def test_too_many_failures_name_the_record_and_the_way_on(
    text: Path, tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, run: Path, *_: Any) -> Any:
        record_unrecoverable(run, Unrecoverable("the disk is full"))
        return Outcome(True), []

    monkeypatch.setattr(launching, "train", train)
    with pytest.raises(TooManyFailures, match=r"the disk is full; see .*metrics\.jsonl.*train\.resume=first"):
        launch(config_of(tmp_path, text))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (250, "4 min 10 s"),
        (1900, "31 min"),
        (7300, "2 h 1 min"),
        (200000, "2 d 7 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_follows_the_pace_of_this_worker_group() -> None:
    clock = SimpleNamespace(now=100.0)
    left = TimeLeft(100, lambda: clock.now)
    step = lambda number: {"kind": "train", "step": number, "step_ms": 500.0}  # noqa: E731
    assert left.after(step(10)) == "45 s"  # of the record itself
    clock.now += 20
    assert left.after(step(20)) == "2 min 40 s"  # 2 s a step, with what is between steps
    assert left.after({"kind": "event", "step": 20, "name": "resumed"}) == ""
    clock.now += 60
    assert left.after(step(21)) == "40 s"  # the restart is not counted
    assert left.after(step(100)) == ""


def test_the_corpus_of_a_launch_is_the_prepared_one(text: Path, tmp_path: Path, without_ray: list[str]) -> None:
    run, _ = launch(config_of(tmp_path, text))
    about = json.loads((run / "config.json").read_text())
    assert Corpus.open(about["corpus"]).fingerprint == about["corpus_fingerprint"] == Path(about["corpus"]).name
