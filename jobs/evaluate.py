"""Perplexity, load, speed and memory of a run or an artifact on any text.

    python jobs/evaluate.py first                                 the run's own validation set
    python jobs/evaluate.py first --data wikitext-103 --json out.json
    python jobs/evaluate.py ~/raymoe/exports/first --residuals zero

A run is evaluated at its newest valid checkpoint with full residuals, an artifact with INT4 residuals.
Every token of the text is predicted once: windows of --context tokens, every --stride tokens, the last
partial one included; the first token of each domain is predicted from <|endoftext|>. Word perplexity is
exp(NLL / words), where a line end counts as a word. Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from raymoe.config import default_root


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("name", metavar="NAME_OR_ARTIFACT", help="a run, the export of a run, or an artifact's folder")
    parse.add_argument("--root", default=default_root(), help="where runs and exports live (default: %(default)s)")
    parse.add_argument("--data", help="any data.path; all of it is read (default: the validation set it was trained with)")
    parse.add_argument("--text-field", default="text", help="column of the text (default: %(default)s)")
    parse.add_argument("--step", type=int, help="evaluate the checkpoint of this step (default: the newest valid)")
    parse.add_argument("--residuals", choices=["full", "int4", "zero"], help="an artifact's residuals (default: int4)")
    parse.add_argument("--context", type=int, help="tokens in a window (default: the training context)")
    parse.add_argument("--stride", type=int, help="tokens between windows (default: the context, no overlap)")
    parse.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parse.add_argument("--batch", type=int, default=16, help="windows at a time (default: %(default)s)")
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parse.add_argument("--json", type=Path, help="write the result to this file")
    return parse


def main() -> int:
    arguments = parser().parse_args()
    import torch

    from raymoe.data import Text
    from raymoe.storage.measure import measure
    from raymoe.storage.runs import open_any

    torch.set_num_threads(arguments.threads)
    try:
        stored, skipped = open_any(arguments.root, arguments.name, arguments.step)
        for reason in skipped:
            print(f"passed over: {reason}", file=sys.stderr)
        text = stored.text(arguments.data, arguments.text_field)
        model = stored.model(arguments.residuals)
        result = measure(
            model, text, workers=stored.config.train.workers, context=arguments.context, stride=arguments.stride,
            batch=arguments.batch, precision=arguments.precision, progress=sys.stderr.isatty(),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    result = {"model": str(stored.folder), "version": stored.version, "data": arguments.data or "validation", **result}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.json.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
