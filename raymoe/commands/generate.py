"""Answer prompts with an exported model in this process: what serving computes, without a server.

    raymoe generate first "Once upon a time" --max-tokens 64
    raymoe generate first "def main" "The licence" --temperature 0

All prompts are answered at once, a token each a step. The text of one prompt is printed as it comes, of several
when they are done. Exit status: 0 done, 2 refused (no such artifact, a bad value, a prompt that is too long).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from raymoe.commands.entry import new_parser
from raymoe.config import default_root


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("name", metavar="NAME_OR_ARTIFACT", help="the export of a run, or an artifact's folder")
    parse.add_argument("prompts", metavar="PROMPT", nargs="+")
    parse.add_argument("--root", default=default_root(), help="where exports live (default: %(default)s)")
    parse.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parse.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest tokens (default: %(default)s)")
    parse.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parse.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    parse.add_argument("--stop", action="append", default=[], help="a text that ends an answer; may be repeated")
    parse.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    import torch

    from raymoe.serving.engine.cluster import LocalClusters
    from raymoe.serving.engine.engine import Engine
    from raymoe.serving.engine.request import Request
    from raymoe.serving.engine.sampling import Sampling
    from raymoe.serving.engine.trunk import Trunk
    from raymoe.storage.artifact import Artifact
    from raymoe.storage.run_folder import find_artifact

    torch.set_num_threads(arguments.threads)
    dtype = torch.float32 if arguments.precision == "float32" else torch.bfloat16
    try:
        artifact = Artifact.open(find_artifact(arguments.root, arguments.name))
        tokenizer = artifact.tokenizer()
        prompts = [tuple(tokenizer.encode(text).ids) for text in arguments.prompts]
        length = max(map(len, prompts)) + arguments.max_tokens
        clusters = LocalClusters(artifact, range(artifact.model.n_clusters), dtype)
        engine = Engine(Trunk(artifact, clusters, dtype, length), tokenizer)
        sampling = Sampling(
            temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed, stop=tuple(arguments.stop)
        )
        texts = {
            engine.submit(Request(prompt, arguments.max_tokens, sampling)): text
            for prompt, text in zip(prompts, arguments.prompts, strict=True)
        }
    except (ValueError, OSError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 2
    alone = len(texts) == 1
    if alone:
        print(*texts.values(), end="", flush=True)
    while not engine.idle:
        for increment in engine.step():
            texts[increment.request] += increment.text
            if alone:
                print(increment.text, end="", flush=True)
    print("" if alone else "\n\n".join(texts.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
