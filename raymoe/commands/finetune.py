"""Fine-tune runs or artifacts on a GLUE task and report dev scores by seed, with their mean and 95 % interval.

    raymoe finetune first --task sst2
    raymoe finetune first second --task cola --data glue/CoLA --json out.json
    raymoe finetune first --task mrpc --init both --seeds 3

Each model gets a linear head on the hidden state of the last token; all weights train (AdamW). Clusters keep their
experts, and the selection biases of the routers stay fixed. Scores are those after the last epoch: the dev set chooses
no epoch, and it should choose no --lr either. With several names, differences are to the first, paired by seed.

--data is a folder with train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv) as GLUE distributes them, or
the folder above. Without it the data come from the hub (nyu-mll/glue).

Each seed's result is stored under ROOT/finetune and not computed again for the same model, data and settings, also
after an interruption. Exit status: 0 done, 1 failed (the loss is not finite), 2 refused, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raymoe.commands.entry import check_folder, new_parser, refuse
from raymoe.config import default_root
from raymoe.finetune.tasks import TASKS


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument(
        "names", metavar="NAME_OR_ARTIFACT", nargs="+", help="a run, the export of a run, or an artifact's folder"
    )
    parse.add_argument("--task", choices=TASKS, required=True, help="the GLUE task: %(choices)s", metavar="TASK")
    parse.add_argument("--data", help="folder of the task's TSV files (default: nyu-mll/glue on the hub)")
    parse.add_argument("--root", default=default_root(), help="folder of runs and exports (default: %(default)s)")
    parse.add_argument(
        "--init", choices=["pretrained", "random", "both"], default="pretrained",
        help="initial weights; random: without pre-training, as a control (default: %(default)s)",
    )  # fmt: skip
    parse.add_argument("--seeds", type=int, default=5, help="fine-tune with seeds 0 to N-1 (default: %(default)s)")
    parse.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parse.add_argument("--batch", type=int, default=32, help="examples per step (default: %(default)s)")
    parse.add_argument("--lr", type=float, default=3e-4, help="peak learning rate (default: %(default)s)")
    parse.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="default: %(default)s")
    parse.add_argument(
        "--train-examples", type=int, metavar="N", help="train on N examples, the same for all seeds (default: all)"
    )
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parse.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    try:
        check_folder("--json", arguments.json)
        return _run(arguments)
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    except FloatingPointError as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: finished seeds are stored, and the same command computes the others", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from raymoe.commands.stages import StageLines
    from raymoe.config.checks import require
    from raymoe.export.open import open_any
    from raymoe.finetune.compare import finetune_model, summarize, table
    from raymoe.finetune.readers import read_task
    from raymoe.finetune.train import Settings

    names, task = arguments.names, TASKS[arguments.task]
    require(arguments.seeds >= 1, "--seeds", arguments.seeds, "at least 1")
    require(arguments.threads >= 1, "--threads", arguments.threads, "at least 1")
    require(len(set(names)) == len(names), "NAME", " ".join(names), "each model once")
    settings = Settings(
        epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr, precision=arguments.precision,
        train_examples=arguments.train_examples,
    )  # fmt: skip
    initial = ("pretrained", "random") if arguments.init == "both" else (arguments.init,)
    torch.set_num_threads(arguments.threads)
    models = []
    for name in names:
        stored, skipped = open_any(arguments.root, name)
        models.append(stored)
        for reason in skipped:
            print(f"skipped checkpoint: {reason}", file=sys.stderr)
    data = read_task(task, arguments.data)
    for reason in data.skipped:
        print(f"skipped rows: {reason}", file=sys.stderr)
    progress, rows = StageLines(), []
    for name, stored in zip(names, models, strict=True):
        rows += finetune_model(
            arguments.root, name, stored, task, data, [replace(settings, initial=kind) for kind in initial],
            range(arguments.seeds), progress=progress, warn=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    result = summarize(task, data, rows)
    print(table(task, result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.json.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
