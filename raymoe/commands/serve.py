"""Serve an artifact on Ray Serve, or replace the served one without failed requests.

    raymoe serve                        the newest export
    raymoe serve first --config my.yaml
    raymoe serve second                 replaces the first when it is ready

Needs a Ray cluster with a dashboard, or --start, which starts one on this machine. Ray and the application keep running
after the command. `serve status` and `serve shutdown` are Ray Serve's own commands for them.

A replacement starts next to the old application. When it is ready, the route switches to it, the old application
completes its requests and is removed. A failure before the switch changes nothing.

Without --config the application has the settings of services/raymoe.yaml. Exit status: 0 serving, 1 the application
did not start, 2 refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymoe.commands.entry import new_parser, refuse

LARGEST_SERVE_CONFIG = 1 << 20
"""Maximum size in bytes of a Serve config. The rest of a larger file is not read."""


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument(
        "artifact", nargs="?", help="name of an exported run, or folder of an artifact (default: the config's)"
    )
    parse.add_argument("--config", type=Path, metavar="FILE", help="Serve config with one application, as YAML")
    parse.add_argument(
        "--root", help="folder of runs and exports (default: the config's, else $RAYMOE_HOME or ~/raymoe)"
    )
    parse.add_argument(
        "--address",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265"),
        help="address of Ray's dashboard (default: %(default)s)",
    )
    parse.add_argument("--start", action="store_true", help="start a Ray head if no Ray answers at the address")
    parse.add_argument("--timeout", type=float, default=300, help="seconds per step (default: %(default)s)")
    return parse


def read_serve_config(path: Path | None) -> dict[str, Any]:
    """Return the Serve config in a YAML file, or the default one. Raises ValueError or OSError."""
    import yaml

    from raymoe.serving.default_config import default_config

    if path is None:
        return default_config()
    try:
        with path.open("rb") as file:
            return yaml.safe_load(file.read(LARGEST_SERVE_CONFIG))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    from raymoe.serving.rollout import Rollout, pinned

    try:
        config = pinned(read_serve_config(arguments.config), arguments.artifact, arguments.root)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    from raymoe.ops import local_head

    try:
        if arguments.start and local_head.start(arguments.address):
            print(f"started a Ray head with the dashboard {arguments.address}; `make stop` stops it", flush=True)
        rollout = Rollout(arguments.address, config, arguments.timeout)
        rollout.up()
    except (RuntimeError, ConnectionError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 1
    args = rollout.application["args"]
    print(f"model   {args['name']} ({args['artifact']})\napi     {rollout.base}/v1 (application {rollout.name})")
    print("stop    make stop, or: serve shutdown (the Ray head keeps running)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
