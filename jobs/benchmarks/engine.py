"""Speed of the engine: part `engine` of `jobs/benchmark.py serve`.

The engine runs in this process. The peers are transformers' `generate` on two Mixtrals, each in another process
connected by pipes. All sides alternate, and only one computes at a time. `flat` has the shapes of the flat baseline.
`bases` has an expert per cluster, one per token: the clustered model's arithmetic without its residuals. So the ratio of
the peers is the effect of the model, and the ratio to `bases` that of the engine (a lower bound: ours has residuals too).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

PEER = "transformers==5.24.0"
PROMPT, NEW = 64, 64
"""Tokens of a prompt, and of a completion."""
STREAMS = (1, 8, 32)
TOGETHER = 16
"""Streams of the comparison: the static batch of the peer."""
TRIAL = 8
"""Tokens of a completion in the trial of the peer's expert products. The slowest takes a minute for whole completions."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Prompts = list[list[int]]
Run = dict[str, float]


def report(line: str) -> None:
    print(line, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# The engine


def make_artifact(name: str, data: str, folder: Path) -> tuple[Any, Any, Prompts]:
    """Return an artifact of the paper's form with random weights, its tokenizer, and prompts from the tokenizer's text."""
    from benchmarks.models import paper_form
    from raymoe.config import DataSection
    from raymoe.data.sources import documents
    from raymoe.data.tokens import train_tokenizer
    from raymoe.model.transformer import Transformer
    from raymoe.storage.artifact import Artifact
    from raymoe.storage.artifact_writing import write_artifact

    config = paper_form(name)
    texts = [document.text for document in islice(documents(DataSection(path=data)), 400)]
    tokenizer = train_tokenizer(texts, config.model.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    transformer = Transformer(config.model)
    transformer.initialize(0)
    target = write_artifact(
        folder / "artifact",
        config=config.to_dict(),
        tensors=transformer.logical(),
        assignment=config.model.default_assignment(),
        version=0,
        tokenizer=folder / "tokenizer.json",
        metrics={},
    )
    ids = [token for text in texts for token in tokenizer.encode(text).ids]
    stride = (len(ids) - PROMPT) // max(STREAMS)
    return Artifact.open(target), tokenizer, [ids[i * stride :][:PROMPT] for i in range(max(STREAMS))]


def make_engine(artifact: Any, tokenizer: Any, dtype: torch.dtype) -> Any:
    from raymoe.serving.engine.cluster import LocalClusters
    from raymoe.serving.engine.engine import Engine
    from raymoe.serving.engine.trunk import Trunk

    clusters = LocalClusters(artifact, range(artifact.model.n_clusters), dtype)
    return Engine(Trunk(artifact, clusters, dtype, PROMPT + NEW), tokenizer)


def complete(engine: Any, prompts: Prompts) -> tuple[Run, list[float], list[float]]:
    """Complete all prompts, submitted together. Return the speed, times to the first token and times between tokens.

    The speed is completion tokens per second of the whole time, prefill included. Times are in ms.
    """
    from raymoe.serving.engine.request import Request
    from raymoe.serving.engine.sampling import Sampling

    greedy = Sampling(temperature=0)
    last: dict[int, float] = {}
    first, gaps, count = [], [], 0
    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(i, Request(tuple(prompt), NEW, greedy, ignore_eos=True))
    while not engine.idle:
        increments = engine.step()
        now = time.perf_counter()
        for increment in increments:
            if increment.key in last:
                gaps.append(1000 * (now - last[increment.key]))
            else:
                first.append(1000 * (now - started))
            last[increment.key] = now
        count += len(increments)
    seconds = time.perf_counter() - started
    assert count == NEW * len(prompts)
    return {"seconds": seconds, "tokens_per_s": count / seconds}, first, gaps


# The peer: another process, with JSON lines as input and output


def install(folder: Path) -> None:
    """Install the peer's package and its dependencies in `folder`, without torch, which the project has."""
    local = Path(__file__).parents[2] / ".tools/bin/uv"
    uv = str(local) if local.exists() else shutil.which("uv")
    if uv is None:
        raise SystemExit("benchmark.py: --with-peers requires uv: run `make setup`, which installs it in .tools")
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder), PEER], check=True
    )


class Peer:
    """A process that generates with transformers."""

    def __init__(self, folder: Path, model: Any, dtype: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        )
        self.about = self.request({"model": dataclasses.asdict(model), "dtype": dtype})

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with exit status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def run_peer() -> None:
    """Build the model of the first input line; generate for each following line."""
    import transformers  # pyright: ignore
    from transformers import MixtralConfig, MixtralForCausalLM  # pyright: ignore

    transformers.logging.set_verbosity_error()
    request = json.loads(sys.stdin.readline())
    shapes, dtype = request["model"], TYPES[request["dtype"]]
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=shapes["vocabulary"], hidden_size=shapes["d_model"], intermediate_size=shapes["d_expert"],
        num_hidden_layers=shapes["layers"], num_attention_heads=shapes["heads"],
        num_key_value_heads=shapes["kv_heads"], num_local_experts=shapes["n_experts"],
        num_experts_per_tok=shapes["experts_per_token"], tie_word_embeddings=shapes["tied_head"],
        rope_theta=shapes["rope_theta"], max_position_embeddings=PROMPT + NEW, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, use_cache=True, attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config).to(dtype).eval()
    active: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: active.append(len(out[2].unique())))
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"])
        model.config._experts_implementation = request["experts"]
        prompts, new = torch.tensor(request["prompts"]), request["new"]
        active.clear()
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, use_cache=True,
            )  # fmt: skip
        seconds = time.perf_counter() - started
        assert out.shape == (len(prompts), prompts.shape[1] + new)
        print(json.dumps({"seconds": seconds, "active": statistics.mean(active[shapes["layers"] :])}), flush=True)


