"""Random malformed requests: each gets a valid response, and the server keeps working."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from raymoe.serving.http.server import ApiSettings
from raymoe.storage.artifact import Artifact
from tests.support import malformed, served
from tests.support.http_site import Site
from tests.support.waiting import until

EXAMPLES = int(os.environ.get("RAYMOE_FUZZ_EXAMPLES", "300"))
"""Number of malformed bodies."""

HYPOTHESIS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def small(artifact: Artifact) -> Iterator[Site]:
    """A server with a short context, so that bodies that are valid by chance complete fast."""
    service = served.LocalService(artifact)
    service.length = 24
    site = Site(service, ApiSettings(max_choices=4))
    yield site
    site.close()


def check(site: Site, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> None:
    """Assert a valid response, before the deadline of the client."""
    response = site.ask(method, path, content, headers)
    malformed.check(method, response.status, response.content)


def check_service(site: Site, expected: str) -> None:
    """Assert that no request is left and that completions are as before."""
    until(lambda: site.service.engine.idle)
    assert site.metric("num_requests_running") == 0
    assert site.complete([5, 6, 7], max_tokens=16).text() == expected != ""


def test_malformed_bodies_get_an_error_and_the_service_continues(small: Site) -> None:
    before = small.complete([5, 6, 7], max_tokens=16).text()
    rejected = small.metric("requests_rejected_total", reason="malformed")

    @settings(max_examples=EXAMPLES, **HYPOTHESIS)
    @given(request=malformed.bodies("test"))
    def send(request: tuple[str, bytes]) -> None:
        check(small, "POST", *request, {})

    send()
    assert small.metric("requests_rejected_total", reason="malformed") > rejected
    check_service(small, before)


def test_malformed_paths_and_headers_get_an_error_and_the_service_continues(small: Site) -> None:
    before = small.complete([5, 6, 7], max_tokens=16).text()

    @settings(max_examples=EXAMPLES // 3, **HYPOTHESIS)
    @given(request=malformed.ROUTES)
    def send(request: malformed.Route) -> None:
        check(small, *request)

    send()
    check_service(small, before)
