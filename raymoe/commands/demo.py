"""The whole path on this machine: a Ray head, four trainings by real job submission, export, evaluation, serving.

    raymoe demo [--root FOLDER] [--steps N]

Trains `tiny` on the built-in corpus with 2 workers, the same tokens in the same order for each: clustered
experts, flat experts, the clusters' bases alone (residual_width=0), and a flat model of as many parameters
(E=C, K=1). The clustered run regroups its experts as it trains: one plan is forced, so that there always is one;
what became of each is shown. Its export is then served: asked over HTTP, and driven for half a minute with a load
of which most comes from one domain, while each cluster's replicas follow their own. Needs no download and no account. The head uses free ports and a folder of its own, and is ended
at the end. Exit status: 0 done, 1 if a job failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raymoe.commands.entry import new_parser
from raymoe.commands.load import load, pieces, summary
from raymoe.config import default_root, preset
from raymoe.export.open import open_artifact, open_run
from raymoe.ops.ray_head import Head, free_ports, head
from raymoe.report.regroup_plots import decisions
from raymoe.serving.rollout import Rollout, pinned
from raymoe.storage.artifact_layout import sizes
from raymoe.storage.run_folder import artifact_folder, read_records, run_folder
from raymoe.training.run_report import write_report

REPO_ROOT = Path(__file__).resolve().parents[2]
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
    subprocess.run(ray.submit(*command, working_dir=REPO_ROOT), env=ray.environment, check=True)
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
            f"{number(d.pause_ms, '.0f'):>10}{number(d.expected_gain, '.4f'):>15}{number(d.measured_gain, '.4f'):>11}"
            f"{number(d.probe_before, '.5f'):>14}{number(d.probe_after, '.5f'):>9}{number(d.probe_after_overlap, '.5f'):>14}"
            f"  {d.reason}"
        )
    return "\n".join(lines)


LOAD_S = 30.0
DOMAIN = "licences"
SCALING = {"target": 0.04, "up_cooldown_s": 4.0, "down_cooldown_s": 16.0}
"""A replica counts as busy from 4 % of its time: the load of one machine should be enough to see them scale. None is
given up before it could start, which takes 10 s."""


def ask(base: str, model: str, prompt: str) -> str:
    """A completion as it streams in, over HTTP."""
    body = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0.8, "seed": 1, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
    text = ""
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


def served(ray: Head, root: str, artifact: Path, run: Path) -> dict[str, Any]:
    """Serve the artifact with nothing resident, ask it, drive a skewed load, and record its replicas in the run."""
    config = yaml.safe_load((REPO_ROOT / "services" / "raymoe.yaml").read_text())
    (config["http_options"]["port"],) = free_ports(1)
    (application,) = config["applications"]
    application["args"] |= {"resident_bytes": 0, "min_replicas": 1, "max_replicas": 2}
    application["autoscaling_policy"]["policy_kwargs"] |= SCALING
    rollout = Rollout(ray.dashboard, pinned(config, str(artifact), root))
    started = time.monotonic()
    rollout.up()
    rollout.wait(lambda: rollout.running() == rollout.targets(), "to have all of its replicas")
    model, ready_s = rollout.application["args"]["name"], time.monotonic() - started
    print(f"   serving at {rollout.base}/v1 after {ready_s:.0f} s", flush=True)
    prompt = "This licence applies to"
    print(f"   {prompt}{ask(rollout.base, model, prompt)!r}", flush=True)
    prompts = pieces("builtin", domain=DOMAIN, share=0.8, words=16, count=400, seed=0)
    over, began = threading.Event(), time.monotonic()

    def watch() -> None:
        with (run / "serving.jsonl").open("w") as file:
            while not over.wait(0.5):
                seconds = time.monotonic() - began
                try:
                    both = {"targets": rollout.targets(), "running": rollout.running()}
                except (OSError, RuntimeError):  # a busy dashboard: the next look will do
                    continue
                seen = {name: {c: n for c, n in of.items() if c.startswith("cluster-")} for name, of in both.items()}
                file.write(
                    json.dumps({"kind": "replicas", "step": round(1000 * seconds), "seconds": seconds, **seen}) + "\n"
                )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    body = {"model": model, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    draw = random.Random(0)
    answers = asyncio.run(
        load(rollout.base, prompts, streams=16, seconds=LOAD_S, body=body, pick=lambda n: draw.randrange(len(prompts)))
    )
    low = lambda: all(n == 1 for name, n in rollout.targets().items() if name.startswith("cluster-"))  # noqa: E731
    rollout.wait(low, "to have its replicas fall again")
    time.sleep(1)  # so that the records have it too
    over.set()
    watcher.join()
    rollout.down()
    return summary(answers) | {"ready_s": ready_s}


def replicas(run: Path) -> str:
    """Replicas of each cluster over the load: the target, and those that ran."""
    records = read_records(run / "serving.jsonl")
    names = sorted(records[0]["targets"]) if records else []
    lines = [f"{'seconds':>8}" + "".join(f"{name:>12}" for name in names)]
    shown = None
    for record in records:
        row = [f"{record['targets'][name]} ({record['running'].get(name, 0)})" for name in names]
        if row != shown:
            lines.append(f"{record['seconds']:>8.1f}" + "".join(f"{cell:>12}" for cell in row))
            shown = row
    return "\n".join(lines)


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("--root", default=default_root(), help="where runs and exports go (default: %(default)s)")
    parse.add_argument(
        "--steps", type=int, default=preset("tiny").train.steps, help="of each training (default: %(default)s)"
    )
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
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
            print(
                "\n== serve the export: Ray Serve, an OpenAI-compatible API, each cluster scaling by its own load",
                flush=True,
            )
            felt = served(ray, root, artifact, run_folder(root, names["clustered"]))
    except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
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
    print(f"\nserving, 16 streams for {LOAD_S:.0f} s, 80 % from one domain: {felt['requests']} requests, {felt['failed']} failed; "
          f"{felt['output_throughput']:.0f} tokens/s, first token after {felt['p50_ttft_s']:.2f} s (p99 {felt['p99_ttft_s']:.2f} s)")  # fmt: skip
    print("replicas of each cluster: the target, and in brackets those that ran\n")
    print(replicas(run_folder(root, names["clustered"])))
    write_report(run_folder(root, names["clustered"]))
    print(f"\nreport   {run_folder(root, names['clustered']) / 'report.html'}")
    print(f"artifact {artifact}")
    print(f"took {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
