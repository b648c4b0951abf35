"""Facts of a run at its start: config.json, and the lines that the driver prints."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

import raymoe
from raymoe.config import Config, ModelSection, repeatable_yaml
from raymoe.config.mixture import parse_mixture
from raymoe.data.corpus import Corpus
from raymoe.model.transformer import Transformer
from raymoe.storage.files import read_json, replace_file
from raymoe.storage.run_folder import RunFolder


@dataclass(frozen=True)
class SavedCorpus:
    """The corpus that a run was trained on."""

    folder: str
    fingerprint: str
    corpus: Corpus | None
    """None if the folder is gone or damaged."""


def save_config(config: Config, run: Path, corpus: Corpus, init: dict[str, Any] | None = None) -> None:
    """Write config.json (config, corpus and its fingerprint, versions, machine, command line) and config.yaml.

    init: origin of the initial weights. A resumed run keeps the one that config.json has.
    """
    path = RunFolder(run).config
    init = init or (read_json(path).get("init") if path.is_file() else None)
    about = {
        "config": config.to_dict(),
        "corpus": str(corpus.folder),
        "corpus_fingerprint": corpus.fingerprint,
        "versions": versions(),
        "parameters": parameters(config.model),
        "validation_bytes_per_token": bytes_per_token(corpus, "validation"),
        "machine": machine(),
        "command": sys.argv,
        "commit": commit(),
        **({"init": init} if init else {}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    replace_file(RunFolder(run).config, json.dumps(about, indent=1))
    replace_file(RunFolder(run).config_yaml, repeatable_yaml(config))


def saved_corpus(run: Path) -> SavedCorpus | None:
    """Return the corpus that config.json names; None if it names none."""
    about = read_json(RunFolder(run).config)
    folder = about.get("corpus")
    if not isinstance(folder, str) or not folder:
        return None
    fingerprint = str(about.get("corpus_fingerprint") or Path(folder).name)
    try:
        corpus = Corpus.open(folder)
    except ValueError:
        corpus = None
    return SavedCorpus(folder, fingerprint, corpus if corpus and corpus.fingerprint == fingerprint else None)


def overview(config: Config, run: Path, corpus: Corpus, gpus: bool) -> str:
    """Return the lines that describe a run before its first step."""
    train, model = config.train, config.model
    workers = f"{train.workers} to {train.max_workers}" if train.elastic else f"{train.workers}"
    splits = {split: sum(part["tokens"] for part in corpus.about["splits"][split].values()) for split in corpus.about["splits"]}  # fmt: skip
    tokens = train.steps * train.global_batch * model.context
    experts = {
        "clustered": f"{model.n_experts} experts in {model.n_clusters} clusters per layer",
        "flat": f"{model.n_experts} flat experts per layer",
        "dense": "dense",
    }[model.experts]
    lines = {
        "run": str(run),
        "workers": f"{workers}, each on a {'GPU with NCCL' if gpus else 'CPU with gloo'}, {train.precision}",
        "corpus": f"{config.data.path}: {splits['train']:,} training and {splits['validation']:,} validation tokens, "
        f"{len(corpus.domains)} domain{'s' * (len(corpus.domains) > 1)} ({corpus.folder})",
        "model": f"{parameters(model):,} parameters, {model.layers} layers, {experts}",
        "steps": f"{train.steps:,} of {train.global_batch * model.context:,} tokens, {tokens:,} in all",
    }
    if corpus.masked:
        counted = sum(part["counted"] for part in corpus.about["splits"]["train"].values())
        lines["targets"] = (
            f"{counted:,} training tokens of answers ({counted / splits['train']:.0%}); the rest is context"
        )
    if weights := parse_mixture(config.train.mixture):
        total = sum(weights.values())
        lines["mixture"] = ", ".join(f"{domain} {weight / total:.1%}" for domain, weight in weights.items())
    if config.train.init:
        lines["weights"] = f"of {config.train.init} (train.init), with its tokenizer"
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items()) + "\nstarting the workers, about 15 s"


def parameters(model: ModelSection) -> int:
    """Return the number of parameters, without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(model).parameters())


def active_parameters(model: ModelSection) -> int:
    """Return the number of parameters that process one token: the mean over clusters and experts.

    A training step takes about 6 floating-point operations per token for each of them, without attention scores.
    """
    share_of = {"clusters": 1.0, "experts": model.experts_per_token / model.n_experts, "router": 1.0}
    if model.experts == "clustered":
        share_of["clusters"] = share_of["router"] = model.clusters_per_token / model.n_clusters
        share_of["experts"] *= model.clusters_per_token
    with torch.device("meta"):
        transformer = Transformer(model)
    parameters, total = {name for name, _ in transformer.named_parameters()}, 0.0
    views = transformer.logical()
    for key, name, _, _ in transformer.slices():
        if name not in parameters:
            continue  # a selection bias
        parts = key.split(".")
        kind = next((part for part in ("clusters", "experts") if part in parts), "")
        if kind == "experts" and parts[-1] == "router":
            kind = "router"  # all members of a chosen cluster are scored
        total += views[key].numel() * (share_of[kind] if kind else 1.0)
    return round(total)


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {
        "raymoe": raymoe.__version__,
        "ray": ray.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def bytes_per_token(corpus: Corpus, split: str) -> float:
    """Return the mean size of a token of a split that counts in UTF-8 bytes; 0 if unknown."""
    parts = corpus.about["splits"][split].values()
    tokens = sum(part.get("counted", part["tokens"]) for part in parts)
    return sum(part.get("bytes", 0) for part in parts) / tokens if tokens else 0.0


def processor() -> str:
    """Return the model name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor()


def machine() -> dict[str, str | int]:
    """Return the driver's machine: its name, platform, processor, device, cores and memory in bytes."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cores": psutil.cpu_count() or 0,
        "memory": psutil.virtual_memory().total,
    }


def commit() -> str:
    """Return the git commit of the code, with `+` for uncommitted changes; empty outside of a checkout."""
    folder = Path(raymoe.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return ""
    try:
        call = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
