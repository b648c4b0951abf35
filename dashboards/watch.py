"""Run Prometheus for the runs and applications under a run root: `python dashboards/watch.py`, or `make watch`.

Uses `prometheus` and `promtool` on PATH, or in `.tools/prometheus` (see `install_prometheus.py`). Updates links to the
scrape targets of runs and applications until it is interrupted. The collected data stays in `run.root/.prometheus`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from raymoe.config import default_root

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / ".tools" / "prometheus" / "usr" / "bin"
PROGRAMS = ("prometheus", "promtool")
RAY_TARGETS = "prom_metrics_service_discovery.json"
"""File in Ray's --temp-dir that lists its scrape targets."""
LINK_INTERVAL_S = 5.0


def programs(tools: Path = TOOLS) -> tuple[Path, Path]:
    """Return the paths of prometheus and promtool. Raises FileNotFoundError with the command that installs them."""
    for path in (os.environ.get("PATH"), str(tools)):
        found = [shutil.which(name, path=path) for name in PROGRAMS]
        if found[0] and found[1]:
            return Path(found[0]), Path(found[1])
    raise FileNotFoundError(
        f"prometheus and promtool are neither on PATH nor in {tools}: "
        "run `python dashboards/install_prometheus.py` (Debian or Ubuntu, without root), "
        "or install Prometheus from https://prometheus.io/download"
    )


def link(root: Path, folder: Path) -> None:
    """Update `folder` to have a link to the target list of each run and application of `root`, and no other files."""
    files = {f"{file.parent.name}.json": file for file in root.glob("*/prometheus_targets.json")}
    files |= {f"serving-{file.parent.name}.json": file for file in root.glob("serving/*/prometheus_targets.json")}
    _link(folder, files)


def link_ray(folder: Path) -> None:
    """Update `folder` to have a link to the target list of each Ray on this machine: Ray's own, and raymoe's heads."""
    places = {Path(place).resolve() for place in ("/tmp", tempfile.gettempdir(), os.environ.get("RAY_TMPDIR", "/tmp"))}
    lists = [file for place in places for pattern in ("ray", "raymoe-ray-*/ray", "raymoe-head-*") for file in place.glob(f"{pattern}/{RAY_TARGETS}")]  # fmt: skip
    _link(folder, {f"{'-'.join(file.parent.parts[1:])}.json": file for file in lists})


def _link(folder: Path, files: dict[str, Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in files:
            old.unlink()
    for name, file in files.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(file.resolve())


def configure(folder: Path, root: Path, ray: Path | None, every: str | None = None) -> Path:
    """Write the shipped config for `root` to `folder`, with the links. Returns the path of the config.

    ray: target list of one Ray; None for all Rays on this machine. every: scrape interval, by default the shipped one.
    """
    config = yaml.safe_load((HERE / "prometheus.yml").read_text())
    config["rule_files"] = [str(HERE / name) for name in config["rule_files"]]
    own, rays = config["scrape_configs"]
    rays["file_sd_configs"][0]["files"] = [str(ray or "rays/*.json")]
    if every:
        config["global"] = {"scrape_interval": every, "evaluation_interval": every, "scrape_timeout": every}
        own["file_sd_configs"][0]["refresh_interval"] = rays["file_sd_configs"][0]["refresh_interval"] = every
    link(root, folder / "targets")
    if ray is None:
        link_ray(folder / "rays")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "prometheus.yml"


def start(prometheus: Path, config: Path, port: int, log: int | None = None) -> subprocess.Popen[bytes]:
    """Start Prometheus on the loopback address, with its data beside its config."""
    command = [
        prometheus, f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=log, stderr=log)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--root", type=Path, default=Path(default_root()), help="run.root (default: $RAYMOE_HOME or ~/raymoe)")  # fmt: skip
    parse.add_argument("--port", type=int, default=9090, help="port of Prometheus (default: %(default)s)")
    parse.add_argument("--ray", type=Path, help=f"{RAY_TARGETS} of a Ray, in its --temp-dir (default: of all Rays on this machine)")  # fmt: skip
    parse.add_argument("--interval", metavar="DURATION", help="scrape interval, for example 3s (default: that of prometheus.yml)")  # fmt: skip
    arguments = parse.parse_args()
    root = arguments.root.expanduser().resolve()
    try:
        prometheus, _ = programs()
    except FileNotFoundError as error:
        sys.exit(f"watch.py: {error}")
    folder = root / ".prometheus"
    config = configure(folder, root, arguments.ray, arguments.interval)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = start(prometheus, config, arguments.port)
    print(
        f"Prometheus: http://127.0.0.1:{arguments.port} for {root}; alerts at /alerts. Press Ctrl-C to stop it.\n"
        "Grafana: this command starts it with the dashboards and this data source"
        f"{'' if arguments.port == 9090 else f' (set port {arguments.port} in {HERE}/provisioning first)'}:\n"
        f"  RAYMOE_DASHBOARDS={HERE} GF_PATHS_PROVISIONING={HERE / 'provisioning'} grafana server",
        flush=True,
    )
    try:
        while process.poll() is None:
            link(root, folder / "targets")
            if arguments.ray is None:
                link_ray(folder / "rays")
            try:
                process.wait(timeout=LINK_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue
    except KeyboardInterrupt:
        pass
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
