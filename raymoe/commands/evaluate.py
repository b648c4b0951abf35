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
import resource
import sys
from pathlib import Path

from raymoe.config import default_root


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("name", metavar="NAME_OR_ARTIFACT", help="a run, the export of a run, or an artifact's folder")
    parse.add_argument("--root", default=default_root(), help="where runs and exports live (default: %(default)s)")
    parse.add_argument(
        "--data", help="any data.path; all of it is read (default: the validation set it was trained with)"
    )
    parse.add_argument("--text-field", default="text", help="column of the text (default: %(default)s)")
    parse.add_argument("--step", type=int, help="evaluate the checkpoint of this step (default: the newest valid)")
    parse.add_argument("--residuals", choices=["full", "int4", "zero"], help="an artifact's residuals (default: int4)")
    parse.add_argument("--context", type=int, help="tokens in a window (default: the training context)")
    parse.add_argument("--stride", type=int, help="tokens between windows (default: the context, no overlap)")
    parse.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parse.add_argument("--batch", type=int, default=16, help="windows at a time (default: %(default)s)")
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parse.add_argument("--json", type=Path, help="write the result to this file")
    parse.add_argument("--quiet", action="store_true", help="print one line instead of the whole result")
    return parse


def main() -> int:
    arguments = parser().parse_args()
    import torch
    from tqdm import tqdm

    from raymoe.export.judge import judge, load_measures
    from raymoe.export.open import open_any
    from raymoe.parallel.groups import loads_by_rank, placements

    torch.set_num_threads(arguments.threads)
    try:
        stored, skipped = open_any(arguments.root, arguments.name, arguments.step)
        for reason in skipped:
            print(f"skipped: {reason}", file=sys.stderr)
        texts, end_of_text = stored.text(arguments.data, arguments.text_field)
        model = stored.model(arguments.residuals)
        hidden = None if sys.stderr.isatty() else True
        with tqdm(total=sum(len(t.tokens) for t in texts.values()), unit="tokens", disable=hidden) as bar:
            judged = judge(
                model, texts, end_of_text=end_of_text, context=arguments.context, stride=arguments.stride,
                batch=arguments.batch, precision=arguments.precision, progress=bar.update,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    whole, workers = judged.whole, stored.config.train.workers
    by_group = judged.clusters if judged.clusters.size else judged.experts
    placed = placements(stored.config.model, stored.assignment, workers)
    result = {
        "tokens": whole.tokens, "words": whole.words, "context": whole.context, "stride": whole.stride,
        "tokenizer": str(stored.tokenizer), "precision": arguments.precision, "loss": whole.loss,
        "token_perplexity": whole.token_perplexity, "word_perplexity": whole.word_perplexity,
        "domains": {d: {"tokens": p.tokens, "loss": p.loss, "token_perplexity": p.token_perplexity,
                        "word_perplexity": p.word_perplexity} for d, p in judged.domains.items()},
        "load": {"experts": load_measures(judged.experts), "clusters": load_measures(judged.clusters),
                 f"{workers} workers": load_measures(loads_by_rank(placed, by_group))},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_s": whole.tokens / judged.seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
    }  # fmt: skip
    result = {"model": str(stored.folder), "version": stored.version, "data": arguments.data or "validation", **result}
    summary = (
        f"{result['model']}: perplexity {whole.token_perplexity:.3f} per token, {whole.word_perplexity:.3f} per word"
    )
    print(summary if arguments.quiet else json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.json.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
