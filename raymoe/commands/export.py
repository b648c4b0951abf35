"""Export a run as an artifact: one folder with INT4 experts and the rest in FP16, for evaluation and serving.

    raymoe export first
    raymoe export first --step 800 --to /models/first

Prints the seconds of each stage, then two tables: the size of the model in four forms (MB on disk), and its
quality as trained, as exported, and with residuals or private experts set to zero if bases remain (perplexity per
token, bits per byte). The flat model of the sizes has as many experts, of the same width. The same numbers are in
the `metrics` of manifest.json. The exported file itself is evaluated.

Cluster ids are aligned across layers. The folder is renamed to its final name when it is complete; a failed
export leaves no folder. Exit status: 0 done, 2 refused (unknown run, corrupt checkpoint, existing target,
full disk).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raymoe.commands.entry import new_parser, sibling
from raymoe.config import default_root


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("name", metavar="NAME", help="name of the run")
    parse.add_argument("--root", default=default_root(), help="folder of runs and exports (default: %(default)s)")
    parse.add_argument("--step", type=int, help="export the checkpoint of this step (default: the newest valid one)")
    parse.add_argument("--to", type=Path, help="folder of the artifact (default: ROOT/exports/NAME)")
    parse.add_argument(
        "--tokens", type=int, default=200_000, help="validation tokens to evaluate on (default: %(default)s)"
    )
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    import torch

    from raymoe.commands.stages import StageLines
    from raymoe.export.export import export, table

    torch.set_num_threads(arguments.threads)
    try:
        done = export(
            arguments.root, arguments.name, step=arguments.step, target=arguments.to, tokens=arguments.tokens,
            progress=StageLines(),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 2
    for reason in done.skipped:
        print(f"skipped checkpoint: {reason}", file=sys.stderr)
    print(table(done.metrics))
    print(f"\nartifact {done.target} (run {done.source.name}, step {done.source.step})")
    print(f"next     {sibling(parse.prog, 'evaluate')} {done.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
