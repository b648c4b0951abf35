"""Measure speeds and sizes. Each name regenerates one group of figures; --json writes them to a file.

    python jobs/benchmark.py layer     one MoE layer, forward + backward: paper's form, private, flat, dense, torch's grouped_mm
    python jobs/benchmark.py step      a training step on 1 and 2 workers: paper's form, private, flat, others; all-to-all bytes
    python jobs/benchmark.py memory    parameters and bytes at rest of the paper's form; all-to-all payload per token
    python jobs/benchmark.py stored --runs RUN_ROOT/experiments/NAME
                                       perplexity over bytes at rest of an experiment's runs, in FP16, INT4 and INT3
    python jobs/benchmark.py remap     a forced plan on 2 workers: pause, bytes moved, validation loss against a branch without it
    python jobs/benchmark.py regroup   regrouping on 2 workers: its share of the training time, and its gain when the
                                       domains of the training text change half-way: live plans of each similarity,
                                       static clusters and random exchanges (--set model.expert_kind=private)
    python jobs/benchmark.py serve --artifact NAME
                                       tokens/s and latency of the engine alone (--with-peers installs transformers in a
                                       temporary folder and alternates with its `generate`), round trips between
                                       replicas, and the artifact over HTTP with all, half and none of it resident

`remap` and `regroup` take tens of minutes on 2 cores. --data, --seeds, --steps and --part make them smaller.

A speed is a ratio within one run: the sides alternate (A B A B ...) after warm-up, with the same threads
and types. The figures are medians with minimum and maximum. A benchmark is not a test.

The models do not follow the defaults of the presets: `paper`, and all of memory, remap, regroup and serve's part
engine, have bases and residuals in 4 clusters (--set changes that for part shift). `flat` has the experts of that form.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from raymoe.config import default_root
from raymoe.storage.checkpoint import CorruptCheckpoint


def served(arguments: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    """Measure serving: the engine alone, transports between replicas, and a deployed artifact over HTTP."""
    result: dict[str, Any] = {}
    rounds = arguments.rounds
    if "engine" in parts:
        from benchmarks.engine import engine

        result["engine"] = engine(arguments.preset or "small", arguments.data, rounds, arguments.with_peers)
    if "scaling" in parts:
        from benchmarks.scaling import scaling

        result["scaling"] = scaling(arguments.artifact, arguments.root, arguments.data, arguments.domain)
    if {"planes", "http"} & set(parts):
        from benchmarks import deployed  # imports Ray

        if "planes" in parts:
            result["planes"] = deployed.planes(rounds)
        if "http" in parts:
            where = arguments.artifact, arguments.root
            result["http"] = deployed.http(*where, arguments.data, arguments.domain, rounds)
            result["memory"] = deployed.memory(*where, result["http"].pop("memory"))
    return result


def regrouping(arguments: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    """Measure regrouping: its share of the training time, and its effect when the domains of the text change."""
    result: dict[str, Any] = {}
    if "shift" in parts:
        from benchmarks.domain_shift import shift, side_configs  # imports Ray

        try:
            configs = side_configs(arguments.set, arguments.steps or 1000)
        except ValueError as error:
            parser().error(str(error))
        result["shift"] = shift(arguments.data, arguments.seeds, configs)
    if "overhead" in parts:
        from benchmarks.overhead import overhead  # imports Ray

        result["overhead"] = overhead(arguments.preset or "small", arguments.data, arguments.periods)
    return result


PARTS = {"regroup": ["overhead", "shift"], "serve": ["engine", "planes", "scaling", "http"]}


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("name", choices=["layer", "step", "memory", "stored", "remap", "regroup", "serve"])
    parse.add_argument("--runs", type=Path, metavar="FOLDER", help="stored: the folder of an experiment's runs")
    parse.add_argument("--preset", choices=["tiny", "small", "paper"], help="default: paper for memory, else small")
    parse.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    parse.add_argument(
        "--data",
        default="builtin",
        metavar="PATH",
        help="remap, regroup: training text; serve: text of the tokenizer and the prompts (default: %(default)s)",
    )
    parse.add_argument("--seeds", type=int, default=3, help="remap, regroup: seeds (default: %(default)s)")
    parse.add_argument(
        "--steps",
        type=int,
        help="remap: steps before the plan (default: 300); regroup: steps of a run whose domains change (default: 1000)",
    )
    parse.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="regroup, part shift: a change to the config of all runs, for example model.expert_kind=private (repeatable)",
    )
    parse.add_argument(
        "--periods",
        type=int,
        default=2,
        help="regroup: periods over which the overhead is measured (default: %(default)s)",
    )
    parse.add_argument(
        "--part", choices=sorted({part for parts in PARTS.values() for part in parts}),
        help="regroup: overhead or shift; serve: engine, planes, scaling or http (default: all of the name's)",
    )  # fmt: skip
    parse.add_argument(
        "--artifact", metavar="NAME", help="serve, parts scaling and http: the export of a run, or an artifact's folder"
    )
    parse.add_argument("--root", default=default_root(), help="root folder of exports (default: %(default)s)")
    parse.add_argument(
        "--domain", help="serve, parts scaling and http: domain of --data from which 80 %% of the prompts are drawn"
    )
    parse.add_argument("--with-peers", action="store_true", help="serve: measure transformers, too")
    parse.add_argument("--json", type=Path, help="write the result to this file")
    return parse


def main() -> int:
    parse = parser()
    arguments = parse.parse_args()
    if arguments.part and arguments.part not in PARTS.get(arguments.name, []):
        parse.error(f"--part {arguments.part} is not a part of {arguments.name}")
    if arguments.set and (arguments.name != "regroup" or arguments.part == "overhead"):
        parse.error("--set has an effect on regroup, part shift, alone: leave it out")
    if arguments.name == "layer":
        from benchmarks.layer import layer

        result = layer(arguments.rounds)
    elif arguments.name == "step":
        from benchmarks.step import step

        result = step(arguments.rounds, arguments.preset or "small")
    elif arguments.name == "remap":
        from benchmarks.remap import remap  # imports Ray

        result = remap(arguments.preset or "small", arguments.data, arguments.seeds, arguments.steps or 300)
    elif arguments.name == "regroup":
        parts = [arguments.part] if arguments.part else PARTS["regroup"]
        result = regrouping(arguments, parts)
    elif arguments.name == "serve":
        parts = [arguments.part] if arguments.part else PARTS["serve"]
        if {"http", "scaling"} & set(parts) and not arguments.artifact:
            parse.error("serve, parts scaling and http need --artifact NAME: the export of a run")
        result = served(arguments, parts)
    elif arguments.name == "stored":
        from benchmarks.stored import stored

        if not arguments.runs:
            parse.error("stored needs --runs FOLDER: the folder of an experiment's runs")
        try:
            result = stored(arguments.runs)
        except (FileNotFoundError, CorruptCheckpoint, ValueError) as error:
            parse.error(str(error))
    else:
        from benchmarks.memory import memory

        result = memory(arguments.preset or "paper")
    about = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"name": arguments.name, "about": about, "result": result}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
