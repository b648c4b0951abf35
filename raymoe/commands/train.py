"""Train a language model with clustered experts on Ray.

    python jobs/train.py small data.path=wikitext-103 train.workers=2
    ray job submit --working-dir . -- python jobs/train.py small run.name=first train.workers=2,8
    python jobs/train.py small train.resume=first train.workers=4

The run leaves config.json, metrics.jsonl, checkpoints/ and report.html under run.root/NAME. Without a
running Ray a local one is started. Ctrl-C, SIGTERM and `ray job stop` make the workers checkpoint at
the next step and leave; continue with train.resume=NAME. Exit status: 0 done, 1 failed, 2 refused
before it began, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import signal
import sys

from raymoe.config import PRESETS, describe, preset


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        description=__doc__,
        epilog="Overrides and their values in the preset `small`:\n\n" + describe(preset("small")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("preset", metavar="PRESET", choices=PRESETS, help=", ".join(PRESETS))
    parse.add_argument(
        "overrides", metavar="section.field=value", nargs="*", help="changes to the preset, listed below"
    )
    return parse


def main() -> int:
    arguments = parser().parse_args()
    # resolve imports neither torch nor Ray, so that a bad key fails within a second.
    from raymoe.training.resolve import resolve

    try:
        config = resolve(preset(arguments.preset), arguments.overrides)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    from raymoe.training.launch import TooManyFailures, connect, launch

    try:
        connect(config)
        run, stopped_by = launch(config)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except TooManyFailures as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    print(f"run     {run}\nreport  {run / 'report.html'}\nmetrics {run / 'metrics.jsonl'}")
    if stopped_by:
        print(f"stopped by {signal.Signals(stopped_by).name}; continue with: train.resume={config.run.name}")
        return 128 + stopped_by
    print(f"next    python jobs/export.py {config.run.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
