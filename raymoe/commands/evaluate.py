"""Evaluate a run or an artifact on any text: perplexity, bits per byte, load balance, speed and memory.

    raymoe evaluate first                                 the run's own validation set
    raymoe evaluate first --data wikitext-103 --json out.json
    raymoe evaluate ~/raymoe/exports/folded --residuals zero    the bases alone, of a model that has them

Evaluates a run at its newest valid checkpoint, and an artifact with INT4 experts. Every token of the text is
predicted once, in windows of --context tokens that start every --stride tokens; the last window may be partial.
The first token of each domain is predicted from <|endoftext|>.

Bits per byte is the negative log-likelihood in bits divided by the UTF-8 bytes of the text. Use it to compare
models with different tokenizers; compare perplexity per token only between models with one tokenizer.
Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.commands.entry import check_folder, new_parser, refuse
from raymoe.commands.routing import most_forced
from raymoe.config import default_root

if TYPE_CHECKING:
    from raymoe.evaluation import Perplexity
    from raymoe.export.judge import Judgement
    from raymoe.export.open import StoredModel


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("name", metavar="NAME_OR_ARTIFACT", help="a run, the export of a run, or an artifact's folder")
    parse.add_argument("--root", default=default_root(), help="folder of runs and exports (default: %(default)s)")
    parse.add_argument(
        "--data", help="text to read completely, in any form of data.path (default: the run's validation set)"
    )
    parse.add_argument("--text-field", default="text", help="column or key of the text (default: %(default)s)")
    parse.add_argument(
        "--format", choices=["text", "chat"], default="text",
        help="chat: --data has messages, rendered by the model's chat template; only answers are scored (default: text)",
    )  # fmt: skip
    parse.add_argument("--step", type=int, help="evaluate the checkpoint of this step (default: the newest valid one)")
    parse.add_argument(
        "--residuals",
        choices=["full", "int4", "zero"],
        help="residuals or private experts of an artifact; zero leaves its bases (default: int4)",
    )
    parse.add_argument("--context", type=int, help="tokens per window (default: the context of training)")
    parse.add_argument("--stride", type=int, help="tokens between windows (default: the context, so no overlap)")
    parse.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parse.add_argument("--batch", type=int, default=16, help="windows per forward pass (default: %(default)s)")
    parse.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parse.add_argument("--json", type=Path, help="also write the result to this file as JSON")
    parse.add_argument("--quiet", action="store_true", help="print one line instead of the table")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    import torch

    from raymoe.commands.stages import StageLines
    from raymoe.export.judge import judge
    from raymoe.export.open import open_any

    torch.set_num_threads(arguments.threads)
    progress, done = StageLines(), 0
    try:
        check_folder("--json", arguments.json)
        progress("read model and text", 0, 1)
        stored, skipped = open_any(arguments.root, arguments.name, arguments.step)
        for reason in skipped:
            print(f"skipped checkpoint: {reason}", file=sys.stderr)
        texts, end_of_text = stored.text(arguments.data, arguments.text_field, arguments.format)
        model = stored.model(arguments.residuals)
        progress("read model and text", 1, 1)
        total = sum(len(text.tokens) for text in texts.values())

        def advance(n: int) -> None:
            nonlocal done
            done += n
            progress("evaluate", done, total)

        progress("evaluate", 0, total)
        judged = judge(
            model, texts, end_of_text=end_of_text, context=arguments.context, stride=arguments.stride,
            batch=arguments.batch, precision=arguments.precision, progress=advance,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    parameters = sum(p.numel() for p in model.parameters())
    result = summarize(stored, judged, parameters, arguments.data or "validation", arguments.precision)
    print(summary(result) if arguments.quiet else table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.json.resolve()}", file=sys.stderr)
    return 0


def summarize(stored: StoredModel, judged: Judgement, parameters: int, data: str, precision: str) -> dict[str, Any]:
    """Return the result of an evaluation as JSON. Losses are in nats per token, memory in MiB."""
    from raymoe.export.judge import load_measures
    from raymoe.ops.memory import peak_rss_mb
    from raymoe.parallel.groups import loads_by_rank, placements

    whole, workers = judged.whole, stored.config.train.workers
    loads = judged.clusters if judged.clusters.size else judged.experts
    placed = placements(stored.config.model, stored.assignment, workers)
    return {
        "model": str(stored.folder),
        "version": stored.version,
        "data": data,
        "tokenizer": str(stored.tokenizer),
        "precision": precision,
        "context": whole.context,
        "stride": whole.stride,
        **_quality(whole),
        "domains": {domain: _quality(found) for domain, found in judged.domains.items()},
        "load": {
            "experts": load_measures(judged.experts),
            "clusters": load_measures(judged.clusters),
            f"{workers} workers": load_measures(loads_by_rank(placed, loads)),
        },
        "routing": judged.routing,
        "parameters": parameters,
        "tokens_per_s": whole.tokens / judged.seconds,
        "peak_memory_mb": peak_rss_mb(),
    }


def _quality(found: Perplexity) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "bytes": found.bytes,
        "loss": found.loss,
        "token_perplexity": found.token_perplexity,
        "bits_per_byte": found.bits_per_byte,
    }


def summary(result: Mapping[str, Any]) -> str:
    """Return the result as one line."""
    return (
        f"{result['model']}: perplexity {result['token_perplexity']:.3f} per token, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )


def table(result: Mapping[str, Any]) -> str:
    """Return the result as text for a terminal, with units."""
    lines = [
        f"model      {result['model']} ({result['parameters']:,} parameters)",
        f"data       {result['data']}, windows of {result['context']} tokens every {result['stride']} tokens",
        "",
        f"{'domain':24}{'tokens':>12}{'loss (nats)':>14}{'perplexity':>12}{'bits per byte':>15}",
    ]
    rows: Sequence[tuple[str, Mapping[str, Any]]] = [*result["domains"].items(), ("all", result)]
    for domain, row in rows if len(rows) > 2 else rows[-1:]:
        lines.append(
            f"{domain[:23]:24}{row['tokens']:>12,}{row['loss']:>14.4f}{row['token_perplexity']:>12.3f}"
            f"{row['bits_per_byte']:>15.4f}"
        )
    measured = {level: row for level, row in result["load"].items() if row}
    if measured:
        lines += ["", f"{'load balance over':24}{'CV':>12}{'max / mean - 1':>16}"]
        lines += [f"{level:24}{row['cv']:>12.3f}{row['max_vio']:>16.3f}" for level, row in measured.items()]
    if forced := most_forced(result["routing"]):
        lines += ["", f"routing    {forced}"]
    lines += [
        "",
        f"speed      {result['tokens_per_s']:,.0f} tokens/s; peak memory of this process {result['peak_memory_mb']:,.0f} MiB",
        "Lower loss, perplexity and bits per byte are better; a load CV of 0 is perfect balance.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
