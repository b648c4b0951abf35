"""Faults injected into a training run: the subcommand `train` of `jobs/chaos`."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raymoe.ops.ray_head import head
from raymoe.storage.checkpoint import newest, step_folder
from raymoe.storage.run_folder import RunFolder
from raymoe.training.journal import last_recorded_checkpoint

REPO_ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 3.0
"""`checkpoint.max_loss_s` of the run."""
TIMEOUT_S = 8
CONFIG = [
    "tiny", "run.name=chaos", "train.steps=1000000", "train.log_every=1", "train.validate_every=1000000",
    "train.global_batch=8", "train.grain=4", "train.threads=1", "model.context=64", "model.vocabulary=512",
    "checkpoint.every=1000000", f"checkpoint.max_loss_s={BOUND_S}", f"train.collective_timeout_s={TIMEOUT_S}",
    "checkpoint.keep=3",
]  # fmt: skip
TIMEOUT_WAIT_S = 180.0


@dataclass
class Outcome:
    fault: str
    at: int
    """Step at which the fault was injected."""
    outcome: str = ""
    recovery_s: float = 0.0
    """Seconds until the next training step."""
    steps_lost: int = 0
    failed: bool = False


class Victim:
    """A run with its Ray head, driver and workers, into which faults are injected."""

    def __init__(self, folder: Path, workers: str, stack: ExitStack) -> None:
        self.folder, self.run, self.workers = folder, folder / "chaos", workers
        self.outer, self.inner = stack, ExitStack()
        self.start_head()
        stack.callback(self.inner.close)
        self.start()
        stack.callback(self.end)

    # Processes.

    def start_head(self) -> None:
        self.head = self.inner.enter_context(head(max(2, os.cpu_count() or 1)))

    def start(self, *changes: str) -> None:
        command = [sys.executable, str(REPO_ROOT / "jobs" / "train.py"), *CONFIG, f"train.workers={self.workers}"]
        with (self.folder / "driver.log").open("a") as log:
            self.driver = subprocess.Popen(
                [*command, f"run.root={self.folder}", *changes], env=self.head.environment, stdout=log, stderr=log
            )

    def end(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.inner.close()

    def processes(self, title: str) -> list[psutil.Process]:
        found = self.head.processes(title)
        if not found:
            raise RuntimeError(f"no process {title!r} runs")
        return found

    # Progress.

    def records(self) -> list[dict[str, Any]]:
        path = RunFolder(self.run).metrics
        found = []
        for line in path.read_text().split("\n")[:-1] if path.exists() else []:
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def step(self) -> int:
        return max((r["step"] for r in self.records() if r["kind"] == "train"), default=0)

    def attempt(self) -> int:
        with suppress(OSError, ValueError):
            return int((self.run / "attempt").read_text())
        return 0

    def last_checkpoint(self) -> int:
        """Return the step of the newest checkpoint that the run recorded as complete."""
        return last_recorded_checkpoint(RunFolder(self.run).metrics)

    def failure(self) -> str:
        """Return the recorded error of the last worker group that failed."""
        with suppress(OSError, ValueError):
            return str(json.loads(RunFolder(self.run).failures.read_text())["error"])
        return "no error is recorded"

    def events(self, what: str) -> list[dict[str, Any]]:
        return [r for r in self.records() if r["kind"] == "event" and r["name"] == what]

    def wait(self, condition: Callable[[], Any], what: str, ended: bool = False) -> None:
        """Wait for a condition. Raises RuntimeError after TIMEOUT_WAIT_S, or if the driver ends and `ended` is false."""
        deadline = time.monotonic() + TIMEOUT_WAIT_S
        while not condition():
            if not ended and self.driver.poll() is not None:
                raise RuntimeError(f"the driver ended ({self.driver.returncode}) before {what}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {TIMEOUT_WAIT_S:.0f} s for {what}")
            time.sleep(0.05)

    def continues(self, attempt: int) -> bool:
        """Return whether a later worker group than `attempt` has trained a step."""
        records = self.records()
        resumed = [i for i, r in enumerate(records) if r.get("name") == "resumed" and r["attempt"] > attempt]
        return bool(resumed) and any(r["kind"] == "train" for r in records[resumed[-1] :])


# Faults: each injects one and returns its description. Those in RESTARTS end the worker group.

WORKER, CLUSTERER = "RayTrainWorker", "Clusterer"


def kill_worker(victim: Victim, chance: random.Random) -> str:
    chance.choice(victim.processes(WORKER)).send_signal(signal.SIGKILL)
    return "SIGKILL of a worker"


def freeze_worker(victim: Victim, chance: random.Random) -> str:
    chance.choice(victim.processes(WORKER)).send_signal(signal.SIGSTOP)
    return "SIGSTOP of a worker"


def damage_checkpoint(victim: Victim, chance: random.Random) -> str:
    """Change or truncate one file of the newest checkpoint, and kill a worker before the next checkpoint."""
    found, _ = newest(RunFolder(victim.run).checkpoints)
    assert found is not None
    file = chance.choice(sorted(found.folder.glob("*")))
    content = bytearray(file.read_bytes())
    flipped = chance.random() < 0.5
    if flipped:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    partial = file.with_suffix(".damaged")  # replaced: workers may be reading the old file
    partial.write_bytes(content if flipped else content[: chance.randrange(len(content))])
    partial.replace(file)
    kill_worker(victim, chance)
    return f"{'bit flipped in' if flipped else 'end cut off'} {'a manifest' if file.suffix == '.json' else 'a shard'}, SIGKILL of a worker"


def kill_controller(victim: Victim, chance: random.Random) -> str:
    victim.processes("TrainController")[0].send_signal(signal.SIGKILL)
    return "SIGKILL of Ray Train's controller"


def kill_driver(victim: Victim, chance: random.Random) -> str:
    victim.driver.kill()
    victim.driver.wait()
    victim.start("train.resume=chaos")
    return "SIGKILL of the driver, resumed by command"


def restart_head(victim: Victim, chance: random.Random) -> str:
    victim.inner.close()
    with suppress(subprocess.TimeoutExpired):
        victim.driver.wait(20)
    if victim.driver.poll() is None:
        victim.driver.kill()
        victim.driver.wait()
    victim.start_head()
    victim.start("train.resume=chaos")
    return "head restarted, resumed by command"


def kill_clusterer(victim: Victim, chance: random.Random) -> str:
    victim.processes(CLUSTERER)[0].send_signal(signal.SIGKILL)
    return "SIGKILL of the clusterer"


def freeze_clusterer(victim: Victim, chance: random.Random) -> str:
    process, before = victim.processes(CLUSTERER)[0], victim.step()
    process.send_signal(signal.SIGSTOP)
    try:
        victim.wait(lambda: victim.step() >= before + 20, "20 steps beside a frozen clusterer")
    finally:
        process.send_signal(signal.SIGCONT)
    return "SIGSTOP of the clusterer for 20 steps"


@contextmanager
def without_checkpoints(victim: Victim) -> Iterator[None]:
    """Remove the folder of the checkpoints, and prevent workers from creating it."""
    folder, moved = RunFolder(victim.run).checkpoints, victim.run / "checkpoints.moved"
    folder.rename(moved)
    while not folder.is_file():
        with suppress(FileExistsError):  # a worker has created it again
            folder.touch(exist_ok=False)
            break
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        folder.unlink()
        moved.rename(folder)


def lose_storage(victim: Victim, chance: random.Random) -> str:
    """Remove the checkpoints' folder until a checkpoint has failed."""
    failed, completed = len(victim.events("checkpoint_failed")), victim.last_checkpoint()
    with without_checkpoints(victim):
        victim.wait(lambda: len(victim.events("checkpoint_failed")) > failed, "a checkpoint that fails")
    victim.wait(lambda: victim.last_checkpoint() > completed, "a checkpoint after it")
    return "the checkpoints' folder was gone for a while"


