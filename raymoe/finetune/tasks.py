"""The nine GLUE tasks: columns, labels and metrics of each (Wang et al., arXiv 1804.07461)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

HUB_NAME = "nyu-mll/glue"
"""Data set of the Hugging Face hub with a subset for each task."""


class Example(NamedTuple):
    """A sentence or a pair of sentences with its label."""

    first: str
    second: str | None
    label: float
    """Index into `Task.labels`, or the score of a regression task."""


class Split(NamedTuple):
    """A dev set: its name in scores (empty: the only one), its file and its split on the hub."""

    name: str
    file: str
    hub: str


@dataclass(frozen=True)
class Task:
    """Where a task's examples are, and how they are scored."""

    name: str
    """Name on the command line, and of the subset on the hub."""
    folder: str
    """Name of the folder in the classic download."""
    columns: tuple[str, ...]
    """Columns of the one or two sentences in the TSV files."""
    label_column: str
    labels: tuple[str, ...]
    """Texts of the labels in the TSV files, in the order of the hub's ids. Empty: a regression task."""
    metrics: tuple[str, ...]
    """Names in `metrics.METRICS`. Label 1 is the positive class of F1."""
    hub_columns: tuple[str, ...]
    header: tuple[str, ...] = ()
    """Columns of TSV files without a header line."""
    dev: tuple[Split, ...] = (Split("", "dev.tsv", "validation"),)
    broken_rows: float = 0.0
    """Largest share of rows with a wrong number of columns that a TSV file may have; these rows are skipped."""
    score_range: tuple[float, float] = (0.0, 5.0)
    """Least and greatest score of a regression task."""

    @property
    def n_outputs(self) -> int:
        """Outputs of the head: one per label, one for a regression."""
        return len(self.labels) or 1

    @property
    def scores(self) -> list[str]:
        """Names of all scores, for example `F1` or `accuracy (matched)`."""
        return [score_name(metric, split.name) for split in self.dev for metric in self.metrics]


def score_name(metric: str, split: str) -> str:
    """Return the name of a metric on a dev set."""
    return f"{metric} ({split})" if split else metric


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", ("sentence",), "label", BINARY, ("Matthews",), ("sentence",),
            header=("source", "label", "mark", "sentence"),
        ),
        Task("sst2", "SST-2", ("sentence",), "label", BINARY, ("accuracy",), ("sentence",)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "F1"), PAIR),
        Task("stsb", "STS-B", PAIR, "score", (), ("Pearson", "Spearman"), PAIR),
        # The released QQP files have rows that a line end inside a question breaks.
        Task(
            "qqp", "QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "F1"),
            ("question1", "question2"), broken_rows=0.001,
        ),
        Task(
            "mnli", "MNLI", PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
            ("premise", "hypothesis"),
            dev=(
                Split("matched", "dev_matched.tsv", "validation_matched"),
                Split("mismatched", "dev_mismatched.tsv", "validation_mismatched"),
            ),
        ),
        Task("qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",), ("question", "sentence")),
        Task("rte", "RTE", PAIR, "label", ENTAILMENT, ("accuracy",), PAIR),
        Task("wnli", "WNLI", PAIR, "label", BINARY, ("accuracy",), PAIR),
    )
}  # fmt: skip
"""Name -> task."""
