"""The driver of a run: prepare the data, join or start Ray, run Ray Train to its end or to an orderly stop."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer

from raymoe.config import Config
from raymoe.config.mixture import parse_mixture
from raymoe.data.corpus import Corpus
from raymoe.data.prepare import prepare
from raymoe.ops.ray_connection import RayConnection, RayTarget, connect, current_ray, find_ray
from raymoe.storage.files import replace_file
from raymoe.storage.mirror import Mirror
from raymoe.storage.run_folder import RunFolder, run_folder
from raymoe.storage.run_lock import own_run
from raymoe.storage.scrape_targets import write_targets
from raymoe.storage.weights import StoredWeights
from raymoe.training.elastic import ELASTIC_SETTINGS, RAY_TRAIN_SETTINGS, Elastic, release_workers
from raymoe.training.failures import TooManyFailures, record_failure, stop_reason
from raymoe.training.initialization import copy_initial_files, initial_weights, with_files_of
from raymoe.training.progress import Progress
from raymoe.training.regroup.clients import ReplayClient, start_clusterer
from raymoe.training.run_report import write_report
from raymoe.training.run_summary import overview, save_config, saved_corpus
from raymoe.training.stop_signals import stop_on_signal
from raymoe.training.trackers import require_tracker
from raymoe.training.worker import WorkerJob, train_worker


class RunFolderNotShared(OSError):
    """A worker's node cannot read the run's folder. The message names the node and the folder."""


@dataclass
class Outcome:
    """Result of Ray Train, filled in by its thread."""

    done: bool = False
    error: BaseException | None = None
    value: dict[str, Any] = field(default_factory=dict)
    """Return value of rank 0."""


def launch(config: Config, target: RayTarget | None = None) -> tuple[Path, int]:
    """Train `config` to its end or to an orderly stop; return the run's folder and the signal that stopped it, or 0.

    Joins or starts a Ray unless this process is connected to one. target: the result of `find_ray`, if the caller
    has it. SIGINT, SIGTERM and SIGHUP make the workers write a checkpoint at the next step and leave.
    Raises RunInUse if another process owns the run, ValueError or OSError for anything refused before the first
    step, and TooManyFailures after more than `train.max_failures` consecutive failures without a newer checkpoint.
    """
    target = target or current_ray() or find_ray(os.environ)
    print(f"ray       {target}", flush=True)
    run = run_folder(config.run.root, config.run.name)
    with own_run(run):
        if not config.train.resume and run.exists():
            raise FileExistsError(f"{run} exists: choose another run.name, or set train.resume={config.run.name}")
        weights = initial_weights(config)
        corpus, mirror = check_inputs(with_files_of(config, weights), run)
        print(f"ray       {join_ray(config, target)}", flush=True)
        gpus = wants_gpus(config)
        check_capacity(config, gpus)
        config, nonce = start_folder(config, run, corpus, weights)
        print(overview(config, run, corpus, gpus), flush=True)
        try:
            outcome, received = train(config, run, corpus, nonce, gpus)
        finally:
            finish_folder(config, run, mirror)
        if "unshared" in outcome.value and not config.train.resume:
            shutil.rmtree(run, ignore_errors=True)  # it holds no step
    raise_failure(config, run, outcome)
    return run, received[0] if received else 0


def raise_failure(config: Config, run: Path, outcome: Outcome) -> None:
    """Raise RunFolderNotShared, TooManyFailures or the error of Ray Train if the run failed."""
    if reason := outcome.value.get("unshared"):
        raise RunFolderNotShared(reason)
    if outcome.error is not None:
        raise outcome.error
    if reason := outcome.value.get("unrecoverable") or stop_reason(run, config.train.max_failures):
        raise TooManyFailures(
            f"{reason}; see {RunFolder(run).metrics}, and continue with train.resume={config.run.name}"
        )


def check_inputs(config: Config, run: Path) -> tuple[Corpus, Mirror | None]:
    """Return the prepared corpus and the mirror. Nothing is left in the run's folder if one of them is refused."""
    require_tracker(config.train.tracker)
    if config.regroup.replay:
        ReplayClient(Path(config.regroup.replay))  # raises ValueError for a file that it cannot read
    mirror = None
    if config.checkpoint.storage:
        mirror = Mirror(config.checkpoint.storage, config.run.name)
        mirror.make()
    saved = saved_corpus(run) if config.train.resume else None
    corpus = Corpus.open(prepare(config)) if saved is None or saved.corpus is None else saved.corpus
    if saved is not None and saved.fingerprint and corpus.fingerprint != saved.fingerprint:
        raise ValueError(
            f"data.path={config.data.path} gives corpus {corpus.fingerprint}, and {config.run.name} was trained on corpus "
            f"{saved.fingerprint}, which is no longer at {saved.folder}: restore the text or that folder, or start a new run"
        )
    if weights := parse_mixture(config.train.mixture):
        corpus.mixture(weights, seed=config.run.seed, context=config.model.context)  # raises ValueError
    return corpus, mirror


