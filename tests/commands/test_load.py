"""The load command against a real HTTP server: results, progress, errors and exit status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymoe.commands.load import Completion, load, main, pieces, summary, table
from raymoe.serving.http.server import ApiSettings
from tests.support import served
from tests.support.http_site import GREEDY, PROMPT, Site

KEY = "key-of-the-test"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    service = served.LocalService(served.artifact(tmp_path_factory.mktemp("served")))
    made = Site(service, ApiSettings(api_key=KEY))
    yield made
    made.close()


def test_completions_are_those_of_the_server(site: Site) -> None:
    prompts, times = [PROMPT, "The dog"], []
    expected = [site.ask("POST", "/v1/completions", GREEDY | {"prompt": p}, auth()).text() for p in prompts]
    completions = asyncio.run(
        load(site.url, prompts, streams=2, requests=5, body=GREEDY, api_key=KEY, progress=times.append)
    )
    assert [c.error for c in completions] == [""] * 5
    assert [c.text for c in completions] == [expected[c.prompt] for c in completions]
    assert [c.prompt for c in completions] == [0, 1, 0, 1, 0] and times
    for c in completions:
        assert c.tokens == 12 == len(c.gaps_s) + 1 and c.first_token_s is not None
        assert c.first_token_s + sum(c.gaps_s) <= c.ended - c.started


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"word{i % 97}" for i in range(2000)))
    return str(file)


def auth() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def test_failed_requests_are_counted(site: Site) -> None:
    for body, words in ((GREEDY | {"model": "another"}, "HTTP 404"), (GREEDY | {"max_tokens": 999}, "HTTP 400")):
        completions = asyncio.run(load(site.url, [PROMPT], streams=1, requests=2, body=body, api_key=KEY))
        result = summary(completions)
        assert result["failed"] == result["requests"] == 2 and result["p50_ttft_s"] is None
        ((error, count),) = result["errors"].items()
        assert error.startswith(words) and count == 2
        assert f"2 times: {words}" in table(result, 1)


def test_the_command(
    site: Site, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMOE_API_KEY", KEY)
    line = [
        "--url",
        site.url,
        "--streams",
        "2",
        "--seconds",
        "0.5",
        "--max-tokens",
        "4",
        "--words",
        "3",
        "--text",
        text,
    ]
    assert main([*line, "--json", str(tmp_path / "load.json")], "raymoe load") == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{site.url}: model test, 2 streams for 0.5 s\n") and shown.err.split()[-3] == "load"
    rows = {line[:24].strip(): line[24:].split() for line in shown.out.splitlines() if line}
    result = json.loads((tmp_path / "load.json").read_text())
    assert rows["requests"] == [str(result["requests"])] and rows["failed"] == ["0"]
    assert rows["time to first token"][0] == f"{1000 * result['p50_ttft_s']:,.1f}"
    assert len(result["completions"]) == result["requests"] and result["output_throughput"] > 0


def test_invalid_arguments_and_servers_are_refused(
    site: Site, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYMOE_API_KEY", raising=False)
    for arguments, words in (
        (["--url", site.url], "requires an API key: set RAYMOE_API_KEY"),
        (["--url", "http://127.0.0.1:1"], "no OpenAI-compatible server at http://127.0.0.1:1"),
        (["--url", site.url, "--streams", "0"], "--streams=0 is not allowed"),
        (["--url", site.url, "--domain", "none"], "--domain none is not in "),
    ):
        assert main([*arguments, "--text", text], "raymoe load") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("raymoe load: ") and words in line


def test_prompts_are_drawn_by_seed(text: str) -> None:
    def draw(seed: int) -> list[str]:
        return pieces(text, domain=None, share=0.8, words=5, count=20, seed=seed)

    assert draw(1) == draw(1) != draw(2) and all(len(prompt.split()) == 5 for prompt in draw(1))


def test_a_summary_has_rates_and_percentiles() -> None:
    completions = [Completion(0, float(i), i + 2.0, "ab", 2, 0.5 + i, [0.25 * (i + 1)]) for i in range(4)]
    completions.append(Completion(0, 3.0, 5.0, error="broken"))
    result = summary(completions)
    assert result["seconds"] == 5 and result["request_throughput"] == 4 / 5 and result["output_throughput"] == 8 / 5
    assert (result["p50_ttft_s"], result["p99_itl_s"], result["p50_e2el_s"]) == (2.5, 1.0, 2.0)
    assert result["failed"] == 1 and result["errors"] == {"broken": 1}
