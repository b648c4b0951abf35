"""Complete prompts with an artifact in this process: what the server computes, without a server.

    raymoe generate first "Once upon a time" --max-tokens 64
    raymoe generate first "def main" "The license" --temperature 0

All prompts advance together, one token per step. With one prompt the text is printed as it is generated; with several,
when all are complete. Exit status: 0 completed, 2 refused (unknown artifact, invalid option, prompt beyond the context).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from raymoe.commands.entry import new_parser, refuse
from raymoe.config import default_root


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("name", metavar="NAME_OR_ARTIFACT", help="name of an exported run, or folder of an artifact")
    parse.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to complete")
    parse.add_argument("--root", default=default_root(), help="folder of runs and exports (default: %(default)s)")
    parse.add_argument("--max-tokens", type=int, default=64, help="tokens per completion (default: %(default)s)")
    parse.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parse.add_argument(
        "--top-p", type=float, default=0.95,
        help="sample from the likeliest tokens that have this probability together (default: %(default)s)",
    )  # fmt: skip
    parse.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parse.add_argument("--stop", action="append", default=[], help="text that ends a completion; repeatable")
    parse.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    import torch

    from raymoe.serving.local_model import LocalModel
    from raymoe.storage.artifact import Artifact
    from raymoe.storage.run_folder import find_artifact

    torch.set_num_threads(arguments.threads)
    texts = list(arguments.prompts)
    try:
        model = LocalModel(Artifact.open(find_artifact(arguments.root, arguments.name)), arguments.precision)
        pieces = model.stream(
            texts, max_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p,
            seed=arguments.seed, stop=arguments.stop,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    single = len(texts) == 1
    if single:
        print(texts[0], end="", flush=True)
    for index, text in pieces:
        texts[index] += text
        if single:
            print(text, end="", flush=True)
    print("" if single else "\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
