"""The policy as Serve's controller calls it, the settings and construction of an application, and rollouts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.exceptions import RayError
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import RayServeException

import raymoe.commands.serve
import raymoe.ops.local_head
from raymoe.serving.app import _scaled, api_settings, build
from raymoe.serving.autoscaling import Policy
from raymoe.serving.discovery import endpoints
from raymoe.serving.http.server import ApiSettings
from raymoe.serving.rollout import Rollout, pinned
from raymoe.serving.serve_policy import Scaler
from raymoe.serving.settings import ServeSettings, from_dict
from tests.support.served import artifact

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Key:
    """Stands for Serve's DeploymentID."""

    name: str
    app_name: str = "raymoe"


@dataclass
class Contexts:
    """Contexts of an application: `offered[c]` rows/s, computed by one replica in `cost` busy seconds each."""

    offered: list[float]
    cost: float = 0.002
    minimum: int = 0
    maximum: int = 4
    replicas: list[int] = field(default_factory=list)
    now: float = 0.0

    def contexts(self) -> dict[Key, Any]:
        made: dict[Key, Any] = {Key("api"): SimpleNamespace(aggregated_metrics={})}
        trunk = {f"remote_{c}": {"t": rows} for c, rows in enumerate(self.offered)}
        trunk |= {f"bytes_{c}": {"t": 100.0} for c in range(len(self.offered))}
        made[Key("trunk")] = SimpleNamespace(aggregated_metrics=trunk)
        for c, n in enumerate(self.replicas):
            busy = min(1.0, self.offered[c] * self.cost / n) if n else 0.0
            own = {"busy": {f"r{i}": busy for i in range(n)}, "latency_s": {f"r{i}": 0.001 for i in range(n)}}
            made[Key(f"cluster-{c}")] = SimpleNamespace(
                target_num_replicas=n, aggregated_metrics=own if n else {},
                config=SimpleNamespace(min_replicas=self.minimum, max_replicas=self.maximum),
            )  # fmt: skip
        return made

    def run(self, scaler: Scaler, seconds: float) -> list[list[int]]:
        """Run Serve's loop, ten calls per second; replicas start at once. Return the replicas after each call."""
        history = []
        for _ in range(round(seconds * 10)):
            decisions, _ = scaler(self.contexts())
            for key, n in decisions.items():
                self.replicas[int(key.name.removeprefix("cluster-"))] = n
            history.append(list(self.replicas))
            self.now += 0.1
        return history


def scaler(contexts: Contexts, **policy: Any) -> Scaler:
    return Scaler(interval_s=2.0, clock=lambda: contexts.now, **policy)


def test_hot_clusters_scale_up_in_two_decisions_and_back_and_cold_ones_stay() -> None:
    contexts = Contexts([0.0] * 4, replicas=[0] * 4)
    policy = scaler(contexts, target=0.5, down_cooldown_s=10, idle_s=30)
    assert contexts.run(policy, 10)[-1] == [0, 0, 0, 0]
    contexts.offered = [900.0, 10.0, 10.0, 10.0]
    history = contexts.run(policy, 6)
    assert history[40][0] == 4 and history[-1] == [4, 1, 1, 1]
    contexts.offered = [10.0] * 4
    history = contexts.run(policy, 60)
    assert history[-1] == [1, 1, 1, 1]
    changes = sum(a != b for a, b in zip(history, history[1:], strict=False))
    assert changes == 1
    contexts.offered = [0.0] * 4
    assert contexts.run(policy, 60)[-1] == [0, 0, 0, 0]


def test_calls_between_decisions_return_the_last_one() -> None:
    contexts = Contexts([900.0], replicas=[1])
    policy = scaler(contexts)
    calls = []
    policy._decide = lambda *a: calls.append(contexts.now)  # type: ignore[method-assign]
    contexts.run(policy, 6)
    assert calls == pytest.approx([0.0, 2.0, 4.0], abs=0.11)


def test_a_new_controller_starts_from_the_running_replicas() -> None:
    contexts = Contexts([600.0, 10.0], replicas=[3, 1])
    assert contexts.run(scaler(contexts), 3)[-1] == [3, 1]


