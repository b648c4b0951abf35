"""Run an experiment: a set of runs from a YAML file, side by side on Ray, with a table and a page of their results.

    raymoe experiment opponents
    raymoe experiment my.yaml --cores 8 --json results.json
    raymoe experiment opponents --set train.steps=20 --name try

NAME is a file in jobs/experiments, or the path of a YAML file. Its parts are described in
raymoe/commands/runs/definition_file.py. Each run is one process, and an ordinary run in RUN_ROOT/experiments/NAME.
The same command again skips finished runs and resumes the others from their newest checkpoints. SIGINT, SIGTERM and
SIGHUP make the runs write a checkpoint and stop. results.json and page.html in that folder have the results.

Exit status: 0 completed, 1 a run failed, 2 refused before the start, 130 or 143 stopped by SIGINT or SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from raymoe.commands.entry import check_folder, new_parser, refuse
from raymoe.commands.runs.definition_file import find_file, read_experiment


def parser(program: str | None = None) -> ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("experiment", metavar="NAME", help="a file in jobs/experiments, or the path of a YAML file")
    parse.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override of all runs, applied last, for example train.steps=20; may be repeated",
    )  # fmt: skip
    parse.add_argument("--name", default="", help="name of the results' folder (default: that of the experiment)")
    parse.add_argument("--cores", type=int, metavar="N", help="cores that the runs use together (default: all of Ray)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    # Neither torch nor Ray is imported before the checks: a bad field is refused within a second.
    try:
        if arguments.cores is not None and arguments.cores < 1:
            raise ValueError(f"--cores {arguments.cores} is not allowed: 1 or more")
        check_folder("--json", arguments.json)
        experiment = read_experiment(find_file(arguments.experiment), arguments.overrides, arguments.name)
        from raymoe.training.resolve import check_root

        check_root(experiment.common.run.root, Path.cwd(), os.environ)
        from raymoe.data.sources import check_source

        check_source(experiment.common.data)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    from raymoe.commands.runs.stages import Session

    try:
        with Session(experiment, arguments.cores) as session:
            stopped_by = session.run()
            session.write(arguments.json)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    print(session.conclusion())
    if stopped_by:
        print(f"stopped by {signal.Signals(stopped_by).name}; the same command continues", flush=True)
        return 128 + stopped_by
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
