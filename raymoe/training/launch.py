"""The driver: from a config to a finished run. It prepares the data, starts Ray Train, follows and stops it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from prometheus_client import CollectorRegistry
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from tqdm import tqdm

import raymoe
from raymoe.config import Config, ModelSection, from_dict
from raymoe.data.corpus import Corpus, prepare
from raymoe.metrics import TrainingMetrics, serve
from raymoe.model.transformer import Transformer
from raymoe.storage.files import replace_file
from raymoe.storage.mirror import Mirror
from raymoe.storage.run_folder import RunFolder, run_folder
from raymoe.storage.scrape_targets import write_targets
from raymoe.training.elastic import ELASTIC_KNOBS, KNOBS, Elastic, dead_end, release_workers
from raymoe.training.loop import Trainer, threads
from raymoe.training.regroup.clients import ActorClient, ClustererClient, ReplayClient, start_clusterer
from raymoe.training.run_report import write_report


class TooManyFailures(RuntimeError):
    """A run exceeded `train.max_failures`. The message has the last error."""


def worker(job: dict[str, Any]) -> None:
    """What each Ray Train worker runs, again from the top after every restart."""
    context = ray.train.get_context()
    config, run = from_dict(job["config"]), Path(job["run"])
    if dead_end(run, config.train.max_failures):
        return
    torch.set_num_threads(threads(config, context.get_local_world_size()))
    device = get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    registry = CollectorRegistry()
    labels = {"run": config.run.name, "worker": str(rank)}
    metrics = TrainingMetrics(registry, **labels)
    host = config.train.metrics_host
    reachable = ray.util.get_node_ip_address() if host == "0.0.0.0" else host
    targets: list[Any] = [None] * world
    target = (reachable, serve(registry, host), labels)
    if world > 1:
        torch.distributed.all_gather_object(targets, target)
    if rank == 0:
        write_targets(RunFolder(run).targets, targets if world > 1 else [target])
    client: ClustererClient | None = ActorClient(job["clusterer"]) if job["clusterer"] else None
    if config.regroups and config.regroup.mode == "replay":
        client = ReplayClient(Path(config.regroup.replay))
    outcome = Trainer(config, Corpus.open(job["corpus"]), run, metrics, device, client).train()
    ray.train.report(outcome)


def connect(config: Config) -> None:
    """Join the Ray that RAY_ADDRESS or this machine offers, else start a local one.

    A local Ray gets at least as many CPUs as there are workers, so that a run made for two cores works on one.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    for knob, value in (KNOBS | (ELASTIC_KNOBS if config.train.elastic else {})).items():
        os.environ.setdefault(knob, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if os.environ.get("RAY_ADDRESS") == "local":
            raise ConnectionError
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init("local", num_cpus=max(os.cpu_count() or 1, config.train.workers), include_dashboard=False, **quiet)


def launch(config: Config) -> tuple[Path, int]:
    """Train `config` to its end or to an orderly stop; returns the run's folder and the signal that stopped it, or 0.

    Needs Ray to be initialised. SIGINT and SIGTERM ask the workers to checkpoint at the next step and leave.
    Raises TooManyFailures after more than `train.max_failures` failures in a row without a newer checkpoint between them.
    """
    run = run_folder(config.run.root, config.run.name)
    mirror = Mirror(config.checkpoint.storage, config.run.name) if config.checkpoint.storage else None
    gpus = wants_gpus(config)
    check_capacity(config, gpus)
    if config.regroup.replay:
        ReplayClient(Path(config.regroup.replay))  # refuses what it cannot read
    if mirror:
        mirror.make()
    corpus = prepare(config)  # before the run's folder is there: a refused text leaves nothing
    run.mkdir(parents=True, exist_ok=True)
    about = {
        "config": config.to_dict(),
        "corpus": str(corpus),
        "versions": versions(),
        "parameters": parameters(config.model),
    }
    replace_file(RunFolder(run).config, json.dumps(about, indent=1))
    for left in (run / "stop", RunFolder(run).checkpoint_request, RunFolder(run).failures):
        left.unlink(missing_ok=True)
    clusterer, clusterer_name = None, ""
    if config.regroups and config.regroup.mode != "replay":
        clusterer_name = f"clusterer of {config.run.name}, {time.time_ns()}"
        clusterer = start_clusterer(config.to_dict(), clusterer_name)
    job = {"config": config.to_dict(), "run": str(run), "corpus": str(corpus), "clusterer": clusterer_name}
    outcome: list[BaseException | None] = []
    thread = threading.Thread(target=fit, args=(config, job, gpus, outcome), name="ray-train", daemon=True)
    progress = Progress(RunFolder(run).metrics, config.train.steps)
    try:
        with stop_on_signal(run / "stop") as received:
            thread.start()
            while thread.is_alive():
                thread.join(timeout=0.5)
                progress.update()
        progress.close()
    finally:
        if clusterer is not None:
            ray.kill(clusterer)
    try:
        write_report(run)
    except (OSError, ValueError) as error:
        print(f"the report could not be written: {error}", file=sys.stderr)
    shutil.rmtree(run / "ray", ignore_errors=True)
    if mirror:
        try:
            mirror.push(run, None, config.checkpoint.keep)
        except OSError as error:
            print(f"the records could not be copied to {mirror.uri}: {error}", file=sys.stderr)
    if outcome[0] is not None:
        raise outcome[0]
    if reason := dead_end(run, config.train.max_failures):
        raise TooManyFailures(
            f"{reason}; see {run / 'metrics.jsonl'}, and continue with train.resume={config.run.name}"
        )
    return run, received[0] if received else 0


def fit(config: Config, job: dict[str, Any], gpus: bool, outcome: list[BaseException | None]) -> None:
    """Run Ray Train to its end; what it raised, or None, is added to `outcome`."""
    run, train = Path(job["run"]), config.train
    elastic = Elastic(run)
    while not outcome:
        try:
            trainer = TorchTrainer(
                worker,
                train_loop_config=job,
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(train.collective_timeout_s)),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=(train.workers, train.max_workers) if train.elastic else train.workers,
                    use_gpu=gpus,
                    elastic_resize_monitor_interval_s=train.resize_every_s,
                ),
                run_config=ray.train.RunConfig(
                    name=f"attempt-{time.time_ns()}",  # Ray Train resumes a run of the same name by itself: ours never is
                    storage_path=str(run / "ray"),
                    failure_config=ray.train.FailureConfig(max_failures=-1),  # until `dead_end`
                    callbacks=[elastic],  # pyright: ignore[reportArgumentType]: of the controller; the list takes both
                ),
            )
            trainer.fit()
            outcome.append(None)
        except RayActorError as error:  # Ray Train's own controller died, which nobody else restarts
            elastic.count(error)
            release_workers()
            if dead_end(run, train.max_failures):
                outcome.append(None)
        except BaseException as error:
            outcome.append(error)