def test_without_a_report_of_a_trunk_nothing_changes() -> None:
    contexts = Contexts([500.0, 10.0], replicas=[2, 1])
    made = contexts.contexts()
    made[Key("trunk")].aggregated_metrics = {}
    decisions, _ = scaler(contexts)(made)
    assert {key.name: n for key, n in decisions.items()} == {"cluster-0": 2, "cluster-1": 1}


def test_the_budget_limits_all_clusters_together() -> None:
    contexts = Contexts([2000.0, 2000.0, 0.0], replicas=[1, 1, 0])
    history = contexts.run(scaler(contexts, budget_bytes=500), 30)
    assert all(sum(n) <= 5 for n in history) and sum(history[-1]) == 5


def test_invalid_policies_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="target=2 is not allowed"):
        Scaler(target=2)
    for name in ("no_such", "minimum", "maximum"):
        with pytest.raises(ValueError, match=f"unknown key '{name}'"):
            Scaler(**{name: 1})


# Settings


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"resident": 1}, "unknown key 'resident': did you mean 'resident_bytes'"),
        ({"trunks": 0}, "trunks=0 is not allowed: at least 1"),
        ({"trunks": "two"}, "trunks='two' is not allowed: expected int"),
        ({"trunks": True}, "trunks=True is not allowed: expected int"),
        ({"resident_bytes": "some"}, "resident_bytes='some' is not allowed: all, or bytes"),
        ({"resident_bytes": -1}, "resident_bytes=-1 is not allowed"),
        ({"precision": "float16"}, "precision='float16' is not allowed: float32 or bfloat16"),
        ({"min_replicas": 5}, "max_replicas=4 is not allowed: at least min_replicas=5"),
        ({"step_tokens": 1}, "step_tokens=1 is not allowed"),
        ({"cpus": "1"}, "cpus='1' is not allowed: expected int or float"),
    ],
)
def test_invalid_settings_are_refused_with_the_allowed_values(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_dict(args)
    assert message in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node.example"])
def test_a_host_that_others_reach_needs_a_key_or_an_explicit_setting(host: str) -> None:
    with pytest.raises(ValueError, match=f"http_options.host={host} serves /v1 .* set RAYMOE_API_KEY"):
        api_settings(ServeSettings(), None, host)
    with pytest.raises(ValueError, match="allow_unauthenticated: true"):
        api_settings(ServeSettings(), "", host)
    assert api_settings(ServeSettings(), "key", host).api_key == "key"
    assert api_settings(ServeSettings(allow_unauthenticated=True), None, host).api_key is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", None])
def test_loopback_needs_no_key(host: str | None) -> None:
    assert api_settings(ServeSettings(), None, host).api_key is None


def test_the_api_receives_the_key_of_the_process_that_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An api on a node without the variable would otherwise serve /v1 without a key."""
    made = artifact(tmp_path).folder
    monkeypatch.setenv("RAYMOE_API_KEY", "the key")
    with pytest.raises(ValueError, match="api_key is not allowed"):
        build({"artifact": str(made)})
    monkeypatch.setenv("RAYMOE_API_KEY", "canary")
    application = build({"artifact": str(made)})
    bound = application._bound_deployment.init_args
    (settings,) = [each for each in bound if isinstance(each, ApiSettings)]
    assert settings.api_key == "canary" and "canary" not in repr(bound)


def test_the_newest_export_is_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no export under"):
        ServeSettings(root=str(tmp_path)).folder()
    for i, name in enumerate(("new", "old")):
        made = artifact(tmp_path / "made" / name).folder
        target = tmp_path / "exports" / name
        target.parent.mkdir(exist_ok=True)
        made.rename(target)
        os.utime(target / "manifest.json", (1000 - i, 1000 - i))
    assert ServeSettings(root=str(tmp_path)).folder().name == "new"
    assert ServeSettings(root=str(tmp_path), artifact="old").folder().name == "old"
    assert ServeSettings(artifact=str(tmp_path / "exports" / "old")).folder().name == "old"
    with pytest.raises(FileNotFoundError, match="artifact='none'"):
        ServeSettings(root=str(tmp_path), artifact="none").folder()


def test_the_shipped_config_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "services/raymoe.yaml").read_text()))
    assert config.http_options.host == "127.0.0.1"
    for application in config.applications:
        from_dict(application.args)  # type: ignore[arg-type]
        assert isinstance(application.autoscaling_policy, dict)
        assert application.autoscaling_policy["policy_function"] == "raymoe.serving.serve_policy:Scaler"
        Policy(**application.autoscaling_policy["policy_kwargs"])


def test_a_redeployment_keeps_the_running_replicas() -> None:
    """Serve's initial replicas of a new deployment (-1), and of one that has changed."""
    deployment_config = SimpleNamespace(autoscaling_config=_scaled(1, 4), gang_scheduling_config=None)
    info: Any = SimpleNamespace(
        deployment_config=deployment_config, target_capacity=None, target_capacity_direction=None,
        config_changed=lambda other: True,
    )  # fmt: skip
    state = DeploymentAutoscalingState(DeploymentID(name="cluster-0", app_name="raymoe"))
    assert [state.register(info, n) for n in (-1, 3, 9)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("fails", "expected"),
    [(RayServeException("none"), []), (TimeoutError(), None), (RayError(), None), (RuntimeError("odd"), None)],
)
def test_discovery_survives_every_failure_of_serve(fails: Exception, expected: list[Any] | None) -> None:
    async def results_async(**_: Any) -> list[Any]:
        raise fails

    handle: Any = SimpleNamespace(broadcast=lambda name: SimpleNamespace(results_async=results_async))
    assert asyncio.run(endpoints(handle)) == expected


# Rollouts


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray behind the dashboard's address."""
    monkeypatch.setattr("raymoe.serving.rollout.ServeSubmissionClient", lambda address: None)


class Serving(Rollout):
    """A rollout on a Serve that deploys at once. `broken`: applications that do not respond."""

    running_at = ("127.0.0.1", 8000)

    def __init__(self, name: str, there: dict[str, str], broken: Sequence[str] = ()) -> None:
        one = {"name": name, "import_path": "raymoe.serving.app:build", "args": {}}
        options = {"host": "127.0.0.1", "port": 8000}
        super().__init__("http://here", {"applications": [one], "http_options": options}, timeout=0.5)
        self.broken, self.history = broken, [there]

    def applications(self) -> dict[str, Any]:
        return {
            name: {
                "status": "RUNNING", "route_prefix": route,
                "deployed_app_config": {
                    "name": name, "import_path": "other:app" if name == "other" else "raymoe.serving.app:build",
                },
            }
            for name, route in self.history[-1].items()
        }  # fmt: skip

    def details(self) -> dict[str, Any]:
        host, port = self.running_at
        options = {"host": host, "port": port}
        return {"controller_info": {"pid": 1}, "http_options": options, "applications": self.applications()}

    def get(self, path: str) -> str | None:
        prefix = path.rpartition("/")[0] or "/"
        responding = [name for name, route in self.history[-1].items() if route == prefix and name not in self.broken]
        return (
            '# TYPE raymoe_num_requests_running gauge\nraymoe_num_requests_running{model_name="m"} 0.0\n'
            if responding
            else None
        )

    def _deploy(self, applications: list[dict[str, Any]]) -> None:
        known = self.history[-1]
        self.history.append({app["name"]: app.get("route_prefix", known.get(app["name"])) for app in applications})


@pytest.mark.parametrize(
    ("there", "broken"),
    [
        ({}, []),
        ({"new": "/"}, []),
        ({"old": "/"}, []),
        ({"old": "/"}, ["old"]),  # it does not respond: nothing to wait for
        ({"old": "/old", "new": "/"}, []),  # an interrupted rollout, while the old one drained
        ({"old": "/", "new": "/new"}, []),
    ],
)
def test_a_rollout_replaces_the_others_and_always_serves_the_route(
    no_ray: None, there: dict[str, str], broken: list[str]
) -> None:
    rollout = Serving("new", there | {"other": "/other"}, broken)
    rollout.up()
    assert all("/" in routes.values() for routes in rollout.history[not there :])
    assert rollout.history[-1] == {"other": "/other", "new": "/"}
    assert all(routes["other"] == "/other" for routes in rollout.history)


@pytest.mark.parametrize("running", [("127.0.0.1", 8001), ("0.0.0.0", 8000)])
def test_other_http_options_than_those_of_a_running_serve_are_refused_at_once(
    no_ray: None, running: tuple[str, int]
) -> None:
    """Serve would keep its own, and nothing would respond at the config's address."""
    rollout = Serving("new", {"old": "/"})
    rollout.running_at = running
    with pytest.raises(RuntimeError) as caught:
        rollout.up()
    assert f"already listens on {running[0]}:{running[1]} and serves old" in str(caught.value)
    assert "the config has 127.0.0.1:8000" in str(caught.value) and "serve shutdown -a http://here" in str(caught.value)
    assert rollout.history == [{"old": "/"}]


def test_a_serve_that_does_not_run_takes_the_options_of_the_config(no_ray: None) -> None:
    rollout = Serving("new", {})
    rollout.details = lambda: {"controller_info": {}, "proxies": {}, "applications": {}}  # type: ignore[method-assign]
    rollout.check_http_options()


@pytest.mark.parametrize(
    ("metrics", "drained"),
    [
        ("", False),
        ("raymoe_num_requests_running{model_name=\"a b\"} 0.0\nraymoe_num_requests_running 1.0\n", False),
        ("# HELP raymoe_num_requests_running x\n# TYPE raymoe_num_requests_running gauge\nraymoe_num_requests_running{m=\"} 1\"} 0 1700000000\n", True),
        ("raymoe_num_requests_running_more 0\n", False),
    ],
)  # fmt: skip
def test_an_application_is_drained_when_it_runs_no_request(no_ray: None, metrics: str, drained: bool) -> None:
    rollout = Serving("new", {})
    rollout.get = lambda path: metrics  # type: ignore[method-assign]
    assert rollout._is_drained("old") == drained


def test_an_application_that_does_not_start_changes_nothing(no_ray: None) -> None:
    rollout = Serving("new", {"old": "/"}, ["new"])
    with pytest.raises(RuntimeError, match="to be ready"):
        rollout.up()
    assert rollout.history[-1] == {"old": "/"}


@pytest.mark.parametrize("start", [[], ["--start"]])
def test_serving_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: list[str]) -> None:
    started: list[str] = []
    made = artifact(tmp_path).folder
    rollout = SimpleNamespace(application={"args": {"artifact": "a", "name": "n"}}, base="", name="", up=lambda: None)
    monkeypatch.setattr("raymoe.serving.rollout.Rollout", lambda *_: rollout)
    monkeypatch.setattr(raymoe.ops.local_head, "start", started.append)
    monkeypatch.setattr("sys.argv", ["serve.py", str(made), "--address", "here", *start])
    assert raymoe.commands.serve.main() == 0 and started == (["here"] if start else [])


def test_a_pinned_config_is_validated_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made").folder
    (tmp_path / "exports").mkdir()
    made.rename(tmp_path / "exports" / "one")
    config = yaml.safe_load((ROOT / "services/raymoe.yaml").read_text())
    monkeypatch.chdir(tmp_path.parent)
    (application,) = pinned(config, root=tmp_path.name)["applications"]
    assert application["args"]["root"] == str(tmp_path)
    assert application["args"]["artifact"] == str(tmp_path / "exports" / "one")
    assert application["name"].startswith("raymoe-one-")  # as Ray's dashboard shows it
    config["applications"][0]["autoscaling_policy"]["policy_kwargs"] = {"tarjet": 0.5}
    with pytest.raises(ValueError, match="unknown key 'tarjet'"):
        pinned(config, root=tmp_path.name)