# The parts


def compared(engine: Any, peers: dict[str, Peer], prompts: Prompts, threads: int, rounds: int) -> dict[str, Any]:
    """Measure all sides in turn on `TOGETHER` streams; each peer uses the fastest of its expert products here."""
    tokens = NEW * TOGETHER
    sides: dict[str, Callable[[], float]] = {"ours": lambda: complete(engine, prompts)[0]["seconds"]}
    result: dict[str, Any] = {}
    for name, peer in peers.items():

        def generate(experts: str, new: int = NEW, peer: Peer = peer) -> dict[str, Any]:
            return peer.request({"threads": threads, "experts": experts, "prompts": prompts, "new": new})

        tried: dict[str, float] = {}
        for experts in ("eager", "batched_mm", "grouped_mm"):
            runs = [generate(experts, TRIAL) for _ in range(2)]
            tried[experts] = TRIAL * TOGETHER / min(run["seconds"] for run in runs)
        best = max(tried, key=lambda experts: tried[experts])
        active = generate(best)["active"]
        result[f"{name}, expert products"] = {
            "used": best,
            "tried, tokens/s": tried,
            "active experts of a step": active,
        }
        sides[name] = lambda generate=generate, best=best: generate(best)["seconds"]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + rounds):
        for name, run in sides.items():
            seconds = run()
            if turn:
                times[name].append(tokens / seconds)
    result["tokens/s"] = {name: spread(values) for name, values in times.items()}
    for name in peers:
        pairs = [a / b for a, b in zip(times["ours"], times[name], strict=True)]
        result[f"ours / {name}, pairs"] = spread(pairs)
    return result


def streams(engine: Any, prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Measure the engine alone: tokens/s, time to first token and between tokens (ms) by the number of streams."""
    result: dict[str, Any] = {}
    for n in STREAMS:
        speeds: list[float] = []
        first: list[float] = []
        gaps: list[float] = []
        for turn in range(1 + rounds):
            run, ttft, itl = complete(engine, prompts[:n])
            if turn:
                speeds.append(run["tokens_per_s"])
                first += ttft
                gaps += itl
        result[str(n)] = {
            "tokens_per_s": spread(speeds),
            "ttft_ms": spread(first) | {"p99": percentile(first, 99)},
            "itl_ms": spread(gaps) | {"p99": percentile(gaps, 99)},
        }
    return result


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def engine(name: str, data: str, rounds: int, with_peers: bool) -> dict[str, Any]:
    """Measure the engine on the paper's form of a preset, with random weights, greedy, with prompts and completions of 64 tokens."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        installed = Path(folder, "peers")
        if with_peers:
            install(installed)
        artifact, tokenizer, prompts = make_artifact(name, data, Path(folder))
        for kind, dtype in TYPES.items():
            ours = make_engine(artifact, tokenizer, dtype)
            peers: dict[str, Peer] = {}
            try:
                if with_peers:
                    for peer_name, model in peer_models(artifact.model).items():
                        peers[peer_name] = Peer(installed, model, kind)
                        result["peer"] = peers[peer_name].about
                for threads in (2, 1):
                    torch.set_num_threads(threads)
                    both = compared(ours, peers, prompts[:TOGETHER], threads, rounds)
                    alone = streams(ours, prompts, rounds)
                    result[f"{kind}, {threads} threads"] = {f"{TOGETHER} streams": both, "streams": alone}
                    show(f"{name} {kind:9}{threads} thread(s)", both, alone)
            finally:
                for peer in peers.values():
                    peer.close()
    return result


def peer_models(model: Any) -> dict[str, Any]:
    """Return the shapes of the peers' models for a clustered model."""
    bases = dataclasses.replace(model, n_experts=model.n_clusters, experts_per_token=model.clusters_per_token)
    return {"flat": model, "bases": bases}


def show(label: str, both: dict[str, Any], ours: dict[str, Any]) -> None:
    def range_of(row: dict[str, float], form: str = ",.0f") -> str:
        return f"{row['median']:{form}} [{row['min']:{form}}, {row['max']:{form}}]"

    line = f"{label}  {TOGETHER} streams: {range_of(both['tokens/s']['ours'])} tokens/s"
    for name, row in both["tokens/s"].items():
        if name != "ours":
            products, pairs = both[f"{name}, expert products"]["used"], both[f"ours / {name}, pairs"]
            line += f"; transformers, {name}: {range_of(row)} ({products}), ratio of pairs {range_of(pairs, '.2f')}"
    report(line)
    for n, row in ours.items():
        report(
            f"{label}  {n:>2} streams: {range_of(row['tokens_per_s'])} tokens/s; first token {range_of(row['ttft_ms'], '.1f')} ms; "
            f"between tokens {range_of(row['itl_ms'], '.1f')} ms, p99 {row['itl_ms']['p99']:.1f}"
        )


if __name__ == "__main__":
    run_peer()