def lose_storage_and_worker(victim: Victim, chance: random.Random) -> str:
    """Kill a worker and remove the checkpoints' folder, until the next workers refuse to restart from step 0."""
    with without_checkpoints(victim):
        RunFolder(victim.run).failures.unlink(missing_ok=True)  # of an earlier worker group
        kill_worker(victim, chance)
        victim.wait(lambda: "bring the folder back" in victim.failure(), "a refusal")
    return "SIGKILL of a worker, no checkpoints' folder at restart"


RESTARTS = {
    kill_worker: 12,
    freeze_worker: 4,
    damage_checkpoint: 6,
    lose_storage_and_worker: 3,
    kill_controller: 3,
    kill_driver: 2,
    restart_head: 1,
}
OTHERS = {kill_clusterer: 10, freeze_clusterer: 6, lose_storage: 9}
"""Faults and their weights."""


def strike(victim: Victim, fault: Callable[[Victim, random.Random], str], chance: random.Random) -> Outcome:
    """Inject one fault and return the outcome."""
    outcome = Outcome(fault.__name__, victim.step())
    started = time.monotonic()
    try:
        target = outcome.at + chance.randrange(5, 60)
        victim.wait(lambda: victim.step() >= target and victim.last_checkpoint() > 0, f"step {target} and a checkpoint")
        attempt, before, kept = victim.attempt(), victim.step(), victim.last_checkpoint()
        if fault is damage_checkpoint:  # the run falls back to the previous one
            complete = [c for c in sorted(victim.run.glob("checkpoints/step_*")) if (c / "manifest.json").exists()]
            kept = int(complete[-2].name.split("_")[1]) if len(complete) > 1 else 0
        outcome.at, started = before, time.monotonic()
        outcome.fault = fault(victim, chance)
        if fault in RESTARTS:
            victim.wait(lambda: victim.continues(attempt), "training to continue")
            restored = victim.events("resumed")[-1]
            outcome.steps_lost = restored["redone_steps"]
            outcome.outcome = f"continued from step {restored['step']}"
            if restored["step"] < kept:
                outcome.failed, outcome.outcome = (
                    True,
                    f"step {kept} was complete, and the run restored {restored['step']}",
                )
        else:
            victim.wait(lambda: victim.step() > before, "the next step")
            outcome.outcome = "training continued"
            if victim.attempt() != attempt:
                outcome.failed, outcome.outcome = True, f"the workers were restarted: {victim.failure()}"
    except (RuntimeError, AssertionError, OSError, psutil.Error) as error:
        outcome.failed, outcome.outcome = True, str(error)
    outcome.recovery_s = time.monotonic() - started
    return outcome


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(arguments.seed)
    kinds = RESTARTS | OTHERS
    drawn = chance.choices(list(kinds), list(kinds.values()), k=arguments.faults)
    outcomes: list[Outcome] = []
    folder = Path(tempfile.mkdtemp(prefix="raymoe-chaos-"))
    with ExitStack() as stack:
        victim = Victim(folder, arguments.workers, stack)
        victim.wait(lambda: victim.step() > 0, "the first step")
        for number, fault in enumerate(drawn, 1):
            outcomes.append(strike(victim, fault, chance))
            last = outcomes[-1]
            print(f"{number:3} of {len(drawn)}  {last.fault:52} {last.recovery_s:6.1f} s  {last.outcome}", flush=True)
            if last.failed:
                break
        if victim.driver.poll() is None:
            victim.driver.terminate()
        code = victim.driver.wait(TIMEOUT_WAIT_S)
        steps = [r["step"] for r in victim.records() if r["kind"] == "train"]
        result = {
            "faults": [vars(o) for o in outcomes],
            "drawn": len(drawn),
            "steps": len(steps),
            "each_step_once": steps == list(range(1, len(steps) + 1)),
            "stopped_in_order": code == 128 + signal.SIGTERM
            and step_folder(RunFolder(victim.run).checkpoints, steps[-1]).exists(),
            "log": (folder / "driver.log").read_text()[-3000:],
        }
    if survived(result):
        shutil.rmtree(folder)
    else:
        print(f"the run's files are in {folder}")
    return result


def survived(result: dict[str, Any]) -> bool:
    whole = len(result["faults"]) == result["drawn"] and not any(o["failed"] for o in result["faults"])
    return whole and result["each_step_once"] and result["stopped_in_order"]


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{'fault':55}{'times':>6}{'survived':>9}{'steps lost, median':>20}{'max':>5}{'recovery s, median':>20}{'max':>7}"
    )
    outcomes = [Outcome(**o) for o in result["faults"]]
    for fault in dict.fromkeys(o.fault for o in outcomes):
        same = [o for o in outcomes if o.fault == fault]
        lost, seconds = [o.steps_lost for o in same], [o.recovery_s for o in same]
        print(
            f"{fault:55}{len(same):>6}{sum(not o.failed for o in same):>9}{statistics.median(lost):>20.0f}{max(lost):>5}"
            f"{statistics.median(seconds):>20.1f}{max(seconds):>7.1f}"
        )
    print(
        f"{result['steps']} steps, each recorded once: {'yes' if result['each_step_once'] else 'NO'}; "
        f"stopped in order, with its checkpoint: {'yes' if result['stopped_in_order'] else 'NO'}"
    )
    if not survived(result):
        print(result["log"])
