"""Export a run as an artifact: FP16 bases, INT4 residuals, one folder that evaluation and serving read.

    python jobs/export.py first
    python jobs/export.py first --step 800 --to /models/first

Prints and writes (metrics in manifest.json) what the compression saves and what it costs: parameters and
bytes of flat float16, clustered float16 and clustered FP16+INT4; perplexity with residuals in full, in
INT4 and zeroed. Cluster ids are aligned across layers by co-activation. The folder appears whole or not
at all. Exit status: 0 done, 2 refused (no such run, corrupt checkpoint, existing target, full disk).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from raymoe.config import default_root


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("name", metavar="NAME", help="the run")
    parse.add_argument("--root", default=default_root(), help="where runs and exports live (default: %(default)s)")
    parse.add_argument("--step", type=int, help="export the checkpoint of this step (default: the newest valid)")
    parse.add_argument("--to", type=Path, help="the artifact's folder (default: ROOT/exports/NAME)")
    parse.add_argument(
        "--tokens", type=int, default=200_000, help="validation tokens for the perplexities (default: %(default)s)"
    )
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    return parse


def main() -> int:
    arguments = parser().parse_args()
    import torch

    from raymoe.export.export import export, table

    torch.set_num_threads(arguments.threads)
    try:
        done = export(arguments.root, arguments.name, step=arguments.step, target=arguments.to, tokens=arguments.tokens)
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    for reason in done.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    print(table(done.metrics))
    print(f"\nartifact {done.target}\nnext     python jobs/evaluate.py {done.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
