"""Folders of runs with records as training writes them, without training."""

from __future__ import annotations

import json
from pathlib import Path

from raymoe.config import Config


def record_run(
    config: Config, *, perplexity: float = 50.0, step: int | None = None, folder: Path | None = None
) -> Path:
    """Write the folder of a run that has reached `step` (default: the last one); return it.

    The perplexity at quarter q is `perplexity` * (5 - q).
    """
    run = folder or Path(config.run.root) / config.run.name
    run.mkdir(parents=True)
    steps = config.train.steps
    step = steps if step is None else step
    about = {
        "config": config.to_dict(), "commit": "0123456789abcdef", "corpus_fingerprint": "c0ffee",
        "validation_bytes_per_token": 4.0, "machine": {"processor": "test", "cores": 2},
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(about))
    records = []
    for at in range(1, step + 1):
        load = {"experts": 0.5, "clusters": 0.25}
        records.append({
            "kind": "train", "step": at, "loss": 3.0, "step_ms": 500.0, "tokens_per_s": 1000.0 + at, "rss_mb": [100.0],
            "skipped_steps": 0,
        })  # fmt: skip
        if at % (steps // 4) == 0:
            whole, value = at == steps, perplexity * (5 - 4 * at / steps)
            records.append({"kind": "validation", "step": at, "loss": 2.0, "perplexity": value, "whole": whole, "load_cv": load})  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if step == steps:
        (run / "outcome.json").write_text(json.dumps({"step": step, "stopped": False, "peak_rss_mb": 250.0}))
    return run
