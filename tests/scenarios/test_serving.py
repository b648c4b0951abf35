"""The application on a real Serve: deployed from the command line, under load, killed, scaled and replaced."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from raymoe.commands.load import Completion, load
from raymoe.ops.ray_head import Head, head
from raymoe.serving.engine.cluster import LocalClusters, cluster_sizes
from raymoe.serving.engine.engine import Engine
from raymoe.serving.engine.request import Request
from raymoe.serving.engine.sampling import Sampling
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.rollout import Rollout
from raymoe.storage.artifact import Artifact
from tests.support.deployed import config, deploy, get, kill, post, serve
from tests.support.paths import REPO_ROOT
from tests.support.served import MODEL, artifact, tokenizer, whole
from tests.support.waiting import until

PROMPTS = ["The cat sat on", "the dog, naive as ever", "ran after 42 birds", "Unicode: sat", "the mat; the"]
TOKENS = 40


@pytest.fixture(scope="module")
def ray() -> Iterator[Head]:
    with head(cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def expected(model: Artifact) -> list[str]:
    return texts_of(model)


def texts_of(model: Artifact) -> list[str]:
    """Return the greedy completions of an engine in this process, by prompt."""
    engine = Engine(
        Trunk(model, LocalClusters(model, range(model.model.n_clusters), torch.float32), torch.float32, 128),
        tokenizer(),
    )
    texts = dict.fromkeys(range(len(PROMPTS)), "")
    for i, prompt in enumerate(PROMPTS):
        ids = tuple(tokenizer().encode(prompt).ids)
        engine.submit(i, Request(ids, TOKENS, Sampling(temperature=0), ignore_eos=True))
    while not engine.idle:
        for increment in engine.step():
            texts[increment.key] += increment.text
    return list(texts.values())


def greedy(model: str) -> dict[str, object]:
    return {"model": model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def check(answers: Sequence[Completion], expected: Sequence[str]) -> None:
    assert [a.error for a in answers] == [""] * len(answers)
    assert [a.text for a in answers] == [expected[a.prompt] for a in answers]


async def while_killing(rollout: Rollout, name: str, victims: Sequence[str], requests: int) -> list[Completion]:
    """Return the completions of a load during which one replica of each of `victims` is killed."""
    loading = asyncio.create_task(load(rollout.base, PROMPTS, streams=4, requests=requests, body=greedy(name)))
    for victim in victims:
        await asyncio.to_thread(kill, rollout, victim)
        await asyncio.sleep(0.3)
    return await loading


def addresses(pid: int) -> set[str]:
    """Return the addresses on which a process listens. Ray's own listeners use the node's address."""
    listening = [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return {c.laddr.ip for c in listening}


def check_likelihoods(rollout: Rollout, model: Artifact) -> None:
    """Compare the served log-probabilities of a prompt with those that evaluation computes from the artifact."""
    ids = tokenizer().encode(" ".join(PROMPTS)).ids[:100]
    body = {"model": model.folder.name, "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    status, answer = post(rollout, "/v1/completions", body)
    assert status == 200, answer
    served = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)])
    with torch.no_grad():
        table = whole(model)(torch.tensor([ids])).log_softmax(-1)[0]
    torch.testing.assert_close(served, table[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0], atol=1e-4, rtol=0)


@pytest.mark.ray
def test_the_application_serves_through_killed_replicas(
    ray: Head, model: Artifact, expected: list[str], tmp_path: Path
) -> None:
    args = {"artifact": str(model.folder), "root": str(tmp_path), "resident_bytes": 0, "min_replicas": 1}
    rollout = deploy(ray, tmp_path, config(args))
    name = model.folder.name
    try:
        check(asyncio.run(load(rollout.base, PROMPTS, streams=5, requests=10, body=greedy(name))), expected)
        check_likelihoods(rollout, model)
        assert {get(rollout, path)[0] for path in ("/health", "/v1/models", "/version", "/metrics")} == {200}
        assert post(rollout, "/v1/completions", {"model": "other", "prompt": "x"})[0] == 404
        status, body = post(rollout, "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 10**6})
        assert status == 400 and body["error"]["type"] == "invalid_request_error"
        assert all("127.0.0.1" in addresses(rollout.pids(each)[0]) for each in ("trunk", "cluster-0"))

        elsewhere = {**rollout.config, "http_options": {"host": "127.0.0.1", "port": 1}}
        with pytest.raises(RuntimeError, match=f"already listens on {rollout.host}:{rollout.port} and serves raymoe"):
            Rollout(ray.dashboard, elsewhere).up()

        check(asyncio.run(while_killing(rollout, name, ["cluster-0", "trunk", "cluster-1"], 60)), expected)
        rollout.wait(lambda: rollout.running() == rollout.targets(), "to be whole again")
        status = serve(ray, "status")
        assert "cluster-0" in status and "RUNNING" in status
    finally:
        serve(ray, "shutdown", "-y")
    assert not rollout.applications()


@pytest.mark.soak
def test_an_open_address_without_a_key_is_refused(ray: Head, model: Artifact, tmp_path: Path) -> None:
    """The application is built on the cluster, where the address of Serve's proxies is known."""
    made = config({"artifact": str(model.folder), "root": str(tmp_path)})
    made["http_options"]["host"] = "0.0.0.0"
    rollout = Rollout(ray.dashboard, made)
    try:
        with pytest.raises(RuntimeError, match="http_options.host=0.0.0.0 serves /v1 to other machines without a key"):
            rollout.up()
        (application,) = made["applications"]
        application["args"]["allow_unauthenticated"] = True
        rollout.up()
    finally:
        serve(ray, "shutdown", "-y")


