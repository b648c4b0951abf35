"""Compare runs: a table of quality, size and cost with intervals over seeds, and a page.

    raymoe compare first second
    raymoe compare experiments/opponents/flat-seed0 experiments/opponents/flat-seed1 my-run --out page.html

RUN is the name of a run under --root, or its folder. Runs whose configs differ only in run.seed are seeds of one
variant. The first run's variant is the reference of the ratios, which are paired by seed.

Exit status: 0 completed, 2 refused.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from raymoe.commands.entry import check_folder, new_parser, refuse
from raymoe.config import default_root, expand


def parser(program: str | None = None) -> ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("runs", nargs="+", metavar="RUN", help="name of a run under --root, or its folder")
    parse.add_argument("--root", default=default_root(), metavar="FOLDER", help="folder of runs (default: %(default)s)")
    parse.add_argument("--out", type=Path, metavar="FILE.html", help="write the page there")
    parse.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    return parse


def find_run(name: str, root: str) -> Path:
    """Return the folder of a run. `name` is its folder, or its name under `root`. Raises FileNotFoundError."""
    from raymoe.storage.run_folder import RunFolder

    for folder in (expand(name), expand(root) / name):
        if RunFolder(folder).config.is_file():
            return folder.resolve()
    raise FileNotFoundError(f"run {name!r}: neither a folder with a config.json nor a run under {root}")


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    try:
        check_folder("--out", arguments.out)
        folders = list(dict.fromkeys(find_run(name, arguments.root) for name in arguments.runs))
        from raymoe.commands.runs.comparison import compared, grouped, result_table, write_page

        runs, labels = grouped(folders)
        results = compared("comparison", runs, labels, next(iter(labels)), title=", ".join(labels.values())[:80])
        if arguments.out:
            write_page(results, arguments.out)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    print(json.dumps(results, allow_nan=False) if arguments.json else result_table(results))
    if arguments.out and not arguments.json:
        print(f"page      {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
