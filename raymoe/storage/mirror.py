"""A second home for runs, by URI: whatever pyarrow's file systems reach (s3://, gs://, hdfs://, a folder of another disk).

    URI/NAME/config.json, metrics.jsonl, plans.jsonl, report.html
             checkpoints/step_00000200/…    as in the run's folder, manifest.json last

The run's own folder comes first and often; this one more rarely. Credentials come from the environment, as each store
documents (AWS_ACCESS_KEY_ID, …); options go into the query: s3://bucket/folder?region=…&endpoint_override=host:port&scheme=http
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs

from raymoe.storage.checkpoint import Checkpoint, CorruptCheckpoint
from raymoe.storage.manifest import MANIFEST
from raymoe.storage.run_folder import RunFolder

RECORDS = ("config.json", "metrics.jsonl", "plans.jsonl", "report.html")


class Mirror:
    """The copy of run `name` at `uri`. Methods raise OSError when the store does not do as it should."""

    def __init__(self, uri: str, name: str) -> None:
        """Raises ValueError for a URI that no file system takes, or that holds credentials."""
        if urlsplit(uri).username is not None or re.search(r"(secret|access)_?key", uri, re.IGNORECASE):
            raise ValueError("checkpoint.storage holds credentials: give them in the environment, not in the URI")
        try:
            self.files, base = fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError) as error:
            raise ValueError(f"checkpoint.storage={uri!r} is not allowed: {error}") from None
        self.uri, self.base = uri, f"{base.rstrip('/')}/{name}"

    def make(self) -> None:
        """Make its folder: a store that cannot be reached or written is known before there is anything to lose."""
        self.files.create_dir(self.base, recursive=True)

    def push(self, run: Path, step: int | None, keep: int) -> None:
        """Copy the run's records and, with `step`, that checkpoint; of those there the newest `keep` stay."""
        self.make()
        if step is not None:
            folder = RunFolder(run).checkpoints / f"step_{step:08d}"
            there = f"{self.base}/checkpoints/{folder.name}"
            self.files.create_dir(there, recursive=True)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
                self._copy(path, f"{there}/{path.name}")
            for old in self.steps()[keep:]:
                self.files.delete_file(f"{self._step(old)}/{MANIFEST}")  # first: what is left is no checkpoint
                self.files.delete_dir(self._step(old))
        for name in RECORDS:
            if (run / name).exists():
                self._copy(run / name, f"{self.base}/{name}")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints there, newest first."""
        selector = fs.FileSelector(f"{self.base}/checkpoints", recursive=True, allow_not_found=True)
        found = (re.search(rf"/step_(\d{{8,}})/{MANIFEST}$", info.path) for info in self.files.get_file_info(selector))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def pull(self, run: Path) -> list[str]:
        """Make the folder `run` of the copy: records and the newest checkpoint whose checksums hold; returns what was passed over.

        Raises FileNotFoundError where there is no such copy, or none with a checkpoint that can be read. A pull that
        fails or is interrupted leaves no `run`.
        """
        if self.files.get_file_info(f"{self.base}/config.json").type != fs.FileType.File:
            raise FileNotFoundError(f"there is no run at {self.uri} named {run.name}: it has no config.json there")
        partial, passed_over = run.with_name(f".{run.name}.partial"), []
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for step in self.steps():
                folder = RunFolder(partial).checkpoints / f"step_{step:08d}"
                folder.mkdir(parents=True)
                for info in self.files.get_file_info(fs.FileSelector(self._step(step))):
                    if info.type == fs.FileType.File and re.fullmatch(r"\w[\w.-]*", info.base_name):
                        self._fetch(info.path, folder / info.base_name)
                try:
                    Checkpoint.open(folder)
                    break
                except CorruptCheckpoint as error:
                    passed_over.append(f"{self.uri}: {error.file.name} of step {step} {error.reason}")
                    shutil.rmtree(folder)
            else:
                raise FileNotFoundError(
                    f"{self.uri} has no checkpoint of {run.name} that can be read: {'; '.join(passed_over) or 'none was copied there'}"
                )
            for name in RECORDS:
                if self.files.get_file_info(f"{self.base}/{name}").type == fs.FileType.File:
                    self._fetch(f"{self.base}/{name}", partial / name)
            partial.rename(run)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return passed_over

    def _step(self, step: int) -> str:
        return f"{self.base}/checkpoints/step_{step:08d}"

    def _copy(self, path: Path, there: str) -> None:
        with path.open("rb") as source, self.files.open_output_stream(there) as target:
            shutil.copyfileobj(source, target, 1 << 20)

    def _fetch(self, there: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.files.open_input_stream(there) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


class BackgroundMirror:
    """Pushes on one thread while training goes on; a checkpoint that comes while one is copied waits for its turn."""

    def __init__(self, mirror: Mirror, run: Path, keep: int) -> None:
        self.mirror, self.run, self.keep = mirror, run, keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._pushes: list[tuple[int, Future[None]]] = []
        self.newest = -1
        """Step of the checkpoint that was pushed last."""

    def pending_steps(self) -> set[int]:
        """Of checkpoints that are being copied, or wait for it: they must stay."""
        return {step for step, push in self._pushes if not push.done()}

    def push(self, step: int) -> None:
        self.newest = step
        self._pushes.append((step, self._pool.submit(self.mirror.push, self.run, step, self.keep)))

    def failures(self, wait: bool = False) -> list[tuple[int, str]]:
        """(step, reason) of pushes that failed since the last call; with `wait`, all of them are over."""
        over = [(step, push) for step, push in self._pushes if wait or push.done()]
        self._pushes = [pair for pair in self._pushes if pair not in over]
        return [(step, str(error)) for step, push in over if (error := push.exception())]
