"""The whole path on this machine: a Ray head, four trainings by real job submission, export, evaluation, two tables.

    python jobs/demo.py [--root FOLDER] [--steps N]

Trains `tiny` on the built-in corpus with 2 workers, the same tokens in the same order for each: clustered
experts, flat experts, the clusters' bases alone (residual_width=0), and a flat model of as many parameters
(E=C, K=1). The clustered run regroups its experts as it trains: one plan is forced, so that there always is one;
what became of each is shown. Needs no download and no account. The head uses free ports and a folder of its own, and is ended
at the end. Exit status: 0 done, 1 if a job failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from raymoe.config import default_root, preset
from raymoe.storage.export import sizes
from raymoe.storage.runs import artifact_folder, open_artifact, open_run, run_folder
from raymoe.training.head import Head, head
from raymoe.training.regroup_plots import decisions
from raymoe.training.report import read_records

HOUSE = Path(__file__).resolve().parent.parent
CLUSTERS = preset("tiny").model.n_clusters

VARIANTS = {
    "clustered": [f"regroup.force={preset('tiny').regroup.burn_in}"],
    "flat": ["model.experts=flat"],
    "bases-alone": ["model.residual_width=0"],
    "flat-same-size": ["model.experts=flat", f"model.n_experts={CLUSTERS}", "model.experts_per_token=1"],
}
LABELS = {
    "clustered": "clustered",
    "flat": "flat",
    "bases-alone": "bases alone (width 0)",
    "flat-same-size": "flat, same size (E=C, K=1)",
}


def job(ray: Head, title: str, *command: str) -> None:
    """Submit a job and follow its log. Raises CalledProcessError if it fails."""
    started = time.monotonic()
    print(f"\n== {title}: ray job submit -- {' '.join(command)}", flush=True)
    subprocess.run(ray.submit(*command, working_dir=HOUSE), env=ray.environment, check=True)
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def row(root: str, name: str, variant: str) -> dict[str, Any]:
    """What a finished run says of itself."""
    records = [json.loads(line) for line in (run_folder(root, name) / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    last = [r for r in records if r["kind"] == "validation"][-1]
    stored, _ = open_run(root, name)
    model = stored.config.model
    table = sizes(model)
    kind = "clustered_float16" if model.experts == "clustered" else "flat_float16"
    half = len(train) // 2  # the second half: warmed up
    return {
        "label": LABELS[variant],
        "parameters": table[kind]["parameters"],
        "bytes": table[kind]["bytes"],
        "perplexity": last["perplexity"],
        "tokens_per_s": sorted(r["tokens_per_s"] for r in train[half:])[len(train[half:]) // 2],
        "a2a_bytes_per_token": sum(r["a2a_bytes_per_token"] for r in train) / len(train),
        "load_cv": last["load_cv"],
        "load_max_vio": last["load_max_vio"],
        "memory_mb": max(max(r["rss_mb"]) for r in train),
    }


def show(rows: list[dict[str, Any]]) -> str:
    number = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    head_line = (
        f"{'':28}{'parameters':>12}{'bytes':>12}{'perplexity':>12}{'tokens/s':>10}{'a2a B/token':>12}"
        f"{'CV exp/clu':>13}{'MaxVio exp/clu':>16}{'peak MB':>9}"
    )
    lines = [head_line, "-" * len(head_line)]
    for r in rows:
        cv, vio = r.get("load_cv"), r.get("load_max_vio")
        speed = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else "-"
        sent = f"{r['a2a_bytes_per_token']:,.0f}" if "a2a_bytes_per_token" in r else "-"
        pair = lambda d: f"{number(d['experts'])}/{number(d['clusters'])}" if d else "-"  # noqa: E731
        lines.append(
            f"{r['label']:28}{r['parameters']:>12,}{r['bytes']:>12,}{r['perplexity']:>12.2f}{speed:>10}{sent:>12}"
            f"{pair(cv):>13}{pair(vio):>16}{r['memory_mb']:>9,.0f}"
        )
    return "\n".join(lines)


def regrouping(root: str, name: str) -> str:
    """What became of each plan of a run."""
    head_line = (
        f"{'step':>5}{'outcome':>10}{'moves':>7}{'KB':>8}{'pause ms':>10}{'gain expected':>15}{'gain seen':>11}"
        f"{'probe before':>14}{'after':>9}{'overlap over':>14}  reason"
    )
    lines = [head_line, "-" * len(head_line)]
    for d in decisions(read_records(run_folder(root, name) / "plans.jsonl")):
        number = lambda value, form: "-" if math.isnan(value) else format(value, form)  # noqa: E731
        lines.append(
            f"{d.step:>5}{d.outcome:>10}{number(d.moves, '.0f'):>7}{number(d.bytes / 1000, ',.0f'):>8}"
            f"{number(d.pause_ms, '.0f'):>10}{number(d.gain_expected, '.4f'):>15}{number(d.gain_seen, '.4f'):>11}"
            f"{number(d.probe_before, '.5f'):>14}{number(d.probe_after, '.5f'):>9}{number(d.probe_settled, '.5f'):>14}"
            f"  {d.reason}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--root", default=default_root(), help="where runs and exports go (default: %(default)s)")
    parse.add_argument(
        "--steps", type=int, default=preset("tiny").train.steps, help="of each training (default: %(default)s)"
    )
    return parse


def main() -> int:
    arguments = parser().parse_args()
    root = str(Path(arguments.root).expanduser().resolve())
    stamp = time.strftime("demo-%Y%m%d-%H%M%S")
    names = {variant: f"{stamp}-{variant}" for variant in VARIANTS}
    started = time.monotonic()
    evaluation = Path(root) / f"{stamp}.json"
    try:
        with head(max(2, os.cpu_count() or 1)) as ray:
            print(f"a Ray head runs; its dashboard: {ray.dashboard}", flush=True)
            common = [f"run.root={root}", f"train.steps={arguments.steps}"]
            for variant, changes in VARIANTS.items():
                command = ["python", "jobs/train.py", "tiny", f"run.name={names[variant]}", *common, *changes]
                job(ray, f"train {LABELS[variant]}", *command)
            job(ray, "export", "python", "jobs/export.py", names["clustered"], "--root", root, "--tokens", "50000")
            artifact = artifact_folder(root, names["clustered"])
            job(
                ray,
                "evaluate the export",
                "python",
                "jobs/evaluate.py",
                str(artifact),
                "--json",
                str(evaluation),
                "--quiet",
            )
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    rows = [row(root, names[variant], variant) for variant in VARIANTS]
    judged = json.loads(evaluation.read_text())
    model = open_artifact(artifact).config.model
    exported = {
        "label": "clustered, exported INT4",
        "parameters": rows[0]["parameters"],
        "bytes": sizes(model)["clustered_int4"]["bytes"],
        "perplexity": judged["token_perplexity"],
        "load_cv": {level: (judged["load"][level] or {}).get("cv") for level in ("experts", "clusters")},
        "load_max_vio": {level: (judged["load"][level] or {}).get("max_vio") for level in ("experts", "clusters")},
        "memory_mb": judged["peak_memory_mb"],
    }
    tokens = arguments.steps * preset("tiny").train.global_batch * preset("tiny").model.context
    print(f"\n{tokens / 1e6:.1f} million training tokens each; perplexity per token on the whole validation set; "
          "bytes at rest: float16, the export FP16 + INT4; a2a: sent between workers, forward and backward\n")  # fmt: skip
    print(show([rows[0], exported, *rows[1:]]))
    print("\nregrouping of the clustered run: plans made, applied or refused; probe: loss on a few held-out windows\n")
    print(regrouping(root, names["clustered"]))
    print(f"\nreport   {run_folder(root, names['clustered']) / 'report.html'}")
    print(f"artifact {artifact}")
    print(f"took {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
