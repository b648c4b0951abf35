"""A small artifact behind the HTTP server, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymoe.serving.http.server import ApiSettings
from raymoe.storage.artifact import Artifact
from tests.support import served
from tests.support.http_site import Site
from tests.support.waiting import until


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return served.artifact(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def shared(artifact: Artifact) -> Iterator[Site]:
    site = Site(served.LocalService(artifact), ApiSettings(max_choices=6, max_body_bytes=1 << 16))
    yield site
    site.close()


@pytest.fixture
def site(shared: Site) -> Site:
    """A server in its initial state: ready, not paused, and idle."""
    shared.service.pause(False)
    shared.service.up, shared.service.failing = True, False
    until(lambda: shared.service.engine.idle)
    return shared
