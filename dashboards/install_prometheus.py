"""Install Prometheus to `.tools/prometheus` of the repository: `python dashboards/install_prometheus.py [FOLDER]`.

Downloads Debian's package with apt-get and unpacks it. Requires neither root nor a change of the system. On other
systems, install Prometheus from https://prometheus.io/download instead, so that it is on PATH.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = ("prometheus", "promtool")
FOLDER = Path(__file__).resolve().parents[1] / ".tools" / "prometheus"


def install(folder: Path = FOLDER) -> Path:
    """Return the folder of the programs, after a download if it does not exist.

    Raises FileNotFoundError without apt-get, and subprocess.CalledProcessError when the download fails.
    """
    programs = folder / "usr" / "bin"
    if all((programs / name).is_file() for name in PROGRAMS):
        return programs
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise FileNotFoundError("apt-get is not on PATH: install Prometheus from https://prometheus.io/download")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        unpacked = Path(work, "unpacked")
        subprocess.run(["dpkg", "-x", str(_download(Path(work))), str(unpacked)], check=True, timeout=300)
        try:
            unpacked.rename(folder)
        except OSError:
            if not (programs / PROGRAMS[1]).is_file():  # another process may have installed it meanwhile
                raise
    return programs


def _download(work: Path) -> Path:
    get = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
    if _run([*get, "download", "prometheus"], work):
        # The package lists of the machine are missing or outdated: download lists to the work folder.
        own = work / "apt"
        for name in ("lists/partial", "cache/archives/partial"):
            (own / name).mkdir(parents=True)
        get += ["-o", f"Dir::State::lists={own}/lists", "-o", f"Dir::Cache={own}/cache"]
        _run([*get, "update"], work, check=True)
        _run([*get, "download", "prometheus"], work, check=True)
    (package,) = work.glob("prometheus_*.deb")
    return package


def _run(command: list[str], folder: Path, check: bool = False) -> int:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=300
    )
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.returncode


if __name__ == "__main__":
    try:
        print(install(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"install_prometheus.py: {error}")
