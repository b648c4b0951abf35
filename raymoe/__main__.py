"""The command line `raymoe COMMAND`, also as `python -m raymoe COMMAND`.

raymoe train tiny run.name=first
raymoe export first
raymoe generate first "Once upon a time"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import raymoe
from raymoe.commands.entry import new_parser
from raymoe.config import hint

COMMANDS = {
    "train": "train a model, or resume a run",
    "experiment": "run variants with seeds side by side, from a YAML file",
    "compare": "compare runs: a table with intervals over seeds, and a page",
    "export": "write a run as an artifact: FP16 bases, INT4 residuals",
    "evaluate": "measure perplexity and load of a run or an artifact on any text",
    "finetune": "fine-tune runs or artifacts on a GLUE task and compare their scores",
    "generate": "complete prompts with an artifact in this process",
    "serve": "serve an artifact on Ray Serve, or update the one that is served",
    "load": "measure an OpenAI-compatible endpoint under a steady load",
    "doctor": "check the nodes of a Ray cluster before a long run",
    "demo": "run the whole path on this machine: train, export, evaluate, serve",
}
"""Name of each command -> its summary in `raymoe --help`."""

EXIT_STATUS = """\
exit status:
  0    the command completed
  1    the command failed after it had started
  2    refused before the start: a bad argument, config, file or address
  130  stopped by Ctrl-C (SIGINT); a run writes a checkpoint first
  143  stopped by SIGTERM; a run writes a checkpoint first

`raymoe COMMAND --help` has the details and examples of a command."""


def entry_point(command: str) -> Callable[[Sequence[str], str], int]:
    """Return the `main` of a command. Only the module of this command is imported."""
    match command:
        case "train":
            from raymoe.commands.train import main
        case "experiment":
            from raymoe.commands.experiment import main
        case "compare":
            from raymoe.commands.compare import main
        case "export":
            from raymoe.commands.export import main
        case "evaluate":
            from raymoe.commands.evaluate import main
        case "finetune":
            from raymoe.commands.finetune import main
        case "generate":
            from raymoe.commands.generate import main
        case "serve":
            from raymoe.commands.serve import main
        case "load":
            from raymoe.commands.load import main
        case "doctor":
            from raymoe.commands.doctor import main
        case "demo":
            from raymoe.commands.demo import main
        case _:
            raise ValueError(f"unknown command {command!r}{hint(command, COMMANDS)}: one of {', '.join(COMMANDS)}")
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: those of this process) and return its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parse = new_parser("Train, export and serve Mixture-of-Experts language models with clustered experts.", "raymoe")
    parse.usage = "raymoe COMMAND [ARGUMENTS]"
    parse.epilog = "commands:\n" + "".join(f"  {name:12}{text}\n" for name, text in COMMANDS.items())
    parse.epilog += "\n" + EXIT_STATUS
    parse.add_argument("--version", action="version", version=f"raymoe {raymoe.__version__}")
    if not words or words[0].startswith("-"):
        parse.parse_args(words)
        parse.print_help(sys.stderr)
        return 2
    try:
        run = entry_point(words[0])
    except ValueError as error:
        parse.error(str(error))
    try:
        return run(words[1:], f"raymoe {words[0]}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
