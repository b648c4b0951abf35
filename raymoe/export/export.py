"""Export of a run as an artifact, and measurement of the file that was written.

Weights are quantized once. The artifact is staged in a hidden folder, opened, evaluated, and published with the
measured metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.data.corpus import Corpus, Text
from raymoe.evaluation import Perplexity
from raymoe.export.align import align_clusters, kept_share, relabel_clusters
from raymoe.export.judge import Judgement, judge
from raymoe.export.open import StoredModel, open_run
from raymoe.model.transformer import Transformer
from raymoe.storage.artifact import Artifact
from raymoe.storage.artifact_encoding import Residuals
from raymoe.storage.artifact_layout import sizes
from raymoe.storage.artifact_writing import stage_artifact
from raymoe.storage.run_folder import artifact_folder

Progress = Callable[[str, int, int], None]
"""Receives (stage, units done, units in total) while a stage runs; the first call of a stage has 0 units done."""


@dataclass(frozen=True)
class Export:
    """A published artifact, its source and its metrics (as in `manifest.json`)."""

    target: Path
    source: StoredModel
    skipped: list[str]
    """Invalid checkpoints that were skipped, with reasons."""
    metrics: dict[str, Any]


def export(
    root: str,
    name: str,
    *,
    step: int | None = None,
    target: Path | None = None,
    tokens: int = 200_000,
    progress: Progress = lambda stage, done, total: None,
) -> Export:
    """Write the artifact of a run's newest valid checkpoint, or of the checkpoint of `step`.

    tokens: size of the validation text that the model is evaluated on. Raises FileNotFoundError, FileExistsError,
    CorruptCheckpoint, ValueError or OSError; no artifact is left behind then.
    """
    target = target or artifact_folder(root, name)
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or name another folder with --to")
    progress("read checkpoint", 0, 1)
    stored, skipped = open_run(root, name, step)
    assert stored.corpus is not None  # a run always has a corpus
    corpus = Corpus.open(stored.corpus)
    texts = _shortened(corpus, tokens)
    model = stored.model()
    progress("read checkpoint", 1, 1)
    trained = _judge(model, texts, corpus.end_of_text, "evaluate as trained", progress)
    tensors, assignment = model.logical(), stored.assignment
    kept = None
    if stored.config.model.experts == "clustered":
        new_ids = align_clusters(trained.coactivation)
        kept = kept_share(trained.coactivation, new_ids)
        tensors, assignment = relabel_clusters(tensors, assignment, new_ids)
    written = lambda done, total: progress("quantize and write", done, total)  # noqa: E731
    with stage_artifact(
        target, config=stored.config.to_dict(), tensors=tensors, assignment=assignment, version=stored.version,
        tokenizer=stored.tokenizer, chat_template=stored.chat_template, progress=written,
    ) as staged:  # fmt: skip
        del tensors, model
        artifact = Artifact.open(staged.folder)
        results = {"full": trained.whole} | _judge_artifact(artifact, texts, corpus.end_of_text, progress)
        metrics = {
            "run": name,
            "step": stored.step,
            "expert_kind": stored.config.model.expert_kind,
            "perplexity": {form: _finite(found.token_perplexity) for form, found in results.items()},
            "bits_per_byte": {form: _finite(found.bits_per_byte) for form, found in results.items()},
            "perplexity_tokens": trained.whole.tokens,
            "sizes": sizes(stored.config.model),
            "coactivation_kept": kept,
        }
        staged.publish(metrics)
    return Export(target, stored, skipped, metrics)


def _judge(
    model: Transformer, texts: Mapping[str, Text], end_of_text: int, stage: str, progress: Progress
) -> Judgement:
    """Evaluate a model, reporting the number of scored tokens."""
    total, done = sum(len(text.tokens) for text in texts.values()), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(stage, done, total)

    progress(stage, 0, total)
    return judge(model, texts, end_of_text=end_of_text, progress=advance)


def _judge_artifact(
    artifact: Artifact, texts: Mapping[str, Text], end_of_text: int, progress: Progress
) -> dict[str, Perplexity]:
    """Evaluate an artifact as stored and, if its experts are added to bases, with zeros in place of the experts."""
    forms: dict[Residuals, str] = {"int4": "evaluate the artifact"}
    if {"bases", "experts"} <= {place.part for place in artifact.places}:
        forms["zero"] = f"evaluate without {EXPERTS[artifact.model.expert_kind]}"
    results: dict[str, Perplexity] = {}
    for residuals, stage in forms.items():
        model = Transformer(artifact.model, artifact.assignment)
        model.load_logical(artifact.tensors(residuals))
        results[residuals] = _judge(model.eval(), texts, end_of_text, stage, progress).whole
    return results


def _shortened(corpus: Corpus, tokens: int) -> dict[str, Text]:
    """Return the beginning of each domain's validation text, in proportion, with about `tokens` tokens in total."""
    texts = corpus.validation_text()
    share = min(1.0, tokens / max(1, sum(len(text.tokens) for text in texts.values())))
    if share == 1:
        return texts
    return {
        domain: cut
        for domain, text in texts.items()
        if (cut := _cut(corpus, text, max(2, int(share * len(text.tokens)))))
    } or texts