def join_ray(config: Config, target: RayTarget) -> RayConnection:
    """Connect to Ray with the settings that a run needs; a local Ray has a CPU for each worker."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    settings = RAY_TRAIN_SETTINGS | (ELASTIC_SETTINGS if config.train.elastic else {})
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return connect(target, config.train.workers, config.run.name)


def start_folder(config: Config, run: Path, corpus: Corpus, weights: StoredWeights | None = None) -> tuple[Config, str]:
    """Create the run's folder, or reset the requests of an earlier launch in it; return the config and a new nonce.

    weights: initial weights of a new run, which are copied. The config then names the copy of their tokenizer.
    """
    folder = RunFolder(run)
    run.mkdir(parents=True, exist_ok=True)
    try:
        if weights:
            config = copy_initial_files(config, weights, run, corpus)
        if corpus.chat_template:
            replace_file(folder.chat_template, corpus.chat_template)
        save_config(config, run, corpus, weights.about() if weights else None)
    except BaseException:
        if not config.train.resume:
            shutil.rmtree(run, ignore_errors=True)  # it holds no step
        raise
    for stale in (folder.stop_request, folder.checkpoint_request, folder.failures):
        stale.unlink(missing_ok=True)
    nonce = uuid.uuid4().hex
    replace_file(folder.driver_nonce, nonce)
    return config, nonce


def finish_folder(config: Config, run: Path, mirror: Mirror | None) -> None:
    """Write the report, remove the scrape targets and Ray Train's files, and copy the records to the mirror."""
    try:
        if RunFolder(run).targets.exists():
            write_targets(RunFolder(run).targets, [])
        write_report(run)
    except (OSError, ValueError) as error:
        print(f"the report could not be written: {error}", file=sys.stderr)
    shutil.rmtree(RunFolder(run).ray_storage, ignore_errors=True)
    if mirror:
        try:
            mirror.push(run, None, config.checkpoint.keep)
        except OSError as error:
            print(f"the records could not be copied to {mirror.uri}: {error}", file=sys.stderr)


def train(config: Config, run: Path, corpus: Corpus, nonce: str, gpus: bool) -> tuple[Outcome, list[int]]:
    """Run Ray Train and the clusterer, and show progress; return the outcome and the signals received."""
    clusterer, clusterer_name = None, ""
    if config.regroups and config.regroup.mode != "replay":
        clusterer_name = f"clusterer of {config.run.name}, {time.time_ns()}"
        clusterer = start_clusterer(config.to_dict(), clusterer_name)
    node = ray.util.get_node_ip_address()
    job = WorkerJob(config.to_dict(), str(run), str(corpus.folder), nonce, node, clusterer_name)
    outcome = Outcome()
    thread = threading.Thread(target=fit, args=(config, job, gpus, outcome), name="ray-train", daemon=True)
    progress = Progress(RunFolder(run).metrics, config.train.steps)
    try:
        with stop_on_signal(RunFolder(run).stop_request) as received:
            thread.start()
            while thread.is_alive():
                thread.join(timeout=0.5)
                progress.update()
        progress.close()
    finally:
        if clusterer is not None:
            ray.kill(clusterer)
    return outcome, received


def fit(config: Config, job: WorkerJob, gpus: bool, outcome: Outcome) -> None:
    """Run Ray Train to its end, again if its controller dies, and fill in `outcome`."""
    run = Path(job.run)
    while not outcome.done:
        try:
            outcome.value = ray_trainer(config, job, gpus).fit().return_value or {}
            outcome.done = True
        except RayActorError as error:  # Ray Train's controller died, and nothing else restarts it
            RunFolder(run).checkpoint_request.unlink(missing_ok=True)
            record_failure(run, error)
            release_workers()
            outcome.done = bool(stop_reason(run, config.train.max_failures))
        except BaseException as error:
            outcome.error, outcome.done = error, True


def ray_trainer(config: Config, job: WorkerJob, gpus: bool) -> TorchTrainer:
    """Return the trainer of one attempt. It restarts its workers until `stop_reason` ends the run."""
    train = config.train
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(train.collective_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(train.workers, train.max_workers) if train.elastic else train.workers,
            use_gpu=gpus,
            elastic_resize_monitor_interval_s=train.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=f"{config.run.name}-{time.time_ns()}",  # Ray Train resumes a run of the same name by itself
            storage_path=str(RunFolder(Path(job.run)).ray_storage),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            callbacks=[Elastic(Path(job.run))],  # pyright: ignore[reportArgumentType]: takes controller callbacks, too
        ),
    )


def wants_gpus(config: Config) -> bool:
    """Return whether each worker gets a GPU (see `train.gpu`)."""
    if config.train.gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) >= config.train.workers
    return config.train.gpu == "yes"


def check_capacity(config: Config, gpus: bool) -> None:
    """Raise ValueError for workers that cannot be placed: Ray Train would wait for them indefinitely.

    An elastic run waits for nodes, which the autoscaler may add.
    """
    kind = "GPU" if gpus else "CPU"
    have = ray.cluster_resources().get(kind, 0)
    if have >= config.train.workers:
        return
    if config.train.elastic:
        print(f"waiting for nodes: the run needs {config.train.workers} {kind}s, the cluster has {have:g}", flush=True)
        return
    raise ValueError(
        f"train.workers={config.train.workers} needs {config.train.workers} {kind}s and the Ray cluster has {have:g}: "
        f"lower train.workers, add nodes, start Ray with more (ray start --num-{kind.lower()}s), or give a range "
        "(train.workers=MIN,MAX) to wait for nodes"
    )
