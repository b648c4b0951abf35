"""Fine-tuning of several models on one task, and their comparison as JSON and as a table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raymoe.data.tokens import load_tokenizer
from raymoe.export.open import StoredModel
from raymoe.finetune.batches import Encoded, encode_examples
from raymoe.finetune.metrics import majority, paired_difference
from raymoe.finetune.readers import TaskData
from raymoe.finetune.results import Results, SeedResult
from raymoe.finetune.tasks import Task
from raymoe.finetune.train import Settings, draw, run_seed
from raymoe.model.transformer import Transformer
from raymoe.report.intervals import Interval
from raymoe.storage.files import CorruptFile

Progress = Callable[[str, int, int], Any]
"""Receives a stage, the steps done and the steps in total."""


class Candidate:
    """A stored model with its encoding of a task's examples. Weights and examples are read at the first use."""

    def __init__(self, stored: StoredModel, data: TaskData, settings: Settings) -> None:
        self.stored, self.data, self.settings = stored, data, settings

    @cached_property
    def pretrained(self) -> Transformer:
        return self.stored.model()

    @cached_property
    def encoded(self) -> tuple[Encoded, dict[str, Encoded]]:
        """Training and dev examples in the tokens of this model."""
        path, model = self.stored.tokenizer, self.stored.config.model
        tokenizer = load_tokenizer(path.read_bytes(), str(path), model.vocabulary)
        train = [self.data.train[i] for i in draw(len(self.data.train), self.settings)]
        return encode_examples(tokenizer, train, model.context), {
            split: encode_examples(tokenizer, examples, model.context) for split, examples in self.data.dev.items()
        }

    def run(self, task: Task, settings: Settings, seed: int, progress: Callable[[int, int], Any]) -> SeedResult:
        train, dev = self.encoded
        transformer = copy.deepcopy(self.pretrained)
        outcome = run_seed(transformer, task, train, dev, settings, seed, progress)
        truncated = {split or "dev": encoded.truncated for split, encoded in dev.items()}
        return SeedResult(seed, outcome, {"train": train.truncated} | truncated)


@dataclass(frozen=True)
class Row:
    """The results of all seeds for one model and one kind of initial weights."""

    label: str
    stored: StoredModel
    settings: Settings
    results: list[SeedResult]

    def values(self, score: str) -> list[float]:
        return [result.outcome.scores[score] for result in self.results]


def finetune_model(
    root: str, name: str, stored: StoredModel, task: Task, data: TaskData, all_settings: Sequence[Settings], seeds: Sequence[int],
    *, progress: Progress, warn: Callable[[str], Any],
) -> list[Row]:  # fmt: skip
    """Fine-tune a model with each of the settings and seeds, and store each result. Stored ones are not repeated.

    name: of the model in tables. The settings may differ in the initial weights only. Raises ValueError, OSError or
    FloatingPointError.
    """
    candidate, rows = Candidate(stored, data, all_settings[0]), []
    for settings in all_settings:
        label = name if settings.initial == "pretrained" else f"{name} (random)"
        results = Results(root, stored, task, data.fingerprint, settings)
        found: list[SeedResult] = []
        for seed in seeds:
            try:
                result = results.read(seed)
            except CorruptFile as error:
                warn(f"stored result skipped, seed {seed} is repeated: {error}")
                result = None
            if result is None:
                stage = f"{label[:22]}, seed {seed}"
                result = candidate.run(task, settings, seed, lambda done, total, s=stage: progress(s, done, total))
                results.write(result)
            found.append(result)
        rows.append(Row(label, stored, settings, found))
    return rows


def summarize(task: Task, data: TaskData, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the comparison as JSON: scores as fractions, differences to the first row paired by seed."""
    labels = {split: np.array([example.label for example in examples]) for split, examples in data.dev.items()}
    settings = rows[0].settings
    used = draw(len(data.train), settings)
    train_label_N = np.array([data.train[i].label for i in used])
    return {
        "task": task.name,
        "data": {
            "source": data.source, "fingerprint": data.fingerprint, "train_examples": len(used),
            "dev_examples": {split or "dev": len(label_N) for split, label_N in labels.items()}, "skipped": data.skipped,
        },
        "settings": {name: value for name, value in asdict(settings).items() if name != "initial"},
        "epoch": "last",
        "majority": majority(task, train_label_N, labels),
        "models": [_model(task, row, None if i == 0 else rows[0]) for i, row in enumerate(rows)],
    }  # fmt: skip


def _model(task: Task, row: Row, first: Row | None) -> dict[str, Any]:
    return {
        "name": row.label,
        "folder": str(row.stored.folder),
        "step": row.stored.step,
        "initial": row.settings.initial,
        "truncated": row.results[0].truncated,
        "seeds": [result.to_dict() | {"stored": result.stored} for result in row.results],
        "scores": {
            score: {
                **Interval.of(row.values(score)).to_dict(),
                "difference": paired_difference(row.values(score), first.values(score)).to_dict() if first else None,
            }
            for score in task.scores
        },
    }


def table(task: Task, result: Mapping[str, Any]) -> str:
    """Return the comparison as text for a terminal."""
    data, settings = result["data"], result["settings"]
    dev = " and ".join(f"{n:,} {split}" for split, n in data["dev_examples"].items())
    wide = max(len("majority class"), *(len(model["name"]) for model in result["models"]))
    name = max(map(len, task.scores))
    lines = [
        f"task       {task.folder}: {data['train_examples']:,} training examples, {dev} examples ({data['source']})",
        f"settings   {settings['epochs']} epochs, batch {settings['batch']}, peak learning rate {settings['lr']:g}, "
        f"{settings['precision']}",
        "scores     x 100, dev set after the last epoch; mean ± half the 95 % interval (Student t over seeds)",
        "",
        f"{'model':{wide}}  {'score':{name}}  {'mean':>15}  {'difference':>15}  by seed",
    ]
    for model in result["models"]:
        for score in task.scores:
            found, by_seed = model["scores"][score], [seed["scores"][score] for seed in model["seeds"]]
            lines.append(
                f"{model['name']:{wide}}  {score:{name}}  {_text(found):>15}  {_text(found['difference'], '+'):>15}  "
                + " ".join(f"{100 * value:.1f}" for value in by_seed)
            )
    constant = "majority class" if task.labels else "constant"
    for score in task.scores:
        lines.append(f"{constant:{wide}}  {score:{name}}  {100 * result['majority'][score]:>15.2f}  {'-':>15}")
    lines.append("")
    if len(result["models"]) > 1:
        lines.append(f"difference: to {result['models'][0]['name']}, paired by seed, with its 95 % interval")
    counts: dict[str, str] = {}  # models of one folder encode the examples alike
    for model in result["models"]:
        counts.setdefault(model["folder"], ", ".join(f"{n:,} {split}" for split, n in model["truncated"].items()))
    lines += [f"truncated  {text} examples, to the context of {folder}" for folder, text in counts.items()]
    return "\n".join(lines)


def _text(found: Mapping[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "-"
    width = found["half_width"]
    return f"{100 * found['mean']:{sign}.2f}" + ("" if width is None else f" ±{100 * width:.2f}")
