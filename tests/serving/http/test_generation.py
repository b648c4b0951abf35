"""Generation: disconnected clients, full queues, errors of the service, and metrics."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raymoe.metrics import FINISHES, REJECTIONS
from raymoe.serving.engine.request import Increment, Request, Usage
from raymoe.serving.http.errors import Unavailable
from raymoe.serving.http.server import ApiSettings
from raymoe.storage.artifact import Artifact
from tests.support import served
from tests.support.http_site import DEADLINE_S, GREEDY, PROMPT, Response, Site
from tests.support.waiting import until


def ask_in_thread(site: Site, path: str, body: Any) -> tuple[threading.Thread, list[Response]]:
    responses: list[Response] = []
    thread = threading.Thread(
        target=lambda: responses.append(Response(site.send("POST", path, body).getresponse())), daemon=True
    )
    thread.start()
    return thread, responses


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_disconnected_client_frees_the_engine(site: Site, stream: bool, begun: bool) -> None:
    aborted = site.metric("request_success_total", finished_reason="abort")
    site.service.pause(not begun)
    body = {"prompt": ["The cat", PROMPT], "max_tokens": 110, "ignore_eos": True, "stream": stream}
    generated = site.metric("generation_tokens_total")
    connection = site.send("POST", "/v1/completions", body)
    if begun:
        until(lambda: site.metric("generation_tokens_total") > generated)
    else:
        until(lambda: site.service.engine.running == 2)
    site.service.pause()
    if stream and begun:
        connection.getresponse().readline()
    connection.close()
    until(lambda: site.service.engine.idle)  # while the engine is paused
    until(lambda: site.metric("request_success_total", finished_reason="abort") == aborted + 2)
    assert site.metric("num_requests_running") == 0


def test_a_full_queue_rejects_at_once_and_keeps_accepted_requests(artifact: Artifact) -> None:
    site = Site(served.LocalService(artifact, max_running=1, max_queued=2), ApiSettings(retry_after_s=2.5))
    try:
        expected = site.complete("The cat").text()
        site.service.pause()
        body = {"prompt": "The cat", **GREEDY}
        accepted = [ask_in_thread(site, "/v1/completions", body | {"stream": stream}) for stream in (True, False)]
        until(lambda: site.service.engine.running + site.service.engine.waiting == 2)
        times = []
        for stream in (False, True) * 3:
            begin = time.monotonic()
            response = site.ask(
                "POST", "/v1/completions", body | {"prompt": ["a", "b"], "stream": stream}
            )  # the queue has room for one of the two
            times.append(time.monotonic() - begin)
            assert response.status == 503 and response.headers["Retry-After"] == "3"
            assert response.json["error"]["code"] == "queue_full"
            until(lambda: site.service.engine.running + site.service.engine.waiting == 2)
        assert min(times) < 0.1 and site.metric("requests_rejected_total", reason="full") == 6
        site.service.pause(False)
        for thread, responses in accepted:
            thread.join(DEADLINE_S)
            assert responses[0].text() == expected
        assert site.metric("request_success_total", finished_reason="abort") == 0
    finally:
        site.close()


def test_one_rejected_choice_ends_the_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = site.service.engine.submit

    def reject_second(key: int, request: Request) -> None:
        if request.prompt == (7,):
            raise ValueError("7 cannot be served")
        return submit(key, request)

    monkeypatch.setattr(site.service.engine, "submit", reject_second)
    site.service.pause()
    for stream in (False, True):
        response = site.complete([[5, 6], [7]], stream=stream)
        assert response.status == 400 and response.json["error"]["message"] == "7 cannot be served"
        until(lambda: site.service.engine.idle)


class Broken(served.LocalService):
    """A service that raises `error` after `good` increments."""

    error: Exception = RuntimeError("secret details")
    good = 0

    async def generate(self, request: Request) -> Any:
        for _ in range(self.good):
            yield Increment(1, 5, "a", Usage(len(request.prompt), 1))
        raise self.error


@pytest.mark.parametrize(
    ("error", "good", "status"),
    [(Unavailable("no trunk", 4.2), 0, 503), (ValueError("never"), 0, 400), (RuntimeError("secret"), 0, 500),
     (Unavailable("no trunk", 4.2), 1, 503), (ValueError("odd"), 1, 500)],
)  # fmt: skip
def test_errors_of_the_service(artifact: Artifact, error: Exception, good: int, status: int) -> None:
    service = Broken(artifact)
    service.error, service.good = error, good
    site = Site(service)
    try:
        response = site.complete()
        assert response.status == status and b"secret" not in response.content and response.headers["X-Request-Id"]
        assert response.headers["Retry-After"] == ("5" if status == 503 else None)
        stream = site.complete(stream=True)
        if good:
            assert stream.status == 200 and "error" in stream.events[-1] and len(stream.events) == 2
        else:
            assert stream.status == status and stream.json == response.json
        assert site.metric("request_success_total", finished_reason="error") == 2 * good
        assert site.metric("num_requests_running") == 0
    finally:
        site.close()


def test_an_engine_failure_is_the_last_event_of_a_stream(site: Site) -> None:
    stream = site.send("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True})  # fmt: skip
    response = stream.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    site.service.failing = True
    rest = response.read().decode().strip().split("\n\n")
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "server_error"


def test_metrics(artifact: Artifact) -> None:
    site = Site(served.LocalService(artifact))
    try:
        assert {why: site.metric("requests_rejected_total", reason=why) for why in REJECTIONS} == dict.fromkeys(REJECTIONS, 0)  # fmt: skip
        site.complete(["The cat", PROMPT], ignore_eos=True)
        site.complete(stream=True, ignore_eos=True, stop=[site.complete(ignore_eos=True).text()[4:6]])
        site.complete(n=0)
        site.complete(max_tokens=500)
        site.complete(model="another")
        counts = {how: site.metric("request_success_total", finished_reason=how) for how in FINISHES}
        assert counts == {"length": 3, "stop": 1, "abort": 0, "error": 0}
        rejected = {why: site.metric("requests_rejected_total", reason=why) for why in REJECTIONS}
        assert rejected == dict.fromkeys(REJECTIONS, 0) | {"malformed": 1, "too_long": 1, "unknown_model": 1}
        generated = site.metric("generation_tokens_total")
        assert 36 < generated <= 48 and site.metric("prompt_tokens_total") == sum(
            len(site.encode(text)) for text in ("The cat", PROMPT, PROMPT, PROMPT)
        )
        assert site.metric("time_to_first_token_seconds_count") == site.metric("e2e_request_latency_seconds_count") == 4
        assert site.metric("inter_token_latency_seconds_count") == generated - 4
        assert site.metric("num_requests_running") == 0 == site.metric("request_resumes_total")
        scraped = site.ask("GET", "/metrics")
        families = list(text_string_to_metric_families(scraped.content.decode()))
        assert len({family.name for family in families if not family.name.endswith("_created")}) == 9
        for family in families:
            assert family.name.startswith("raymoe_") and family.documentation.endswith(".")
            for sample in family.samples:
                assert sample.labels["model_name"] == "test"
                assert sample.labels.keys() <= {"model_name", "finished_reason", "reason", "le"}
    finally:
        site.close()
