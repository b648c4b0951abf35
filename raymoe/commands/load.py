"""Drive a steady load at an OpenAI-compatible endpoint and say what its users felt.

    raymoe load --streams 16 --seconds 30
    raymoe load --text builtin --domain code --share 0.8 --json load.json

So many streams each send one streaming completion after another; a failed request is not tried again, and counts.
Prompts are pieces of a text (any data.path); with --domain so large a share of them comes from that domain.
Exit status: 0 no request failed, 1 some did, 2 refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raymoe.commands.entry import new_parser


@dataclass
class Answer:
    """One request as its client saw it; times in seconds since the load began."""

    prompt: int
    began: float
    ended: float = 0.0
    text: str = ""
    tokens: int = 0
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    error: str = ""


async def ask(session: Any, url: str, body: dict[str, Any], answer: Answer, clock: Callable[[], float]) -> None:
    """Stream one completion into `answer`; whatever goes wrong is its `error`."""
    last = None
    try:
        async with session.post(url, json=body | {"stream": True}) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return
            done = False
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    done = True
                    break
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.error = str(chunk["error"])
                    return
                now = clock()
                for choice in chunk["choices"]:
                    answer.text += choice["text"]
                    answer.tokens += 1
                    if last is None:
                        answer.first_token_s = now - answer.began
                    else:
                        answer.gaps_s.append(now - last)
                    last = now
            if not done:
                answer.error = "the stream ended without [DONE]"
    except Exception as error:  # whatever a client sees is a failed request
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        answer.ended = clock()


async def load(
    base: str,
    prompts: Sequence[str],
    *,
    streams: int,
    seconds: float | None = None,
    requests: int | None = None,
    until: asyncio.Event | None = None,
    body: dict[str, Any],
    pick: Callable[[int], int] | None = None,
) -> list[Answer]:
    """Answers in the order in which they were asked for, from so many streams.

    pick: number of a request -> which of `prompts`, by default in turn. No request begins after `seconds`, after
    so many `requests`, or once `until` is set.
    """
    import aiohttp

    answers: list[Answer] = []
    started = time.perf_counter()
    clock = lambda: time.perf_counter() - started  # noqa: E731

    async def stream(session: aiohttp.ClientSession) -> None:
        def more() -> bool:
            early = (seconds is None or clock() < seconds) and (requests is None or len(answers) < requests)
            return early and not (until is not None and until.is_set())

        while more():
            n = len(answers)
            which = pick(n) if pick else n % len(prompts)
            answer = Answer(which, clock())
            answers.append(answer)
            await ask(session, f"{base}/v1/completions", body | {"prompt": prompts[which]}, answer, clock)
            if answer.error:
                await asyncio.sleep(0.1)

    timeout = aiohttp.ClientTimeout(total=600, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a kept connection may die unseen between requests
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(stream(session) for _ in range(streams)))
    return answers


def quantile(values: Sequence[float], q: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates and latencies, in the names that others use."""
    good = [a for a in answers if not a.error]
    span = max((a.ended for a in answers), default=0.0) - min((a.began for a in answers), default=0.0)
    first = [a.first_token_s for a in good if a.first_token_s is not None]
    gaps = [gap for a in good for gap in a.gaps_s]
    errors: dict[str, int] = {}
    for a in answers:
        if a.error:
            errors[a.error[:120]] = errors.get(a.error[:120], 0) + 1
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": errors,
        "seconds": span,
        "request_throughput": len(good) / span if span else 0.0,
        "output_throughput": sum(a.tokens for a in good) / span if span else 0.0,
        **{f"p{int(100 * q)}_ttft_s": quantile(first, q) for q in (0.5, 0.99)},
        **{f"p{int(100 * q)}_itl_s": quantile(gaps, q) for q in (0.5, 0.99)},
        **{f"p{int(100 * q)}_e2el_s": quantile([a.ended - a.began for a in good], q) for q in (0.5, 0.99)},
    }


def pieces(text: str, *, domain: str | None, share: float, words: int, count: int, seed: int) -> list[str]:
    """Prompts of so many words from a text, a share of them from one domain. Raises ValueError when it has none such."""
    from raymoe.config import DataSection
    from raymoe.data.sources import documents

    by_domain: dict[str, list[str]] = {}
    for document in documents(DataSection(path=text)):
        by_domain.setdefault(document.domain, []).extend(document.text.split())
    if domain is not None and domain not in by_domain:
        raise ValueError(f"--domain {domain} is not in {text}: one of {', '.join(sorted(by_domain))}")
    others = [name for name in by_domain if name != domain] or [str(domain)]
    draw = random.Random(seed)
    made: list[str] = []
    while len(made) < count:
        name = domain if domain is not None and draw.random() < share else draw.choice(others)
        source = by_domain[str(name)]
        at = draw.randrange(max(1, len(source) - words))
        piece = " ".join(source[at : at + words])
        if piece.isascii() and len(piece) <= 10 * words:  # not a page of base64, which would be too many tokens
            made.append(piece)
    return made


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server, without /v1 (default: %(default)s)"
    )
    parse.add_argument("--model", help="default: the first that the server names")
    parse.add_argument("--streams", type=int, default=16, help="requests at a time (default: %(default)s)")
    parse.add_argument("--seconds", type=float, default=30.0, help="default: %(default)s")
    parse.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    parse.add_argument("--words", type=int, default=24, help="of a prompt (default: %(default)s)")
    parse.add_argument("--text", default="builtin", help="any data.path (default: %(default)s)")
    parse.add_argument("--domain", help="that most prompts are taken from")
    parse.add_argument("--share", type=float, default=0.8, help="of the prompts (default: %(default)s)")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--json", type=Path, help="write the summary and every answer to this file")
    return parse


def first_model(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return json.load(answer)["data"][0]["id"]


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    try:
        model = arguments.model or first_model(arguments.url)
        prompts = pieces(
            arguments.text, domain=arguments.domain, share=arguments.share, words=arguments.words, count=1000,
            seed=arguments.seed,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 2
    body = {"model": model, "max_tokens": arguments.max_tokens, "temperature": 0, "ignore_eos": True}
    answers = asyncio.run(load(arguments.url, prompts, streams=arguments.streams, seconds=arguments.seconds, body=body))
    result = summary(answers)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result | {"answers": [asdict(a) for a in answers]}) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
