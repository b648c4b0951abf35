"""The stages of the demo: train and kill a worker, compare, export, evaluate, serve, and load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from raymoe.commands.demo_compare import SEEDS, VARIANTS, results_file
from raymoe.commands.demo_serve import Served, serve_and_load
from raymoe.commands.demo_tables import comparison, plan_line, reading
from raymoe.config import default_root
from raymoe.ops.ray_head import Head, head
from raymoe.storage.files import read_json, write_json
from raymoe.storage.run_folder import RunFolder, artifact_folder, read_records, run_folder
from raymoe.training.run_report import write_report

CHECKPOINT_EVERY = 40


class StageFailed(RuntimeError):
    """A stage of the demo failed; the message names its log."""


class Progress:
    """One line per stage with its seconds; while a stage runs, a progress line on a terminal."""

    def __init__(self, stages: int) -> None:
        self.stages, self.stage = stages, 0

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self.stage += 1
        label = f"[{self.stage}/{self.stages}] {title} "
        started = time.monotonic()
        if sys.stdout.isatty():
            self.update(title)
        try:
            yield
        except BaseException:
            self._line(f"{label:.<72} failed after {time.monotonic() - started:.0f} s")
            raise
        self._line(f"{label:.<72} {time.monotonic() - started:4.0f} s")

    def update(self, text: str) -> None:
        """Replace the progress line. Prints nothing where the output is no terminal."""
        if sys.stdout.isatty():
            print(f"\r\033[K      {text}", end="", flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._line(f"      {text}")

    @staticmethod
    def _line(text: str) -> None:
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def submit(ray: Head, log: Path, *command: str) -> subprocess.Popen:
    """Submit `raymoe` or another module as a Ray job; its output goes to `log`."""
    name = f"{log.parents[1].name}-{log.stem}"
    line = ray.submit(sys.executable, "-m", *command, working_dir=None, submission_id=name)
    with log.open("w") as output:
        return subprocess.Popen(line, env=ray.environment, stdout=output, stderr=subprocess.STDOUT)


def wait(jobs: dict[subprocess.Popen, Path], update: Callable[[], None] = lambda: None) -> None:
    """Wait until all jobs have ended, calling `update` twice a second. Raises StageFailed for the first that failed."""
    try:
        for process, log in jobs.items():
            while process.poll() is None:
                update()
                time.sleep(0.5)
            if process.returncode:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise StageFailed(f"{tail}\nfull log: {log}")
    finally:
        for process in jobs:
            if process.poll() is None:
                process.terminate()
                process.wait()


class Victim:
    """Kills one worker of a run after a third of its steps, and measures the recovery from the run's records."""

    def __init__(self, ray: Head, run: Path, progress: Progress, steps: int) -> None:
        self.ray, self.run, self.progress, self.steps = ray, RunFolder(run), progress, steps
        self.killed_at: float | None = None
        self.step_at_kill = 0
        self.recovered: dict[str, Any] | None = None

    def update(self) -> None:
        """Show the newest record; kill a worker once a checkpoint is complete; note when training has resumed."""
        records = read_records(self.run.metrics)
        trains = [r for r in records if r["kind"] == "train"]
        if not trains:
            return
        last = trains[-1]
        left = (self.steps - last["step"]) * last["step_ms"] / 1000
        loss = "-" if last["loss"] is None else f"{last['loss']:.2f}"
        self.progress.update(f"step {last['step']}/{self.steps}  loss {loss}  {last['tokens_per_s']:,.0f} tokens/s  {left:.0f} s left")  # fmt: skip
        if self.killed_at is None:
            complete = [r["checkpoint"] for r in records if r.get("name") == "checkpoint_completed"]
            if complete and last["step"] > max(complete[-1], self.steps // 3):
                self._kill(last["step"])
        elif self.recovered is None:
            resumed = [r for r in records if r.get("name") == "resumed"]
            if resumed and last["step"] > resumed[-1]["step"]:
                self.recovered = resumed[-1] | {"seconds": time.monotonic() - self.killed_at}

    def _kill(self, step: int) -> None:
        workers: list[psutil.Process] = self.ray.processes("RayTrainWorker")
        if workers:
            workers[-1].send_signal(signal.SIGKILL)
            self.killed_at, self.step_at_kill = time.monotonic(), step

    def summary(self) -> str:
        if self.recovered is None:
            return "no worker was killed: the run ended too early"
        return (
            f"worker killed (SIGKILL) after step {self.step_at_kill}; training resumed from the checkpoint of step "
            f"{self.recovered['step']} after {self.recovered['seconds']:.0f} s"
        )


def train(ray: Head, logs: Path, root: str, name: str, steps: int, progress: Progress) -> Victim:
    """Train with 2 workers and a forced plan, and kill a worker. Raises StageFailed.

    The plan follows the restart by some seconds, so that monitoring sees the workers' counters before and after it.
    """
    planned = steps * 9 // 16
    command = [
        "raymoe", "train", "tiny", f"run.name={name}", f"run.root={root}", f"train.steps={steps}", "train.workers=2",
        f"checkpoint.every={CHECKPOINT_EVERY}", f"regroup.burn_in={planned}", f"regroup.force={planned}",
        "train.aux_loss=0",
    ]  # fmt: skip
    log = logs / "train.log"
    victim = Victim(ray, run_folder(root, name), progress, steps)
    wait({submit(ray, log, *command): log}, victim.update)
    return victim


def compare(ray: Head, logs: Path, folder: Path, steps: int, progress: Progress) -> list[dict[str, Any]]:
    """Train the four models with each seed, in one job; return their results. Raises StageFailed."""
    log, file = logs / "compare.log", results_file(folder)

    def results() -> list[dict[str, Any]]:
        return read_json(file)["runs"] if file.is_file() else []

    def update() -> None:
        trained = sum(result["finished"] for result in results())
        progress.update(f"{trained} of {len(SEEDS) * len(VARIANTS)} models trained")

    wait({submit(ray, log, "raymoe.commands.demo_compare", str(folder), str(steps)): log}, update)
    return results()


def run_stages(root: str, steps: int) -> None:
    """Run all stages and print the result. Raises StageFailed, RuntimeError or OSError."""
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    folder = Path(root) / f"{name}-compare"
    logs = folder / "logs"
    logs.mkdir(parents=True)
    print(f"raymoe demo: about 7 minutes on 2 cores\nruns and exports  {root}\nlogs of stages    {logs}\n", flush=True)
    started = time.monotonic()
    progress = Progress(6)
    with progress("start a Ray head"):
        context = head(max(2, os.cpu_count() or 1))
        ray = context.__enter__()
    try:
        with progress("train: 2 workers, experts regroup, one worker is killed"):
            victim = train(ray, logs, root, name, steps, progress)
            progress.note(victim.summary())
            progress.note(plan_line(read_records(RunFolder(run_folder(root, name)).plans)))
        with progress(f"compare: {len(VARIANTS)} models on the same tokens, {len(SEEDS)} seeds each"):
            compared = compare(ray, logs, folder, steps, progress)
        artifact, evaluation = artifact_folder(root, name), folder / "evaluation.json"
        with progress("export (INT4 experts, the rest FP16) and evaluate the export"):
            for command in (
                ["raymoe", "export", name, "--root", root, "--tokens", "50000"],
                ["raymoe", "evaluate", str(artifact), "--json", str(evaluation), "--quiet"],
            ):
                log = logs / f"{command[1]}.log"
                wait({submit(ray, log, *command): log})
        with progress("serve and load: 16 streams, 80 % of prompts from one domain"):
            served = serve_and_load(ray, root, artifact, run_folder(root, name), progress.update)
            for line in served.lines():
                progress.note(line)
    finally:
        context.__exit__(None, None, None)
    with progress("write the report"):
        table = comparison(compared, artifact, evaluation, steps)
        write_json(RunFolder(run_folder(root, name)).comparison, table.to_dict())
        report = write_report(run_folder(root, name))
    print(f"\n{table}\n\n{reading(compared)}\n")
    print(conclusion(served, victim, report, artifact, root, name, time.monotonic() - started))


def conclusion(
    served: Served, victim: Victim, report: Path, artifact: Path, root: str, name: str, seconds: float
) -> str:
    """Return the last lines: where to look next, what was seen, what the demo does not show, and what to do next."""
    where = "" if root == str(Path(default_root()).resolve()) else f" --root {root}"
    survived = "a run that lost a worker and finished" if victim.recovered else "a run that finished"
    return (
        f"Where to look next\n"
        f"  report    {report}\n"
        f"  artifact  {artifact}\n"
        f'  generate  raymoe generate {name} "The licence grants"{where}\n'
        f"  serve     make serve   (or: raymoe serve {name}{where} --start)\n\n"
        f"Seen: {survived}, a plan applied between two steps, an export, and {served.requests} requests of which "
        f"{served.failed} failed.\n"
        f"Not shown: which model is better. {len(SEEDS)} seeds of a short run on one machine do not decide that; "
        f"nothing ran on a GPU.\n"
        f'Next: train on your text with `raymoe train small data.path=FILE`, and read README.md, "Measured".\n\n'
        f"took {seconds:.0f} s"
    )
