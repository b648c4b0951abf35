"""Authentication: a Ray with a token, an application with a key, and listeners on loopback only."""

from __future__ import annotations

import asyncio
import importlib
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry

from raymoe.config import TrainSection
from raymoe.metrics import serve
from raymoe.ops.ray_head import Head, authorization, head
from raymoe.serving.settings import ServeSettings
from raymoe.serving.transport.requests import RequestServer
from raymoe.serving.transport.rows import RowServer
from tests.support.deployed import config
from tests.support.paths import REPO_ROOT
from tests.support.served import artifact

CANARIES = {
    name: f"canary-{name.lower()}-{secrets.token_hex(12)}" for name in ("RAYMOE_API_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN")
}
"""Secrets that must appear in no output, file or response."""

DENIED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


# The token


def test_the_token_is_read_from_the_same_places_as_by_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert authorization({}) == authorization({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}) == {}
    token = {"RAY_AUTH_MODE": "token"}
    (tmp_path / "file").write_text("from a file\n")
    from_file = token | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert authorization(from_file) == {"Authorization": "Bearer from a file"}
    assert authorization(from_file | {"RAY_AUTH_TOKEN": "given"}) == {"Authorization": "Bearer given"}
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="ray get-auth-token --generate"):
        authorization(token)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of this user")
    assert authorization(token) == {"Authorization": "Bearer of this user"}


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_make_keeps_the_mode_of_the_environment(mode: str, tmp_path: Path) -> None:
    made = (REPO_ROOT / "Makefile").read_text() + "\nmode:\n\t@echo $$RAY_AUTH_MODE\n"
    (tmp_path / "Makefile").write_text(made)
    for environment, expected in (
        (os.environ | {"RAY_AUTH_MODE": mode}, mode),
        ({"PATH": os.environ["PATH"]}, "disabled"),
    ):
        done = subprocess.run(["make", "-s", "mode"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [expected]


# Listeners


def hosts(port: int) -> set[str]:
    """Return the addresses on which this process listens at `port`."""
    connections = psutil.Process().net_connections("inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_listeners_use_loopback_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ServeSettings().host
    loopback = {"127.0.0.1"}
    assert {host, TrainSection().metrics_host} == loopback
    assert hosts(serve(CollectorRegistry())) == loopback
    with closing(RowServer(lambda layer, x: x, {}, 8, torch.float32, (host, 0))) as server:
        assert hosts(server.port) == loopback

    async def session() -> None:
        server = RequestServer({})
        await server.start((host, 0), None)  # type: ignore[arg-type]
        assert hosts(server.port) == loopback
        await server.close()

    asyncio.run(session())
    shipped = yaml.safe_load((REPO_ROOT / "services" / "raymoe.yaml").read_text())
    assert shipped["http_options"]["host"] == "127.0.0.1" and "host" not in shipped["applications"][0]["args"]
    monkeypatch.syspath_prepend(REPO_ROOT / "dashboards")
    watch = importlib.import_module("watch")
    started: list[list[str]] = []
    monkeypatch.setattr(watch.subprocess, "Popen", lambda command, **_: started.append(command))
    watch.start(Path("prometheus"), tmp_path / "prometheus.yml", 9090)
    assert "--web.listen-address=127.0.0.1:9090" in started[0]


# A head that requires a token


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    file = tmp_path_factory.mktemp("auth") / "token"
    file.touch(0o600)
    file.write_text(CANARIES["RAY_AUTH_TOKEN"])
    others = {name: CANARIES[name] for name in ("RAYMOE_API_KEY", "HF_TOKEN")}
    with head(cpus=4, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), **others}) as running:
        yield running


def status(url: str, key: str | None = None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def run(ray: Head, environment: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    line = ray.submit(*command, working_dir=REPO_ROOT)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.soak
def test_the_dashboard_requires_the_token(ray: Head) -> None:
    for path in ("/api/jobs/", "/api/version", "/api/serve/applications/", "/nodes?view=summary"):
        assert status(ray.dashboard + path)[0] == 401, path
        assert status(ray.dashboard + path, "a guess")[0] == 403, path
        assert status(ray.dashboard + path, CANARIES["RAY_AUTH_TOKEN"])[0] == 200, path


@pytest.mark.soak
def test_jobs_without_the_token_are_refused(ray: Head, tmp_path: Path) -> None:
    ran_file = tmp_path / "ran"
    touch = ["python", "-c", f"open({str(ran_file)!r}, 'w').write('ran')"]
    bare = {name: value for name, value in ray.environment.items() if name not in DENIED}
    (tmp_path / "wrong").write_text("a guess")
    wrong = bare | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}
    for environment in (bare, wrong):
        refused = run(ray, environment, *touch)
        words = refused.stdout + refused.stderr
        assert refused.returncode != 0 and "authenticat" in words.lower(), words
    assert not ran_file.exists()
    assert run(ray, ray.environment, *touch).returncode == 0 and ran_file.read_text() == "ran"


@pytest.mark.soak
def test_a_run_and_an_application_with_a_token_work_and_leak_no_secret(ray: Head, tmp_path: Path) -> None:
    """Two workers and the clusterer; then `jobs/serve.py`, which sends the token to the dashboard."""
    (tmp_path / "text.txt").write_text("\n".join(p.read_text() for p in sorted((REPO_ROOT / "raymoe").rglob("*.py"))))
    quick = ["train.steps=4", "train.global_batch=8", "train.grain=4", "model.context=64", "model.vocabulary=512"]
    options = ["run.name=first", f"run.root={tmp_path}", f"data.path={tmp_path / 'text.txt'}", *quick]
    done = run(ray, ray.environment, "python", "jobs/train.py", "tiny", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "first" / "report.html").is_file()

    folder = artifact(tmp_path / "model").folder
    shipped = config({"artifact": str(folder), "root": str(tmp_path)})
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(shipped))
    base = f"http://127.0.0.1:{shipped['http_options']['port']}"
    line = [sys.executable, str(REPO_ROOT / "jobs" / "serve.py"), "--config", str(tmp_path / "serve.yaml")]
    line += ["--address", ray.dashboard]
    served = subprocess.run(line, env=ray.environment, capture_output=True, text=True, timeout=240)
    assert served.returncode == 0, served.stdout + served.stderr
    for key, expected in ((None, 401), ("a guess", 401), (CANARIES["RAYMOE_API_KEY"], 200)):
        code, body = status(f"{base}/v1/models", key)
        assert code == expected and "canary" not in body
    listening = [c.laddr for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {ip for ip, port in listening if port == shipped["http_options"]["port"]} == {"127.0.0.1"}

    texts = {"train": done.stdout + done.stderr, "serve": served.stdout + served.stderr}
    texts |= {path: status(base + path)[1] for path in ("/metrics", "/version", "/health", "/nowhere")}
    files = [path for root in (tmp_path, ray.folder) for path in root.rglob("*") if path.is_file()]
    assert any("logs" in path.parts for path in files)
    texts |= {str(path): path.read_text(errors="replace") for path in files if path.suffix != ".safetensors"}
    leaked = {(name, where) for where, text in texts.items() for name, canary in CANARIES.items() if canary in text}
    assert not leaked
