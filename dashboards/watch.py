"""Prometheus over the runs and applications under a run root: `python dashboards/watch.py`, or `make watch`.

Takes the program from PATH, else Debian's package, unpacked into `.tools/` without installing it. Keeps links to what
is to be scraped, and runs until it is interrupted. What was seen stays under `run.root/.prometheus`.
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
CACHE = HERE.parent / ".tools" / "prometheus"
PROGRAMS = ("prometheus", "promtool")
RAYS_LIST = "prom_metrics_service_discovery.json"
"""What Ray lists for Prometheus, in its --temp-dir."""
LINK_EVERY_S = 5.0


def programs(cache: Path = CACHE) -> tuple[Path, Path]:
    """Paths of prometheus and promtool. Raises FileNotFoundError where there is no way to have them.

    Raises subprocess.CalledProcessError if apt-get is there and could not download them.
    """
    installed = [shutil.which(name) for name in PROGRAMS]
    if all(installed):
        return Path(str(installed[0])), Path(str(installed[1]))
    unpacked = cache / "usr" / "bin"
    if not all((unpacked / name).is_file() for name in PROGRAMS):
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise FileNotFoundError("there is neither a prometheus on PATH nor an apt-get to download Debian's with")
        download(cache)
    return unpacked / PROGRAMS[0], unpacked / PROGRAMS[1]


def download(cache: Path) -> None:
    """Debian's package, unpacked into `cache`: nothing is installed, and root is not needed."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        get = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
        if _run([*get, "download", "prometheus"], folder, check=False):
            own = Path(folder, "apt")  # the machine's lists are missing or old: fetch some beside them
            for name in ("lists/partial", "cache/archives/partial"):
                (own / name).mkdir(parents=True)
            get += ["-o", f"Dir::State::lists={own}/lists", "-o", f"Dir::Cache={own}/cache"]
            _run([*get, "update"], folder)
            _run([*get, "download", "prometheus"], folder)
        (package,) = Path(folder).glob("prometheus_*.deb")
        whole = Path(folder, "whole")
        _run(["dpkg", "-x", str(package), str(whole)], folder)
        try:
            whole.rename(cache)
        except OSError:
            if not (cache / "usr" / "bin" / PROGRAMS[1]).is_file():  # no other process was faster
                raise


def _run(command: list[str], folder: str, check: bool = True) -> int:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=300)  # fmt: skip
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.returncode


def link(root: Path, folder: Path) -> None:
    """Make `folder` hold a link for each run and application of `root` that lists what to scrape, and no others."""
    files = {f"{file.parent.name}.json": file for file in root.glob("*/prometheus_targets.json")}
    files |= {f"serving-{file.parent.name}.json": file for file in root.glob("serving/*/prometheus_targets.json")}
    _link(folder, files)


def link_rays(folder: Path) -> None:
    """The same of what each Ray on this machine lists: in its own temporary folder, and in those of raymoe's heads."""
    places = {Path(place).resolve() for place in ("/tmp", tempfile.gettempdir(), os.environ.get("RAY_TMPDIR", "/tmp"))}
    lists = [file for place in places for pattern in ("ray", "raymoe-ray-*/ray") for file in place.glob(f"{pattern}/{RAYS_LIST}")]  # fmt: skip
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
    """Write into `folder` the shipped config for `root`, with the links; returns its path.

    ray: Ray's list of what to scrape, or None for those of all Rays on this machine. every: how often, where not as
    shipped.
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
        link_rays(folder / "rays")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "prometheus.yml"


def start(prometheus: Path, config: Path, port: int, log: int | None = None) -> subprocess.Popen[bytes]:
    """Prometheus with its data beside its config, on this machine only."""
    command = [
        prometheus, f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=log, stderr=log)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--root", type=Path, default=Path(default_root()), help="run.root (default: $RAYMOE_HOME or ~/raymoe)")  # fmt: skip
    parse.add_argument("--port", type=int, default=9090)
    parse.add_argument("--ray", type=Path, help=f"a Ray's {RAYS_LIST}, in its --temp-dir (default: those of all Rays on this machine)")  # fmt: skip
    arguments = parse.parse_args()
    root = arguments.root.expanduser().resolve()
    try:
        prometheus, _ = programs()
    except FileNotFoundError as error:
        sys.exit(f"{error}: install Prometheus (https://prometheus.io/download), then try again")
    folder = root / ".prometheus"
    config = configure(folder, root, arguments.ray)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = start(prometheus, config, arguments.port)
    print(
        f"Prometheus: http://127.0.0.1:{arguments.port}, over {root}; alerts at /alerts. Ctrl-C ends it.\n"
        "Grafana: start it with these in its environment, and it has the dashboards and this data source"
        f"{'' if arguments.port == 9090 else f' (once its port in {HERE}/provisioning is {arguments.port})'}:\n"
        f"  RAYMOE_DASHBOARDS={HERE} GF_PATHS_PROVISIONING={HERE / 'provisioning'} grafana server",
        flush=True,
    )
    try:
        while process.poll() is None:
            link(root, folder / "targets")
            if arguments.ray is None:
                link_rays(folder / "rays")
            try:
                process.wait(timeout=LINK_EVERY_S)
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