def run(*command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a job from the command line."""
    environment = os.environ | (environment or {})
    line = [sys.executable, *command]
    return subprocess.run(line, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=500)


def job(ray: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("jobs/serve.py", "--address", ray.dashboard, *arguments, environment=ray.environment)


@pytest.mark.soak
def test_a_rollout_fails_no_request(ray: Head, model: Artifact, expected: list[str], tmp_path: Path) -> None:
    """A second artifact replaces the first under load; an invalid one is refused."""
    second = artifact(tmp_path / "second", seed=1)
    made = config({"name": "m", "max_replicas": 1, "root": str(tmp_path)})
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(made))
    refused = job(ray, "nothing", "--config", str(file))
    assert refused.returncode == 2 and "artifact='nothing'" in refused.stderr
    rollout = Rollout(ray.dashboard, made)

    async def update(folder: Path) -> tuple[list[Completion], subprocess.CompletedProcess[str]]:
        over = asyncio.Event()
        loading = asyncio.create_task(load(rollout.base, PROMPTS, streams=4, until=over, body=greedy("m")))
        done = await asyncio.to_thread(job, ray, str(folder), "--config", str(file))
        over.set()
        return await loading, done

    try:
        done = job(ray, str(model.folder), "--config", str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        check(asyncio.run(load(rollout.base, PROMPTS, streams=5, requests=5, body=greedy("m"))), expected)
        before = list(rollout.applications())

        answers, done = asyncio.run(update(second.folder))
        assert done.returncode == 0, done.stdout + done.stderr
        assert [a.error for a in answers] == [""] * len(answers)
        texts = (expected, texts_of(second))
        whose = [[a.text == of_one[a.prompt] for of_one in texts] for a in answers]
        assert all(map(any, whose)) and whose[0][0] and all(new for _, new in whose[-4:])
        assert any(new and not old for old, new in whose) and any(old and not new for old, new in whose)
        assert len(rollout.applications()) == 1 and list(rollout.applications()) != before
    finally:
        serve(ray, "shutdown", "-y")


@pytest.mark.soak
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_likelihoods_do_not_depend_on_residency(
    ray: Head, model: Artifact, expected: list[str], tmp_path: Path, share: float
) -> None:
    sizes = cluster_sizes(model, torch.float32)
    resident = "all" if share == 1 else round(share * sum(sizes.values()))
    args = {"artifact": str(model.folder), "resident_bytes": resident, "min_replicas": 2, "max_replicas": 2}
    rollout = deploy(ray, tmp_path, config(args | {"split_rows": 8, "root": str(tmp_path)}))
    try:
        check_likelihoods(rollout, model)
        name = model.folder.name
        check(asyncio.run(load(rollout.base, PROMPTS, streams=5, requests=50, body=greedy(name))), expected)
        check_likelihoods(rollout, model)
        targets = tmp_path / "serving" / "raymoe" / "prometheus_targets.json"
        until(lambda: "cluster-0" in targets.read_text(), "Prometheus's targets")
    finally:
        serve(ray, "shutdown", "-y")


@pytest.mark.soak
def test_clusters_scale_by_their_own_load_to_zero_and_back(ray: Head, model: Artifact, tmp_path: Path) -> None:
    """From zero to the maximum of a cluster under load and back to zero; no request fails."""
    args = {"artifact": str(model.folder), "root": str(tmp_path), "resident_bytes": 0, "max_replicas": 2}
    rollout = deploy(ray, tmp_path, config(args, {"target": 0.01, "down_cooldown_s": 6.0, "idle_s": 8.0}))
    name = model.folder.name

    def clusters(replicas: dict[str, int]) -> list[int]:
        return [n for deployment, n in replicas.items() if deployment.startswith("cluster-")]

    async def run() -> list[Completion]:
        over = asyncio.Event()
        loading = asyncio.create_task(load(rollout.base, PROMPTS, streams=4, until=over, body=greedy(name)))
        try:
            await asyncio.to_thread(until, lambda: max(clusters(rollout.targets())) == 2, "a cluster's maximum")
        finally:
            over.set()
        return await loading

    try:
        assert clusters(rollout.targets()) == [0, 0, 0]
        answers = asyncio.run(run())
        assert [a.error for a in answers] == [""] * len(answers)
        until(lambda: not any(clusters(rollout.targets())), "all to sleep")
        until(lambda: not any(clusters(rollout.running())), "their processes to end")
        assert post(rollout, "/v1/completions", greedy(name) | {"prompt": PROMPTS[0]})[0] == 200
        until(lambda: any(clusters(rollout.targets())), "one to wake")
    finally:
        serve(ray, "shutdown", "-y")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with a context for real text, which its small tokenizer splits into many tokens."""
    return artifact(tmp_path_factory.mktemp("long"), replace(MODEL, context=512))


@pytest.mark.soak
def test_a_load_is_driven_from_the_command_line(ray: Head, long: Artifact, tmp_path: Path) -> None:
    rollout = deploy(ray, tmp_path, config({"artifact": str(long.folder), "root": str(tmp_path)}))
    try:
        line = ["jobs/load.py", "--url", rollout.base, "--streams", "4", "--seconds", "3", "--words", "8"]
        done = run(*line, "--domain", "licences", "--json", str(tmp_path / "load.json"))
        assert done.returncode == 0, done.stdout + done.stderr
        output = json.loads((tmp_path / "load.json").read_text())
        assert (
            output["requests"] == len(output["completions"]) >= 4
            and output["failed"] == 0
            and output["output_throughput"] > 0
        )
        refused = run(*line, "--domain", "no such")
        assert refused.returncode == 2 and "--domain no such is not in builtin" in refused.stderr
    finally:
        serve(ray, "shutdown", "-y")
    assert run(*line).returncode == 2


@pytest.mark.soak
def test_processes_are_killed_from_the_command_line(long: Artifact, tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    line = [
        "jobs/chaos",
        "serve",
        str(long.folder),
        "--streams",
        "4",
        "--kills",
        "2",
        "--seconds",
        "16",
        "--no-control-plane",
    ]
    done = run(*line, "--json", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    row = result["replicas"]
    assert row["requests"] > 4 and row["failed"] == row["changed"] == 0
    assert len(row["kills"]) == 2 and all(kill["recovered_s"] > 0 and kill["pids"] for kill in row["kills"])
    assert run("jobs/chaos", "serve", "no such").returncode == 2


@pytest.mark.soak
@pytest.mark.parametrize("part", ["engine", "planes", "scaling"])
def test_the_benchmarks_of_serving_run(part: str, model: Artifact, tmp_path: Path) -> None:
    output = tmp_path / "output.json"
    line = ["--preset", "tiny", "--rounds", "1", "--artifact", str(model.folder), "--json", str(output)]
    done = run("jobs/benchmark.py", "serve", "--part", part, *line)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())["result"][part]
    assert result
    if part == "scaling":
        heavy = result["demands"]["32.0"]
        assert sum(heavy["clusters"]) == pytest.approx(heavy["models"], rel=0.25)  # the policy's tolerance
        assert 2 * heavy["bytes"] < heavy["bytes_models"]
