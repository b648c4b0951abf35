"""Serve an export, or update what is being served to it without a failed request.

    raymoe serve                       the newest export, with services/raymoe.yaml
    raymoe serve first --config my.yaml
    raymoe serve second                beside the first; once it is ready requests go to it, and the first drains

Needs a running Ray with a dashboard (`make head`), or starts one that stays, with --start; what serves stays too. An
update starts a new application beside the old one, switches the route when it is ready, waits until the old one has
answered what it was asked, and removes it; until the switch a failure changes nothing. `serve status` and `serve
shutdown` work as always. Exit status: 0 serving, 1 it did not start, 2 refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from raymoe.commands.entry import new_parser

REPO_ROOT = Path(__file__).resolve().parents[2]


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument(
        "artifact", nargs="?", help="the export of a run, or an artifact's folder (default: the config's)"
    )
    parse.add_argument(
        "--config", type=Path, default=REPO_ROOT / "services" / "raymoe.yaml", help="default: %(default)s"
    )
    parse.add_argument("--root", help="where exports live (default: the config's, else $RAYMOE_HOME or ~/raymoe)")
    parse.add_argument(
        "--address",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265"),
        help="of Ray's dashboard (default: %(default)s)",
    )
    parse.add_argument("--start", action="store_true", help="start a Ray head, which stays, unless one answers")
    parse.add_argument(
        "--timeout", type=float, default=300, help="seconds that each step may take (default: %(default)s)"
    )
    return parse


def start_head(dashboard: str) -> None:
    """A head that stays, unless one is there. Raises RuntimeError when Ray does not start."""
    from raymoe.ops.ray_head import ENVIRONMENT, answers, authorisation

    environment = ENVIRONMENT | os.environ
    if answers(f"{dashboard}/api/version", authorisation(environment)):
        return
    url = urlsplit(dashboard)
    if url.hostname not in ("127.0.0.1", "localhost"):
        raise RuntimeError(f"no Ray answers at {dashboard}, and --start starts one on this machine alone")
    port = url.port or 8265
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--dashboard-port={port}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"no Ray answers at {dashboard}, and none starts:\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
        )
    print(f"started a Ray head, which stays: its dashboard is {dashboard}; `ray stop` ends every Ray of this machine")


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    import yaml

    from raymoe.serving.rollout import Rollout, pinned

    try:
        config = pinned(yaml.safe_load(arguments.config.read_text()), arguments.artifact, arguments.root)
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 2
    try:
        if arguments.start:
            start_head(arguments.address)
        rollout = Rollout(arguments.address, config, arguments.timeout)
        rollout.up()
    except (RuntimeError, ConnectionError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 1
    args = rollout.application["args"]
    print(f"{args['artifact']} is served as {args['name']!r} at {rollout.base}/v1 (application {rollout.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
