"""Copies of runs at a URI that pyarrow's file systems support: s3://, gs://, hdfs:// or file://.

    URI/NAME/config.json, metrics.jsonl, plans.jsonl, report.html, tokenizer.json, chat_template.jinja
             checkpoints/step_00000200/…    as in the run's folder; manifest.json is copied last

The run's folder gets every checkpoint, the mirror some of them. Credentials come from the environment variables of
each store (AWS_ACCESS_KEY_ID, …). Options go into the query: s3://bucket/folder?region=…&endpoint_override=host:port&scheme=http
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs

from raymoe.data.document import CHAT_TEMPLATE_FILE
from raymoe.storage.checkpoint import Checkpoint, CorruptCheckpoint
from raymoe.storage.manifest import MANIFEST
from raymoe.storage.run_folder import RunFolder

RECORDS = ("config.json", "metrics.jsonl", "plans.jsonl", "report.html", "tokenizer.json", CHAT_TEMPLATE_FILE)


class Mirror:
    """The copy of run `name` at `uri`. Methods raise OSError if the store fails."""

    def __init__(self, uri: str, name: str) -> None:
        """Raises ValueError for a URI that no file system supports, or that contains credentials."""
        if urlsplit(uri).username is not None or re.search(r"(secret|access)_?key", uri, re.IGNORECASE):
            raise ValueError("checkpoint.storage contains credentials: set them in the environment, not in the URI")
        try:
            self.files, base = fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError) as error:
            raise ValueError(f"checkpoint.storage={uri!r} is not allowed: {error}") from None
        self.uri, self.base = uri, f"{base.rstrip('/')}/{name}"

    def make(self) -> None:
        """Create the folder. A run calls this before its first step, to detect a store that it cannot reach or write."""
        self.files.create_dir(self.base, recursive=True)

    def push(self, run: Path, step: int | None, keep: int) -> None:
        """Copy the run's records and the checkpoint of `step`, if given. Keep the newest `keep` checkpoints of the copy."""
        self.make()
        if step is not None:
            folder = RunFolder(run).checkpoints / f"step_{step:08d}"
            there = f"{self.base}/checkpoints/{folder.name}"
            self.files.create_dir(there, recursive=True)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
                self._copy(path, f"{there}/{path.name}")
            for old in self.steps()[keep:]:
                self.files.delete_file(
                    f"{self._step(old)}/{MANIFEST}"
                )  # first: after an interruption the checkpoint is incomplete
                self.files.delete_dir(self._step(old))
        for name in RECORDS:
            if (run / name).exists():
                self._copy(run / name, f"{self.base}/{name}")

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints of the copy, newest first."""
        selector = fs.FileSelector(f"{self.base}/checkpoints", recursive=True, allow_not_found=True)
        found = (re.search(rf"/step_(\d{{8,}})/{MANIFEST}$", info.path) for info in self.files.get_file_info(selector))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def pull(self, run: Path) -> list[str]:
        """Create the folder `run` from the copy: its records and its newest valid checkpoint. Return why newer ones were skipped.

        Raises FileNotFoundError if there is no copy, or no valid checkpoint in it. A pull that fails or is interrupted
        leaves no folder `run`.
        """
        if self.files.get_file_info(f"{self.base}/config.json").type != fs.FileType.File:
            raise FileNotFoundError(
                f"{self.uri} has no run named {run.name} (no config.json): check checkpoint.storage and the name"
            )
        partial, skipped = run.with_name(f".{run.name}.partial"), []
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
                    skipped.append(f"{self.uri}: {error.file.name} of step {step} {error.reason}")
                    shutil.rmtree(folder)
            else:
                raise FileNotFoundError(
                    f"{self.uri} has no valid checkpoint of {run.name}: {'; '.join(skipped) or 'none was copied'}"
                )
            for name in RECORDS:
                if self.files.get_file_info(f"{self.base}/{name}").type == fs.FileType.File:
                    self._fetch(f"{self.base}/{name}", partial / name)
            partial.rename(run)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return skipped

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
    """Pushes checkpoints on one thread during training, one after the other."""

    def __init__(self, mirror: Mirror, run: Path, keep: int) -> None:
        self.mirror, self.run, self.keep = mirror, run, keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._pushes: list[tuple[int, Future[None]]] = []
        self.newest = -1
        """Step of the last push."""

    def pending_steps(self) -> set[int]:
        """Return the steps of checkpoints that are not copied yet and must not be pruned."""
        return {step for step, push in self._pushes if not push.done()}

    def push(self, step: int) -> None:
        """Copy the checkpoint of `step` after those that are waiting."""
        self.newest = step
        self._pushes.append((step, self._pool.submit(self.mirror.push, self.run, step, self.keep)))

    def failures(self, wait: bool = False) -> list[tuple[int, str]]:
        """Return (step, reason) of the pushes that failed since the last call. `wait`: wait for all pushes first."""
        over = [(step, push) for step, push in self._pushes if wait or push.done()]
        self._pushes = [pair for pair in self._pushes if pair not in over]
        return [(step, str(error)) for step, push in over if (error := push.exception())]
