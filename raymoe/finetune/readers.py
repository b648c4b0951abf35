"""Readers of GLUE data: TSV folders of the classic download, and the hub. They refuse data in another layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raymoe.config import expand
from raymoe.finetune.tasks import HUB_NAME, Example, Task

TRAIN = "train.tsv"


@dataclass(frozen=True)
class TaskData:
    """The labeled examples of a task. Its test set has no labels and is not read."""

    source: str
    """Folder or name of the data set."""
    train: list[Example]
    dev: dict[str, list[Example]]
    """Dev set -> examples."""
    skipped: list[str]
    """A line for each file with skipped rows."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all examples in their order; it does not depend on the source."""
        content = json.dumps([self.train, list(self.dev.items())], ensure_ascii=False)
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def read_task(task: Task, folder: str | None) -> TaskData:
    """Read a task from the folder of its TSV files, or from the folder above; from the hub without a folder.

    Raises FileNotFoundError for a missing file, ValueError for data in another layout or an unavailable hub.
    """
    if folder is None:
        return _read_hub(task)
    root = _folder_of(task, expand(folder))
    skipped: list[str] = []
    train = _read_tsv(root / TRAIN, task, skipped)
    dev = {split.name: _read_tsv(root / split.file, task, skipped) for split in task.dev}
    return TaskData(str(root), train, dev, skipped)


def _folder_of(task: Task, given: Path) -> Path:
    candidates = (given, given / task.folder)
    for folder in candidates:
        if (folder / TRAIN).is_file():
            return folder
    missing = " nor ".join(str(folder / TRAIN) for folder in candidates)
    raise FileNotFoundError(f"there is neither {missing}: give the folder of the {task.folder} files")


# TSV files


def _read_tsv(path: Path, task: Task, skipped: list[str]) -> list[Example]:
    """Return the examples of a file. Rows that the task allows to be broken are added to `skipped` in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a folder of {task.folder} needs it")
    rows = _rows(path)
    header = task.header or next((columns for _, columns in rows), ())
    _check_header(path, header, task)
    texts, label = [header.index(name) for name in task.columns], header.index(task.label_column)
    examples: list[Example] = []
    broken: list[int] = []
    for line, columns in rows:
        if len(columns) != len(header):
            if not task.broken_rows:
                raise ValueError(f"{path}:{line}: {_expected_columns(columns, header)}")
            broken.append(line)
            continue
        sentences = [columns[i] for i in texts]
        examples.append(_example(sentences, _label(columns[label], task, f"{path}:{line}")))
    total = len(examples) + len(broken)
    if len(broken) > task.broken_rows * total:
        raise ValueError(
            f"{path}:{broken[0]}: {len(broken)} of {total} rows do not have the {len(header)} columns "
            f"{', '.join(header)}; expected at most {task.broken_rows:.1%} of them: download the file again"
        )
    if not examples:
        raise ValueError(f"{path}:{1 if task.header else 2}: no examples, expected a row of {', '.join(header)}")
    if broken:
        skipped.append(
            f"{path}: {len(broken)} of {total} rows without {len(header)} columns, first in line {broken[0]}"
        )
    return examples


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, columns). Quotes are plain text, and only \\n ends a line. A byte order mark is dropped."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line, text in enumerate(file, 1):
                yield line, text.removesuffix("\n").removesuffix("\r").split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{line + 1}: not UTF-8 ({error.reason} near this line), expected UTF-8 text: convert the file"
        ) from None


def _check_header(path: Path, header: Sequence[str], task: Task) -> None:
    required = (*task.columns, task.label_column)
    if not header:
        raise ValueError(f"{path}:1: the file is empty, expected a header with {', '.join(required)}")
    if any(header.count(name) != 1 for name in required):
        raise ValueError(
            f"{path}:1: the header has the columns {', '.join(map(repr, header[:20]))}, expected "
            f"{', '.join(map(repr, required))}, each once: give the {task.folder} files of the GLUE download"
        )


def _expected_columns(columns: Sequence[str], header: Sequence[str]) -> str:
    return f"{len(columns)} columns separated by tabs, expected {len(header)}: {', '.join(header)}"


def _label(text: str, task: Task, place: str) -> float:
    if task.labels:
        if text not in task.labels:
            expected = ", ".join(map(repr, task.labels))
            raise ValueError(f"{place}: {task.label_column} is {text!r}, expected one of {expected}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    return _score(score, text, task, place)


def _score(score: float, text: object, task: Task, place: str) -> float:
    """Return the score of a regression. Raises ValueError if it is outside of the task's range."""
    least, greatest = task.score_range
    if not least <= score <= greatest:
        raise ValueError(f"{place}: {task.label_column} is {text!r}, expected a number from {least:g} to {greatest:g}")
    return score


def _example(sentences: Sequence[str], label: float) -> Example:
    return Example(sentences[0], sentences[1] if len(sentences) > 1 else None, label)


# The hub


def _read_hub(task: Task) -> TaskData:
    from raymoe.data.sources import load_from_hub  # late import: pyarrow

    name = f"{HUB_NAME}, {task.name}"
    try:
        sets = load_from_hub(HUB_NAME, task.name)
    except ValueError as error:
        raise ValueError(
            f"the data set {name} of the hub is not available ({error}): check the network (HF_ENDPOINT, HTTPS_PROXY), "
            f"or give a folder of TSV files with --data"
        ) from None
    train = _hub_examples(sets, "train", task, name)
    return TaskData(name, train, {split.name: _hub_examples(sets, split.hub, task, name) for split in task.dev}, [])


def _hub_examples(sets: Any, split: str, task: Task, name: str) -> list[Example]:
    if split not in sets:
        raise ValueError(f"{name}: no split {split!r}, expected train and {', '.join(s.hub for s in task.dev)}")
    rows, required = sets[split], [*task.hub_columns, "label"]
    if missing := [column for column in required if column not in rows.column_names]:
        raise ValueError(f"{name} {split}: no column {missing[0]!r}, expected {', '.join(required)}")
    examples: list[Example] = []
    for batch in rows.select_columns(required).iter(1000):
        for *sentences, label in zip(*(batch[column] for column in required), strict=True):
            place = f"{name} {split}, row {len(examples)}"
            if not all(isinstance(sentence, str) for sentence in sentences):
                raise ValueError(f"{place}: {', '.join(task.hub_columns)} expected to be text")
            examples.append(_example(sentences, _hub_label(label, task, place)))
    if not examples:
        raise ValueError(f"{name} {split}: no examples")
    return examples


def _hub_label(label: Any, task: Task, place: str) -> float:
    if not task.labels:
        return _score(label if isinstance(label, float) else math.nan, label, task, place)
    if label not in range(len(task.labels)):
        raise ValueError(
            f"{place}: label is {label!r}, expected 0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
        )
    return label