def wants_gpus(config: Config) -> bool:
    if config.train.gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) >= config.train.workers
    return config.train.gpu == "yes"


def check_capacity(config: Config, gpus: bool) -> None:
    """Ray Train would wait for ever for workers that cannot be placed: say so instead.

    An elastic run waits for nodes, which may be on their way.
    """
    kind = "GPU" if gpus else "CPU"
    have = ray.cluster_resources().get(kind, 0)
    if have >= config.train.workers:
        return
    if config.train.elastic:
        print(
            f"waiting for nodes: {config.train.workers} {kind}s are needed at least, the cluster has {have:g}",
            flush=True,
        )
        return
    raise ValueError(
        f"train.workers={config.train.workers} needs {config.train.workers} {kind}s and the Ray cluster has {have:g}: "
        f"lower train.workers, add nodes, start Ray with more (ray start --num-{kind.lower()}s), or give a range "
        "(train.workers=MIN,MAX) to wait for nodes"
    )


def parameters(model: ModelSection) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(model).parameters())


def versions() -> dict[str, str]:
    return {
        "raymoe": raymoe.__version__,
        "ray": ray.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def stop_on_signal(flag: Path) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM sets the stop flag and is listed; a second one is not held back."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        flag.touch()
        print("\nstopping: the workers checkpoint at the next step and leave", file=sys.stderr, flush=True)
        for n, previous in before.items():
            signal.signal(n, previous)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for n, previous in before.items():
            signal.signal(n, previous)


class Progress:
    """Follows a run's metrics.jsonl: a bar on a terminal, a line a record elsewhere."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.file = self.position = 0
        self.shown: set[int] = set()
        """Hashes of lines that were read: a restart replaces the file by what it keeps of it."""
        self._read()
        self.bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def update(self) -> None:
        for line in self._read():
            with contextlib.suppress(ValueError):  # of a line that a killed worker left behind
                self.show(json.loads(line))

    def _read(self) -> list[bytes]:
        """Whole lines that are new."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if (number := os.fstat(file.fileno()).st_ino) != self.file:
                self.file, self.position = number, 0
            file.seek(self.position)
            lines = [line for line in file if line.endswith(b"\n")]
        self.position += sum(map(len, lines))
        new = [line for line in lines if hash(line) not in self.shown]
        self.shown.update(map(hash, lines))
        return new

    def show(self, record: dict[str, Any]) -> None:
        text = describe(record)
        if record["kind"] == "train" and not self.bar.disable:
            self.bar.n = record["step"]
            self.bar.set_postfix_str(text)
        elif text:
            tqdm.write(
                f"step {record['step']}/{self.steps}  {text}", file=sys.stderr if not self.bar.disable else sys.stdout
            )
            sys.stdout.flush()

    def close(self) -> None:
        self.update()
        self.bar.close()


def describe(record: dict[str, Any]) -> str:
    """One line for a record of metrics.jsonl."""
    number = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    if record["kind"] == "train":
        cv = record["load_cv"]
        return (
            f"loss {number(record['loss'], '.3f')}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"load CV experts {number(cv['experts'], '.2f')} clusters {number(cv['clusters'], '.2f')}"
        )
    if record["kind"] == "validation":
        return f"validation loss {number(record['loss'], '.4f')}  perplexity {number(record['perplexity'], '.2f')}"
    if record["kind"] == "event":
        name, rest = record["name"], {k: v for k, v in record.items() if k not in ("kind", "step", "seconds", "name")}
        said = [f"{v}" if k == name else f"{k.replace('_', ' ')} {v}" for k, v in rest.items()]
        return f"{name} {', '.join(said)}".rstrip()
    return ""
