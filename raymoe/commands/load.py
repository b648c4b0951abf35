"""Send a steady load to an OpenAI-compatible server, and report throughput and latency.

    raymoe load --streams 16 --seconds 30
    raymoe load --text builtin --domain code --share 0.8 --json load.json

Each stream sends one streaming completion after another. A failed request is counted and not retried. Prompts are
excerpts of a text (any data.path); with --domain, the given share of them comes from that domain. If the server
requires a key, set RAYMOE_API_KEY. Exit status: 0 all requests succeeded, 1 some failed, 2 invalid arguments or no
server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raymoe.commands.entry import check_folder, new_parser, refuse
from raymoe.commands.stages import StageLines

PROGRESS_EVERY_S = 0.5


@dataclass
class Completion:
    """One request as its client observed it. Times are seconds since the start of the load."""

    prompt: int
    """Index of its prompt."""
    started: float
    ended: float = 0.0
    text: str = ""
    tokens: int = 0
    first_token_s: float | None = None
    """Time from the request to its first token."""
    gaps_s: list[float] = field(default_factory=list)
    """Times between successive tokens."""
    error: str = ""
    """Empty for a request that succeeded."""


async def complete(
    session: Any, url: str, body: dict[str, Any], completion: Completion, clock: Callable[[], float]
) -> None:
    """Stream one completion into `completion`. Every exception becomes its `error`."""
    try:
        async with session.post(url, json=body | {"stream": True}) as response:
            if response.status == 200:
                completion.error = await _read_events(response.content, completion, clock)
            else:
                completion.error = f"HTTP {response.status}: {(await response.text())[:200]}"
    except Exception as error:  # every error of a client is a failed request
        completion.error = f"{type(error).__name__}: {error}"
    finally:
        completion.ended = clock()


async def _read_events(lines: Any, completion: Completion, clock: Callable[[], float]) -> str:
    """Add the events of a stream to `completion`. Returns an error, or an empty string."""
    last = None
    async for line in lines:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return ""
        chunk = json.loads(line[6:])
        if "error" in chunk:
            return str(chunk["error"])
        now = clock()
        for choice in chunk["choices"]:
            completion.text += choice["text"]
            completion.tokens += 1
            if last is None:
                completion.first_token_s = now - completion.started
            else:
                completion.gaps_s.append(now - last)
            last = now
    return "the stream ended without [DONE]"


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
    api_key: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Completion]:
    """Send completions from `streams` concurrent clients. Returns them in the order of their requests.

    No request starts after `seconds`, after `requests` requests, or after `until` is set. pick: maps the number of a
    request to the index of its prompt, by default in turn. progress: called repeatedly with the elapsed seconds.
    """
    import aiohttp

    completions: list[Completion] = []
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    def may_start() -> bool:
        below_limits = (seconds is None or clock() < seconds) and (requests is None or len(completions) < requests)
        return below_limits and not (until is not None and until.is_set())

    async def stream(session: aiohttp.ClientSession) -> None:
        while may_start():
            n = len(completions)
            which = pick(n) if pick else n % len(prompts)
            completion = Completion(which, clock())
            completions.append(completion)
            await complete(session, f"{base}/v1/completions", body | {"prompt": prompts[which]}, completion, clock)
            if completion.error:
                await asyncio.sleep(0.1)

    async def report(show: Callable[[float], None]) -> None:
        while True:
            show(clock())
            await asyncio.sleep(PROGRESS_EVERY_S)

    timeout = aiohttp.ClientTimeout(total=600, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # an idle connection may break between requests
    headers = _authorization(api_key)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        reporting = asyncio.create_task(report(progress)) if progress else None
        try:
            await asyncio.gather(*(stream(session) for _ in range(streams)))
        finally:
            if reporting:
                reporting.cancel()
    return completions


def _authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return the q-quantile (nearest rank), or None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summary(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return rates per second and latencies in seconds, with the names that vLLM's benchmark uses."""
    good = [c for c in completions if not c.error]
    span = max((c.ended for c in completions), default=0.0) - min((c.started for c in completions), default=0.0)
    first = [c.first_token_s for c in good if c.first_token_s is not None]
    gaps = [gap for c in good for gap in c.gaps_s]
    errors: dict[str, int] = {}
    for c in completions:
        if c.error:
            errors[c.error[:120]] = errors.get(c.error[:120], 0) + 1
    return {
        "requests": len(completions),
        "failed": len(completions) - len(good),
        "errors": errors,
        "seconds": span,
        "request_throughput": len(good) / span if span else 0.0,
        "output_throughput": sum(c.tokens for c in good) / span if span else 0.0,
        **{f"p{int(100 * q)}_ttft_s": quantile(first, q) for q in (0.5, 0.99)},
        **{f"p{int(100 * q)}_itl_s": quantile(gaps, q) for q in (0.5, 0.99)},
        **{f"p{int(100 * q)}_e2el_s": quantile([c.ended - c.started for c in good], q) for q in (0.5, 0.99)},
    }


