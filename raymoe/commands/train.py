"""Train a language model with clustered experts on Ray.

    raymoe train small data.path=wikitext-103 train.workers=2
    raymoe train --config run.yaml model.layers=6
    raymoe train train.resume=first train.workers=4
    ray job submit --working-dir . -- python jobs/train.py small run.name=first train.workers=2,8

The run joins the Ray cluster that RAY_ADDRESS or this machine provides, else starts a local Ray. It writes
config.yaml, metrics.jsonl, checkpoints/ and report.html to run.root/NAME. Ctrl-C, SIGTERM and `ray job stop` stop the
run after the current step, with a checkpoint; train.resume=NAME continues it.

A config file is YAML with the fields below: `preset: small`, then a mapping for each section. Overrides apply after
the file. The config.yaml of a run repeats it: raymoe train --config ~/raymoe/first/config.yaml.

Exit status: 0 completed, 1 failed, 2 refused before the start, 130 or 143 stopped by SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymoe.commands.entry import new_parser, refuse, sibling
from raymoe.commands.routing import most_forced_of_run
from raymoe.config import LARGEST_YAML, PRESETS, Config, describe, parse_yaml, preset


class _PresetAndOverrides(argparse.Action):
    """Split the positional words: the first is the preset unless it has an equals sign."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        words = list(values or ())
        if words and "=" not in words[0]:
            namespace.preset = words.pop(0)
            if namespace.preset not in PRESETS:
                parser.error(f"unknown preset {namespace.preset!r}: one of {', '.join(PRESETS)}")
        namespace.overrides = words


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.usage = "%(prog)s [-h] [--config FILE] [PRESET] [section.field=value ...]"
    parse.epilog = (
        "presets:\n"
        + "".join(f"  {name:8}{(make.__doc__ or '').rstrip('.')}\n" for name, make in PRESETS.items())
        + "\nfields, with their values in the preset small:\n"
        + describe(preset("small"))
    )
    parse.add_argument("--config", type=Path, metavar="FILE", help="YAML file of fields")
    parse.add_argument(
        "words", nargs="*", action=_PresetAndOverrides, metavar="PRESET, section.field=value",
        help="the preset to start from (required without --config and train.resume), and fields to change",
    )  # fmt: skip
    parse.set_defaults(preset="", overrides=[])
    return parse


def read_config_file(path: Path) -> tuple[str, list[str]]:
    """Return the preset's name and the overrides of a YAML file. Raises ValueError or OSError."""
    with path.open("rb") as file:
        content = file.read(LARGEST_YAML + 1)
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def requested(arguments: argparse.Namespace) -> tuple[Config, list[str]]:
    """Return the preset's config and all overrides: those of the file, then those of the command line.

    Raises ValueError or OSError.
    """
    name, overrides = "", list(arguments.overrides)
    if arguments.config:
        name, of_file = read_config_file(arguments.config)
        overrides = [*of_file, *overrides]
        if arguments.preset and name not in ("", arguments.preset):
            raise ValueError(f"{arguments.config} has the preset {name}, not {arguments.preset}: leave out one of them")
    name = name or arguments.preset
    if not name and not arguments.config and not any(word.startswith("train.resume=") for word in overrides):
        raise ValueError(f"a preset is missing: give one of {', '.join(PRESETS)}, or --config FILE")
    return preset(name or "small"), overrides


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_intermixed_args(words)
    # Neither torch nor Ray is imported before the checks: a bad key or a missing file fails within a second.
    from raymoe.training.resolve import resolve

    try:
        config = resolve(*requested(arguments))
        if not config.train.resume:  # a resumed run has a copy of its text, tokenized
            from raymoe.data.sources import check_source

            check_source(config.data)
        from raymoe.ops.ray_connection import current_ray, find_ray  # imports Ray, but not torch

        target = current_ray() or find_ray(os.environ)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    from raymoe.storage.run_folder import RunFolder, read_records
    from raymoe.training.launch import TooManyFailures, launch

    try:
        run, stopped_by = launch(config, target)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    except TooManyFailures as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 1
    folder = RunFolder(run)
    print(f"run     {run}\nreport  {folder.report}\nmetrics {folder.metrics}")
    if forced := most_forced_of_run(read_records(folder.metrics)):
        print(f"routing {forced}")
    if stopped_by:
        print(f"stopped by {signal.Signals(stopped_by).name}; continue with: train.resume={config.run.name}")
        return 128 + stopped_by
    print(f"next    {sibling(parse.prog, 'export')} {config.run.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
