"""Progress of a run in the terminal or the log of its driver: a bar, or one line per record of metrics.jsonl."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from raymoe.storage.run_folder import parse_record


class Progress:
    """Follower of a run's metrics.jsonl. Shows a bar on a terminal and lines elsewhere.

    Output stops without an error once the terminal or the pipe is closed: the run must not end with it.
    """

    def __init__(self, path: Path, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.steps, self.remaining = path, steps, TimeLeft(steps, clock)
        self.file = self.position = 0
        self.shown: set[int] = set()
        """Hashes of lines already read: a restart replaces the file by a part of it."""
        self.closed = False
        self._read()
        self.bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def update(self) -> None:
        """Show the records that were added since the last call."""
        for line in self._read():
            record = parse_record(line.decode(errors="replace"))
            if record is not None and not self.closed:
                try:
                    self._show(record)
                except OSError:
                    self.closed = True
                except (KeyError, TypeError, ValueError, AttributeError):
                    continue  # a damaged record

    def close(self) -> None:
        """Show the last records and end the bar."""
        self.update()
        try:
            self.bar.close()
        except OSError:
            self.closed = True

    def _read(self) -> list[bytes]:
        """Return the complete lines that are new."""
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

    def _show(self, record: Mapping[str, Any]) -> None:
        text = describe(record)
        if record.get("kind") == "train" and not self.bar.disable:
            self.bar.n = record["step"]
            self.bar.set_postfix_str(text)
        elif text:
            left = f"  {seconds} left" if (seconds := self.remaining.after(record)) else ""
            file = sys.stderr if not self.bar.disable else sys.stdout
            tqdm.write(f"step {record['step']}/{self.steps}  {text}{left}", file=file)
            file.flush()


class TimeLeft:
    """Estimate of the time to the last step, from the steps and the seconds since the first record of a worker group."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps, self.clock = steps, clock
        self.first: tuple[int, float] | None = None

    def after(self, record: Mapping[str, Any]) -> str:
        """Return the time left after a train record, as text; empty for other records and at the end."""
        if record.get("name") in ("resumed", "restarted"):
            self.first = None
        if record.get("kind") != "train":
            return ""
        step, now = record["step"], self.clock()
        if self.first is None or step <= self.first[0]:
            self.first = (step, now)
            seconds_per_step = record["step_ms"] / 1000
        else:
            seconds_per_step = (now - self.first[1]) / (step - self.first[0])
        return duration((self.steps - step) * seconds_per_step) if step < self.steps else ""


def duration(seconds: float) -> str:
    """Return `seconds` in the two largest of d, h, min and s that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe(record: Mapping[str, Any]) -> str:
    """Return one line for a record of metrics.jsonl; empty for records that are not shown."""
    kind = record.get("kind")
    if kind == "train":
        balance = record["load_cv"]
        return (
            f"loss {_number(record['loss'], '.3f')}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"load CV experts {_number(balance['experts'], '.2f')} clusters {_number(balance['clusters'], '.2f')}"
        )
    if kind == "validation":
        return f"validation loss {_number(record['loss'], '.4f')}  perplexity {_number(record['perplexity'], '.2f')}"
    if kind == "event":
        name, rest = record["name"], {k: v for k, v in record.items() if k not in ("kind", "step", "seconds", "name")}
        values = [f"{v}" if k == name else f"{k.replace('_', ' ')} {v}" for k, v in rest.items()]
        return f"{name} {', '.join(values)}".rstrip()
    return ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