def table(result: dict[str, Any], streams: int) -> str:
    """Return a summary as text with units."""

    def milliseconds(name: str) -> str:
        pair = [result[f"p50_{name}_s"], result[f"p99_{name}_s"]]
        return "".join(f"{'-' if value is None else f'{1000 * value:,.1f}':>12}" for value in pair)

    lines = [
        f"{'requests':24}{result['requests']:>12,}",
        f"{'failed':24}{result['failed']:>12,}",
        f"{'streams':24}{streams:>12,}",
        f"{'duration':24}{result['seconds']:>12.1f} s",
        f"{'requests per second':24}{result['request_throughput']:>12.2f}",
        f"{'output tokens per second':24}{result['output_throughput']:>12.1f}",
        "",
        f"{'latency in ms':24}{'median':>12}{'p99':>12}",
        f"{'time to first token':24}{milliseconds('ttft')}",
        f"{'time between tokens':24}{milliseconds('itl')}",
        f"{'whole request':24}{milliseconds('e2el')}",
    ]
    lines += [f"{n} times: {error}" for error, n in result["errors"].items()]
    return "\n".join(lines)


def pieces(text: str, *, domain: str | None, share: float, words: int, count: int, seed: int) -> list[str]:
    """Return `count` prompts of `words` words from a text, a share of them from one domain.

    Raises ValueError for a domain that the text does not have.
    """
    from raymoe.config import DataSection
    from raymoe.data.sources import documents

    by_domain: dict[str, list[str]] = {}
    for document in documents(DataSection(path=text)):
        by_domain.setdefault(document.domain, []).extend(document.text.split())
    if domain is not None and domain not in by_domain:
        raise ValueError(f"--domain {domain} is not in {text}: use one of {', '.join(sorted(by_domain))}")
    others = [name for name in by_domain if name != domain] or [str(domain)]
    draw = random.Random(seed)
    made: list[str] = []
    while len(made) < count:
        name = domain if domain is not None and draw.random() < share else draw.choice(others)
        source = by_domain[str(name)]
        at = draw.randrange(max(1, len(source) - words))
        piece = " ".join(source[at : at + words])
        if piece.isascii() and len(piece) <= 10 * words:  # base64 would be too many tokens
            made.append(piece)
    return made


def served_model(url: str, api_key: str | None) -> str:
    """Return the name of the first model of a server. Raises OSError when the server does not respond."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{url}/v1/models", headers=_authorization(api_key))
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)["data"][0]["id"]
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise OSError(f"{url} requires an API key: set RAYMOE_API_KEY") from None
        raise OSError(f"{url}/v1/models responds with HTTP {error.code}: check --url") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"no OpenAI-compatible server at {url} ({reason}): check --url, or start `raymoe serve`"
        ) from None


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server, without /v1 (default: %(default)s)")  # fmt: skip
    parse.add_argument("--model", help="name of the model (default: the first model of the server)")
    parse.add_argument("--streams", type=int, default=16, help="concurrent requests (default: %(default)s)")
    parse.add_argument("--seconds", type=float, default=30.0, help="time in which requests start (default: %(default)s)")  # fmt: skip
    parse.add_argument("--max-tokens", type=int, default=32, help="tokens of a completion (default: %(default)s)")
    parse.add_argument("--words", type=int, default=24, help="words of a prompt (default: %(default)s)")
    parse.add_argument("--text", default="builtin", help="text of the prompts, any data.path (default: %(default)s)")
    parse.add_argument("--domain", help="domain of most prompts")
    parse.add_argument("--share", type=float, default=0.8, help="share of the prompts from --domain (default: %(default)s)")  # fmt: skip
    parse.add_argument("--seed", type=int, default=0, help="seed of the selection of prompts (default: %(default)s)")
    parse.add_argument("--json", type=Path, help="file for the summary and all completions, as JSON")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    url, api_key = arguments.url.rstrip("/"), os.environ.get("RAYMOE_API_KEY") or None
    try:
        check_folder("--json", arguments.json)
        for name in ("streams", "seconds", "max_tokens", "words"):
            if getattr(arguments, name) <= 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}={getattr(arguments, name)} is not allowed: use a number greater than 0")
        prompts = pieces(
            arguments.text, domain=arguments.domain, share=arguments.share, words=arguments.words, count=1000,
            seed=arguments.seed,
        )  # fmt: skip
        model = arguments.model or served_model(url, api_key)
    except (OSError, ValueError) as error:
        return refuse(parse.prog, error)
    print(f"{url}: model {model}, {arguments.streams} streams for {arguments.seconds:g} s", file=sys.stderr)
    body = {"model": model, "max_tokens": arguments.max_tokens, "temperature": 0, "ignore_eos": True}
    show, total = StageLines(), round(arguments.seconds * 1000)
    completions = asyncio.run(
        load(
            url, prompts, streams=arguments.streams, seconds=arguments.seconds, body=body, api_key=api_key,
            progress=lambda elapsed: show("load", min(round(elapsed * 1000), total - 1), total),
        )
    )  # fmt: skip
    show("load", total, total)
    result = summary(completions)
    print(table(result, arguments.streams))
    if arguments.json:
        content = result | {"completions": [asdict(c) for c in completions]}
        arguments.json.write_text(json.dumps(content) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
