"""The files for clouds (`ray up`, KubeRay, the image), checked without a cloud.

`jobs/ray_cluster.yaml` is checked by Ray's own schema. The manifests are checked by Ray's reader of RayClusters and by
KubeRay's schema in `tests/golden` (see `tests/support/kuberay_schema.py`).
"""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from raymoe.commands.train import parser
from raymoe.config import override, preset
from raymoe.serving.settings import from_dict
from tests.support import kuberay_schema
from tests.support.kuberay_schema import MANIFESTS
from tests.support.paths import REPO_ROOT

VERSION = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGE = f"registry.example.com/raymoe:{VERSION}"
CLUSTER = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def load(name: str, kind: str = "") -> dict[str, Any]:
    documents = [d for d in yaml.safe_load_all((REPO_ROOT / name).read_text()) if not kind or d["kind"] == kind]
    assert len(documents) == 1
    return copy.deepcopy(documents[0])  # without the anchors' shared parts


# --- ray up


def check_cluster(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return the config as `ray up` completes it. Raises for errors that Ray finds, and for some that it does not."""
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    for name, kind in prepared["available_node_types"].items():
        if kind.get("min_workers", 0) > kind["max_workers"]:
            raise ValueError(f"{name}: min_workers is more than max_workers")
        if kind["max_workers"] > prepared["max_workers"]:
            raise ValueError(f"{name}: max_workers is more than the total")
    return prepared


def test_ray_up_accepts_the_cluster() -> None:
    cluster = check_cluster(load("jobs/ray_cluster.yaml"))
    types = cluster["available_node_types"]
    assert types["head"]["max_workers"] == 0 and cluster["head_node_type"] == "head"
    assert types["gpu"]["resources"]["GPU"] == 1 and types["cpu"]["max_workers"] > 0
    assert cluster["docker"]["image"] == IMAGE
    options = shlex.split(" ".join(cluster["docker"]["run_options"]))
    assert {"RAYMOE_HOME=/mnt/raymoe", "RAY_AUTH_MODE=token", "/mnt/raymoe:/mnt/raymoe"} <= set(options)
    assert any(" /mnt/raymoe" in line and "mount -t nfs4" in line for line in cluster["initialization_commands"])
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    for line in (head, worker):
        for option in re.findall(r"(--[a-z-]+)", line):
            assert option in ray_start_options(), f"ray start knows no {option}"
    for line in (*cluster["setup_commands"], *cluster["head_setup_commands"], *cluster["worker_setup_commands"]):
        assert "/app" in line
    assert_health(dict(re.findall(r"(RAY_health_check_[a-z_]+)=(\d+)", head)))


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


def assert_health(found: dict[str, str]) -> None:
    """Require that a dead node is detected within 2 to 10 s; Ray's default is half a minute."""
    assert set(found) == {
        f"RAY_health_check_{what}"
        for what in ("initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold")
    }  # fmt: skip
    timeout_ms = int(found["RAY_health_check_period_ms"]) * int(found["RAY_health_check_failure_threshold"])
    assert 2000 <= timeout_ms <= 10000


def _cluster_key(cluster: dict[str, Any]) -> None:
    cluster["idle_minutes"] = 5


def _cluster_type_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["cpu"]["minworkers"] = 1


def _cluster_bounds(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["cpu"]["min_workers"] = 9


def _cluster_total(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["cpu"]["max_workers"] = 99


def _cluster_type(cluster: dict[str, Any]) -> None:
    cluster["max_workers"] = "many"


def _cluster_head(cluster: dict[str, Any]) -> None:
    cluster["head_node_type"] = "boss"


@pytest.mark.parametrize(
    "break_it", [_cluster_key, _cluster_type_key, _cluster_bounds, _cluster_total, _cluster_type, _cluster_head], ids=lambda f: f.__name__
)  # fmt: skip
def test_an_invalid_cluster_is_refused(break_it: Callable[[dict[str, Any]], None]) -> None:
    cluster = load("jobs/ray_cluster.yaml")
    break_it(cluster)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check_cluster(cluster)


# --- KubeRay

SCHEMAS = json.loads(kuberay_schema.FILE.read_text())


def check_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the autoscaler's config of a manifest's cluster. Raises ValueError or ValidationError."""
    kind = manifest["kind"]
    jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(manifest)
    if manifest["apiVersion"] != "ray.io/v1":
        raise ValueError("apiVersion")
    cluster = manifest["spec"][CLUSTER[kind]]
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            raise ValueError(f"{group['groupName']}: replicas outside of minReplicas and maxReplicas")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            if loose := {mount["name"] for mount in container["volumeMounts"]} - volumes:
                raise ValueError(f"mounts of volumes that do not exist: {loose}")
            for probe in ("readinessProbe", "livenessProbe"):
                port = container[probe]["httpGet"]["port"]
                if port not in {52365} | {p["containerPort"] for p in container["ports"]}:
                    raise ValueError(f"{probe}: nothing listens on {port}")
    found = {"metadata": {"name": manifest["metadata"]["name"], "namespace": "default"}, "spec": cluster}
    return _derive_autoscaling_config_from_ray_cr(found)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_kuberay_and_ray_accept_a_manifest(kind: str) -> None:
    manifest = load(MANIFESTS[kind], kind)
    scaled = check_manifest(manifest)
    cluster = manifest["spec"][CLUSTER[kind]]
    assert scaled["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    cpu = scaled["available_node_types"]["cpu"]
    assert cpu["max_workers"] > cpu["min_workers"] and cpu["labels"] == {"raymoe/role": "cpu"}
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {
        "mode": "token",
        "secretName": "raymoe-token",
    }
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert_health({e["name"]: e["value"] for e in head["env"] if "health_check" in e["name"]})
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == last("USER")
        assert {"name": "runs", "persistentVolumeClaim": {"claimName": "raymoe"}} in pod["volumes"]
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            assert container["resources"]["requests"] == container["resources"]["limits"]  # none is evicted first
            home = next(e["value"] for e in container["env"] if e["name"] == "RAYMOE_HOME")
            assert {"name": "runs", "mountPath": home} in container["volumeMounts"]
            assert f"RAYMOE_HOME={home}" in dockerfile()
    if kind == "RayJob":
        gpu = scaled["available_node_types"]["gpu"]
        assert gpu["resources"]["GPU"] == 1 and gpu["min_workers"] == 0


def pinned(package: str) -> str:
    lock = tomllib.loads((REPO_ROOT / "uv.lock").read_text())
    return next(p["version"] for p in lock["package"] if p["name"] == package)


def _workers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["spec"][CLUSTER[manifest["kind"]]]["workerGroupSpecs"]


def _key(manifest: dict[str, Any]) -> None:
    manifest["spec"]["shutdownAfterFinish"] = True


def _group_key(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["maxReplica"] = 3


def _container_key(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["template"]["spec"]["containers"][0]["enviroment"] = []


def _type(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["maxReplicas"] = "8"


def _bounds(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["minReplicas"] = 9


def _without_most(manifest: dict[str, Any]) -> None:
    del _workers(manifest)[0]["maxReplicas"]


def _mount(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["template"]["spec"]["volumes"].pop(0)


def _probe(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"] = 9999


def _number_in_env(manifest: dict[str, Any]) -> None:
    _workers(manifest)[0]["template"]["spec"]["containers"][0]["env"].append({"name": "X", "value": 1})


@pytest.mark.parametrize("kind", MANIFESTS)
@pytest.mark.parametrize(
    "break_it", [_key, _group_key, _container_key, _type, _bounds, _without_most, _mount, _probe, _number_in_env],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_an_invalid_manifest_is_refused(kind: str, break_it: Callable[[dict[str, Any]], None]) -> None:
    manifest = yaml.safe_load(yaml.safe_dump(load(MANIFESTS[kind], kind), default_flow_style=False))
    break_it(manifest)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check_manifest(manifest)


def test_all_pods_can_write_the_volume() -> None:
    volume = load("jobs/rayjob.yaml", "PersistentVolumeClaim")
    assert volume["metadata"]["name"] == "raymoe" and volume["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_image_can_run_the_command_of_the_job() -> None:
    words = shlex.split(load("jobs/rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    path = Path(words[1])
    assert words[0] == "python" and path.is_relative_to(last("WORKDIR"))
    job = REPO_ROOT / path.relative_to(last("WORKDIR"))
    assert job.is_file() and in_context(str(job.relative_to(REPO_ROOT)))
    arguments = parser().parse_args(words[2:])
    config = override(preset(arguments.preset), arguments.overrides)
    assert config.train.elastic
    most = sum(g["maxReplicas"] for g in _workers(load("jobs/rayjob.yaml", "RayJob")) if g["groupName"] == "cpu")
    assert config.train.max_workers <= most * 2  # pods of 2 CPUs


def test_the_service_has_the_serve_config() -> None:
    ours = load("services/raymoe.yaml")
    theirs = yaml.safe_load(load(MANIFESTS["RayService"], "RayService")["spec"]["serveConfigV2"])
    for config in (ours, theirs):
        ServeDeploySchema(**copy.deepcopy(config))
        from_dict(config["applications"][0]["args"])
    expected = copy.deepcopy(ours)
    expected["proxy_location"], expected["http_options"]["host"] = "EveryNode", "0.0.0.0"
    expected["applications"][0]["args"] |= {"host": "node", "cpus": 1}
    assert theirs == expected


# --- the image


def dockerfile() -> str:
    return re.sub(r"\\\n\s*", "", (REPO_ROOT / "Dockerfile").read_text())


def last(instruction: str) -> str:
    return re.findall(rf"^{instruction} (.+)$", dockerfile(), re.MULTILINE)[-1]


def in_context(path: str) -> bool:
    """Return whether .dockerignore lets the path through: the last line that matches it or its folder decides."""
    inside = True
    for line in (REPO_ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#"):
            parts = Path(path).parts
            whole = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            if any(fnmatch.fnmatch(p, pattern) for p in (parts if "**/" in line else whole)):
                inside = line.startswith("!")
    return inside


def test_the_image_copies_the_files_that_it_needs() -> None:
    for line in re.findall(r"^COPY (.+)$", dockerfile(), re.MULTILINE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (REPO_ROOT / source).exists(), source
            assert source == "." or in_context(source), source
    for path in ("jobs/train.py", "raymoe/model/router.py", "services/raymoe.yaml"):
        assert in_context(path), path
    for path in (".venv/bin/python", ".git/config", ".tools/bin/uv", "tests/conftest.py", "raymoe/__pycache__/x.pyc"):
        assert not in_context(path), path


def test_the_image_is_set_up_like_a_checkout_and_does_not_run_as_root() -> None:
    text = dockerfile()
    makefile = (REPO_ROOT / "Makefile").read_text()
    assert "RUN make setup TORCH=${TORCH}" in text and "ARG TORCH=lock" in text and "ifeq ($(TORCH),cpu)" in makefile
    needed = re.search(r"^\.venv/\.ready: (.+?) \.tools", makefile, re.MULTILINE)
    assert needed
    before = text[: text.index("RUN make setup")]
    assert all(name in before for name in (*needed[1].split(), "Makefile", "README.md"))
    assert re.search(r"install .*\bgcc\b.*\bmake\b", text)
    assert last("USER") not in ("root", "0") and f"--uid {last('USER')} " in text
    assert text.index("\nUSER") < text.index("RUN make setup")
    assert f"PATH={last('WORKDIR')}/.venv/bin:$PATH" in text
    python = re.search(r"^FROM python:(\d+)\.(\d+)-slim$", text, re.MULTILINE)
    assert python and (int(python[1]), int(python[2])) >= (3, 11)
    assert VERSION in text
    command = re.findall(r'"([^"]+)"', last("CMD"))
    assert command[0] == "python" and (REPO_ROOT / command[1]).is_file() and in_context(command[1])
