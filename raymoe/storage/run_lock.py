"""Exclusive ownership of a run: a lock file beside its folder, on any file system that all nodes share.

The file is created with O_EXCL and names its owner. The owner touches it every HEARTBEAT_S. A lock counts as
abandoned if its owner's process on this machine has ended, or, for an owner on another machine, if the file
has not been touched for HEARTBEAT_TIMEOUT_S by the clock of the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from raymoe.storage.run_folder import RunFolder

HEARTBEAT_S = 5.0
HEARTBEAT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Owner:
    """The process that owns a run."""

    token: str
    """Unique to one ownership."""
    host: str
    namespace: str
    """Boot and process namespace in which `pid` is valid."""
    pid: int
    process_started: float
    """Start time of the process, in seconds since the epoch: a later process may reuse the pid."""
    since: str

    @classmethod
    def current(cls) -> Owner:
        """Describe this process, with a new token."""
        process = psutil.Process()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(
            uuid.uuid4().hex, socket.gethostname(), _namespace(), process.pid, process.create_time(), since
        )  # fmt: skip

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunInUse(OSError):
    """Another live process owns the run. The message names it."""


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """Own the run in folder `run`, which need not exist, until the context exits.

    Raises RunInUse if a live process owns it, OSError if the lock file cannot be written.
    """
    lock, mine = RunFolder(run).lock, Owner.current()
    lock.parent.mkdir(parents=True, exist_ok=True)
    while not _create(lock, mine):
        _remove_abandoned(lock, run)
    over = threading.Event()
    heartbeat = threading.Thread(target=_touch, args=(lock, mine, over), name="run-lock", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        over.set()
        heartbeat.join()
        if _read(lock) == mine:
            lock.unlink(missing_ok=True)


def check_free(run: Path) -> None:
    """Raise RunInUse if a live process owns the run in folder `run`."""
    lock = RunFolder(run).lock
    owner = _read(lock)
    if owner is not None and (age := _age(lock)) is not None:
        _refuse_if_alive(run, owner, age)


def _refuse_if_alive(run: Path, owner: Owner, age: float) -> None:
    if _alive(owner, age):
        elsewhere = owner.namespace != _namespace()
        dead = f"; the lock of a dead process is released after {HEARTBEAT_TIMEOUT_S:.0f} s" if elsewhere else ""
        raise RunInUse(
            f"{run} is in use by {owner} (last heartbeat {age:.0f} s ago): wait until it ends, stop it, or choose "
            f"another run.name{dead}"
        )


def _create(lock: Path, owner: Owner) -> bool:
    """Create the lock file with its content in one atomic step; False if it exists."""
    draft = lock.with_name(f"{lock.name}.{owner.token}")
    try:
        draft.write_text(json.dumps(asdict(owner)))
        try:
            os.link(draft, lock)  # atomic on NFS, and the file is never seen empty
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with lock.open("x") as file:
                    file.write(draft.read_text())
            except FileExistsError:
                return False
        return True
    finally:
        draft.unlink(missing_ok=True)


def _remove_abandoned(lock: Path, run: Path) -> None:
    """Remove the lock of an owner that has ended. Raises RunInUse if the owner is alive."""
    owner, age = _read(lock), _age(lock)
    if age is None:
        return  # released in the meantime
    if owner is None and age < HEARTBEAT_TIMEOUT_S:
        raise RunInUse(f"{run} is in use, and {lock} cannot be read: wait {HEARTBEAT_TIMEOUT_S:.0f} s, or delete it")
    if owner is not None:
        _refuse_if_alive(run, owner, age)
    aside = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(aside)
        if _read(aside) != owner:  # another process took the run over first: give its lock back
            with contextlib.suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _alive(owner: Owner, age: float) -> bool:
    if owner.namespace != _namespace():
        return age < HEARTBEAT_TIMEOUT_S
    try:
        process = psutil.Process(owner.pid)
        return abs(process.create_time() - owner.process_started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _read(lock: Path) -> Owner | None:
    try:
        return Owner(**json.loads(lock.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _age(lock: Path) -> float | None:
    """Seconds since the last heartbeat, by the clock of the file system; None if the file is gone."""
    probe = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - lock.stat().st_mtime)
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _touch(lock: Path, owner: Owner, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            if _read(lock) == owner:
                os.utime(lock)


def _namespace() -> str:
    """Identify the boot and the process namespace of this process; the host name where Linux's files are absent."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
