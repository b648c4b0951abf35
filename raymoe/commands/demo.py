"""Run the whole path on this machine: train, kill a worker, regroup, compare, export, evaluate, serve, and load.

    raymoe demo [--root FOLDER] [--steps N]

Starts a Ray head of its own on free ports and ends it at the end; needs no download and no account, and takes about
7 minutes on 2 cores. Submits jobs as a user does: a run with 2 workers that regroups its experts and whose worker
is killed, then four models on the same tokens with 2 seeds each, the export and its evaluation. Serves the export
with Ray Serve and sends it a skewed load, so that each cluster scales its own replicas.

Exit status: 0 success, 1 a stage failed (its log is named), 2 invalid arguments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from raymoe.commands.entry import new_parser
from raymoe.config import default_root, preset


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    steps = preset("tiny").train.steps
    parse.add_argument("--root", help="folder of runs and exports (default: $RAYMOE_HOME, else ~/raymoe)")
    parse.add_argument("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    from raymoe.commands.demo_stages import StageFailed, run_stages

    try:
        run_stages(str(Path(arguments.root or default_root()).expanduser().resolve()), arguments.steps)
    except (StageFailed, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
