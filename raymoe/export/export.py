"""A run becomes an artifact: what the compression saves and costs is measured and goes with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from raymoe.data.corpus import Corpus, Text
from raymoe.export.judge import judge
from raymoe.export.open import StoredModel, open_run
from raymoe.model.transformer import Transformer
from raymoe.storage.artifact import align_clusters, as_exported, sizes, write_artifact
from raymoe.storage.run_folder import artifact_folder


@dataclass(frozen=True)
class Export:
    target: Path
    source: StoredModel
    skipped: list[str]
    """Checkpoints that were not valid, with reasons."""
    metrics: dict[str, Any]


def export(
    root: str, name: str, *, step: int | None = None, target: Path | None = None, tokens: int = 200_000
) -> Export:
    """Write the artifact of a run's newest valid checkpoint (or that of `step`).

    tokens: how much of the validation set the perplexities are measured on. Raises FileNotFoundError,
    FileExistsError, CorruptCheckpoint, ValueError or OSError; then nothing is left behind.
    """
    stored, skipped = open_run(root, name, step)
    target = target or artifact_folder(root, name)
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or name another folder with --to")
    assert stored.corpus is not None  # a run has one
    corpus = Corpus.open(stored.corpus)
    texts = _shortened(corpus.validation_text(), tokens)
    model = stored.model()
    clustered = stored.config.model.experts == "clustered"
    full = judge(model, texts, end_of_text=corpus.end_of_text)
    tensors = {key: view.clone() for key, view in model.logical().items()}
    relabel = align_clusters(full.coactivation) if clustered else None
    perplexity = {"full": full.whole.token_perplexity}
    for residuals in ("int4", "zero") if clustered and stored.config.model.residual_width else ("int4",):
        whole = Transformer(stored.config.model, stored.assignment)
        whole.load_logical(as_exported(stored.config, tensors, stored.assignment, residuals))
        perplexity[residuals] = judge(whole, texts, end_of_text=corpus.end_of_text).whole.token_perplexity
    metrics = {
        "run": name,
        "step": stored.step,
        "perplexity": {form: value if math.isfinite(value) else None for form, value in perplexity.items()},
        "perplexity_tokens": full.whole.tokens,
        "sizes": sizes(stored.config.model),
        "coactivation_kept": _kept(full.coactivation, relabel) if relabel else None,
    }
    write_artifact(
        target, config=stored.config.to_dict(), tensors=tensors, assignment=stored.assignment, version=stored.version,
        tokenizer=stored.tokenizer, metrics=metrics, relabel=relabel,
    )  # fmt: skip
    return Export(target, stored, skipped, metrics)


def _shortened(texts: dict[str, Text], tokens: int) -> dict[str, Text]:
    """The beginning of each domain, in proportion, `tokens` in all. How many words that is is not known: 0."""
    share = min(1.0, tokens / max(1, sum(len(t.tokens) for t in texts.values())))
    return {
        d: Text(t.tokens[: max(2, int(share * len(t.tokens)))], t.words if share == 1 else 0) for d, t in texts.items()
    }


def _kept(coactivation: Any, relabel: list[list[int]]) -> float:
    """Share of steps from one layer to the next on which a token's cluster keeps its number."""
    kept = sum(
        counts[a, b]
        for counts, (here, following) in zip(coactivation, pairwise(relabel), strict=True)
        for a in range(len(here))
        for b in range(len(here))
        if here[a] == following[b]
    )
    return float(kept / coactivation.sum()) if coactivation.sum() else 1.0


def table(metrics: dict[str, Any]) -> str:
    """What an export saves and costs, for a terminal."""
    flat = metrics["sizes"]["flat_float16"]
    lines = [f"{'':24}{'parameters':>14}{'bytes':>16}{'of flat':>9}{'expert bytes':>16}{'of flat':>9}"]
    for form, row in metrics["sizes"].items():
        of, of_experts = row["bytes"] / flat["bytes"], row["expert_bytes"] / flat["expert_bytes"]
        name = form.replace("_float16", " float16").replace("_int4", " FP16+INT4")
        lines.append(
            f"{name:24}{row['parameters']:>14,}{row['bytes']:>16,}{of:>9.1%}{row['expert_bytes']:>16,}{of_experts:>9.1%}"
        )
    lines.append(f"\nperplexity per token ({metrics['perplexity_tokens']:,} validation tokens)")
    names = {"full": "as trained, float32", "int4": "as exported, INT4", "zero": "residuals zeroed"}
    perplexity: dict[str, float | None] = metrics["perplexity"]
    full = perplexity["full"] or math.nan
    for form, value in perplexity.items():
        value = value or math.nan
        lines.append(f"{names[form]:24}{value:>14.3f}{value / full - 1:>+16.2%}")
    if metrics["coactivation_kept"] is not None:
        lines.append(
            f"\na token keeps its cluster's number from layer to layer {metrics['coactivation_kept']:.0%} of the time"
        )
    return "\n".join(lines)