def _cut(corpus: Corpus, text: Text, size: int) -> Text | None:
    """Return the first `size` tokens of a text; None if none of them counts."""
    tokens, counted = text.tokens[:size], None if text.counted is None else text.counted[:size]
    scored = tokens if counted is None else tokens[counted.astype(bool)]
    return Text(tokens, len(corpus.tokenizer.decode(scored.tolist()).encode()), counted) if len(scored) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# The table

SIZE_ROWS = {
    "flat_float16": "flat, FP16",
    "flat_int4": "flat, INT4 experts",
    "clustered_float16": "clustered, FP16",
    "clustered_int4": "clustered, FP16 + INT4",
}
EXPERTS = {"residual": "residuals", "private": "private experts"}
"""Name of the tensors in INT4, by `model.expert_kind`."""
QUALITY_ROWS = {
    "full": "as trained (float32)",
    "int4": "this artifact (INT4 {experts})",
    "zero": "{experts} set to zero",
}


def table(metrics: dict[str, Any]) -> str:
    """Return the sizes and the quality of an export as text for a terminal."""
    return "\n".join([*_size_lines(metrics["sizes"]), "", *_quality_lines(metrics)])


def _size_lines(rows: Mapping[str, Mapping[str, int]]) -> Sequence[str]:
    flat = rows["flat_float16"]
    lines = [
        f"{'size of this model':32}{'parameters':>14}{'total MB':>12}{'vs flat':>9}{'experts MB':>12}{'vs flat':>9}"
    ]
    for form, row in rows.items():
        share, expert_share = row["bytes"] / flat["bytes"], row["expert_bytes"] / flat["expert_bytes"]
        lines.append(
            f"{SIZE_ROWS[form]:32}{row['parameters']:>14,}{row['bytes'] / 1e6:>12,.2f}{share:>9.1%}"
            f"{row['expert_bytes'] / 1e6:>12,.2f}{expert_share:>9.1%}"
        )
    return lines


def _quality_lines(metrics: Mapping[str, Any]) -> Sequence[str]:
    tokens = f"quality on {metrics['perplexity_tokens']:,} validation tokens"
    lines = [f"{tokens:46}{'perplexity':>12}{'change':>9}{'bits per byte':>15}"]
    perplexity: dict[str, float | None] = metrics["perplexity"]
    bits: dict[str, float | None] = metrics.get("bits_per_byte", {})
    full = perplexity["full"] or math.nan
    experts = EXPERTS[metrics.get("expert_kind", "residual")]
    for form, value in perplexity.items():
        value = value or math.nan
        lines.append(
            f"{QUALITY_ROWS[form].format(experts=experts):46}{value:>12.3f}{value / full - 1:>+9.2%}{bits.get(form) or math.nan:>15.4f}"
        )
    if metrics["coactivation_kept"] is not None:
        lines.append(
            f"\n{metrics['coactivation_kept']:.0%} of layer transitions keep a token's cluster id (after alignment)."
        )
    lines.append(
        "Lower perplexity and fewer bits per byte are better. 'vs flat' compares with a flat FP16 model of the same experts."
    )
    return lines
