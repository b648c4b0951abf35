"""Kill, freeze, starve and damage what raymoe consists of, at random moments, and say what each fault cost.

    python jobs/chaos serve first                  16 streams, 10 kills in 3 minutes, then the control plane
    python jobs/chaos serve first --kills 3 --seconds 40 --no-control-plane
    python jobs/chaos train                        50 faults on a training run of 2 workers
    python jobs/chaos train --faults 8 --seed 1

Each starts a Ray head of its own. `serve` serves an export with two trunks, two replicas of every cluster and nothing
resident, and ends replicas with SIGKILL, drawn by --seed: clusters, trunks, and once all replicas of one cluster.
Clients do not retry. Every answer is compared with the undisturbed one. Then Serve's controller and its proxy are
killed, each once. `train` trains `tiny` with live regrouping and kills or freezes workers, the clusterer, Ray Train's
controller, the driver and the head, takes the checkpoints' folder away and damages checkpoints; each step must stand in the run's record
once in the end, and nothing that was acknowledged may be lost. Exit status: 0 all was survived (requests behind a
killed proxy do not count), 1 not all, 2 refused.
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
    serve.add_argument("artifact", help="the export of a run, or an artifact's folder")
    serve.add_argument("--root", default=default_root(), help="where exports live (default: %(default)s)")
    serve.add_argument("--streams", type=int, default=16, help="requests at a time (default: %(default)s)")
    serve.add_argument("--kills", type=int, default=10, help="default: %(default)s")
    serve.add_argument("--seconds", type=float, default=180.0, help="of load (default: %(default)s)")
    serve.add_argument("--control-plane", action=argparse.BooleanOptionalAction, default=True, help="also kill these")
    train = what.add_parser("train", help="a training run")
    train.add_argument("--faults", type=int, default=50, help="default: %(default)s")
    train.add_argument("--workers", default="2", help="of the run (default: %(default)s)")
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
