"""Inject faults into a run or into a served model at random moments, and print the cost of each.

    python jobs/chaos serve first                  16 streams, 10 kills in 3 minutes, then the control plane
    python jobs/chaos serve first --kills 3 --seconds 40 --no-control-plane
    python jobs/chaos train                        50 faults in a training run of 2 workers
    python jobs/chaos train --faults 8 --seed 1

Each command starts its own Ray head. `serve` serves an export with two trunks, two replicas of each cluster and no
resident cluster, and kills replicas drawn by --seed: clusters, trunks, and once all replicas of one cluster. Clients
do not retry. Each response is compared with the response without faults. Serve's controller and proxy are then killed
once each. `train` trains `tiny` with live regrouping. It kills or freezes workers, the clusterer, Ray Train's
controller, the driver and the head, removes the checkpoints' folder, and damages checkpoints. The run must record each
step once and lose no complete checkpoint. Exit status: 0 all faults were survived (requests behind a killed proxy do
not count), 1 some were not, 2 refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from raymoe.config import default_root


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parse.add_subparsers(dest="what", required=True)
    serve = what.add_parser("serve", help="a served model under load")
    serve.add_argument("artifact", help="name of an export, or folder of an artifact")
    serve.add_argument("--root", default=default_root(), help="folder that contains the exports (default: %(default)s)")
    serve.add_argument("--streams", type=int, default=16, help="concurrent requests (default: %(default)s)")
    serve.add_argument("--kills", type=int, default=10, help="number of kills (default: %(default)s)")
    serve.add_argument(
        "--seconds", type=float, default=180.0, help="duration of the load in seconds (default: %(default)s)"
    )
    serve.add_argument(
        "--control-plane",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also kill Serve's controller and proxy",
    )
    train = what.add_parser("train", help="a training run")
    train.add_argument("--faults", type=int, default=50, help="number of faults (default: %(default)s)")
    train.add_argument("--workers", default="2", help="workers of the run (default: %(default)s)")
    for each in (serve, train):
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--json", type=Path, help="write the result to this file")
    return parse


def main() -> int:
    arguments = parser().parse_args()
    if arguments.what == "serve":
        import serve as chaos
    else:
        import train as chaos
    try:
        result = chaos.run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    chaos.show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if chaos.survived(result) else 1


if __name__ == "__main__":
    sys.exit(main())
