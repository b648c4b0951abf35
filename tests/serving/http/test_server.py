"""Routes, authorization, request ids and errors of the HTTP server, on the loopback address."""

from __future__ import annotations

from http.client import HTTPConnection
from typing import Any

import pytest

from raymoe.serving.http.prompts import DEFAULT_TEMPLATE
from raymoe.serving.http.server import ApiSettings
from raymoe.storage.artifact import Artifact
from tests.support import served
from tests.support.http_site import CHAT, DEADLINE_S, GREEDY, PROMPT, Site


def test_health_readiness_and_version(site: Site) -> None:
    health = site.ask("GET", "/health")
    assert (health.status, health.content) == (200, b"")
    assert site.ask("GET", "/ready").status == 200
    site.service.up = False
    ready = site.ask("GET", "/ready")
    assert ready.status == 503 and ready.headers["Retry-After"] == "1" and ready.json["error"]["code"] == "unavailable"
    assert site.ask("GET", "/health").status == 200
    assert site.ask("GET", "/version").json["version"]


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/version", "/metrics", "/tokenizer_info", "/v1/models", "/v1/models/test", "/v1/models/x"],
)
def test_head_is_get_without_a_body(site: Site, path: str) -> None:
    get, head = site.ask("GET", path), site.ask("HEAD", path)
    assert head.status == get.status and head.content == b""
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    if path != "/metrics":  # its counters change between the requests
        assert head.headers["Content-Length"] == get.headers["Content-Length"]


def test_head_needs_the_key_as_get_does(artifact: Artifact) -> None:
    site = Site(served.LocalService(artifact), ApiSettings(api_key="secret"))
    try:
        assert site.ask("HEAD", "/v1/models").status == 401
        assert site.ask("HEAD", "/v1/models", headers={"Authorization": "Bearer secret"}).status == 200
    finally:
        site.close()


def test_models(site: Site) -> None:
    listed = site.ask("GET", "/v1/models").json
    (card,) = listed["data"]
    assert listed["object"] == "list" and site.ask("GET", "/v1/models/test").json == card
    assert card["id"] == card["root"] == "test" and card["object"] == "model" and card["max_model_len"] == 128
    assert card["created"] == 1_700_000_000 and card["permission"][0]["object"] == "model_permission"


def test_tokenize_and_detokenize(site: Site) -> None:
    text = "naïve 日本語 🙂 <|endoftext|>"
    tokens = site.ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json
    assert tokens == {"count": len(tokens["tokens"]), "max_model_len": 128, "tokens": site.encode(text)}
    assert site.ask("POST", "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": text}
    assert site.ask("POST", "/tokenize", {"prompt": ""}).json["tokens"] == []
    messages = [{"role": "user", "content": "Hello"}]
    assert site.ask("POST", "/tokenize", {"messages": messages}).json["tokens"] == site.encode(
        "user: Hello\nassistant:"
    )
    info = site.ask("GET", "/tokenizer_info").json
    assert info["eos_token"] == "<|endoftext|>" and info["chat_template"] == DEFAULT_TEMPLATE


def test_status_of_other_rejections(site: Site) -> None:
    valid = {"prompt": PROMPT, **GREEDY}
    unknown = site.ask("POST", "/v1/completions", valid | {"model": "another"})
    assert unknown.status == 404 and unknown.json["error"]["code"] == "model_not_found"
    assert site.ask("GET", "/v1/models/org/another").json["error"]["code"] == "model_not_found"
    assert site.ask("POST", "/tokenize", {"model": "another", "prompt": ""}).status == 404
    large = site.ask("POST", "/v1/completions", valid | {"user": "a" * (1 << 16)})
    assert large.status == 413 and "65536 bytes" in large.json["error"]["message"]
    site.local.connection = None
    chunked = HTTPConnection("127.0.0.1", site.port, timeout=DEADLINE_S)
    headers = {"Content-Type": "application/json"}
    chunked.request("POST", "/tokenize", iter([b'"' + b"a" * 40_000] * 3), headers, encode_chunked=True)
    assert chunked.getresponse().status == 413
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "application/jsonx"):
        assert site.ask("POST", "/v1/completions", valid, {"Content-Type": kind}).status == 415
    assert site.ask("POST", "/v1/completions", valid, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        response = site.ask(method, path)
        assert response.status == status and response.json["error"]["type"] == "invalid_request_error"
    assert {word.strip() for word in response.headers["Allow"].split(",")} == {"GET", "HEAD"}
    assert site.ask("GET", "/nothing", headers={"Host": "["}).status == 404
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert site.ask("POST", "/tokenize", body).status == 400
    for tokens in ([-1], [2**31], ["a"], [True], None):
        assert site.ask("POST", "/detokenize", {"tokens": tokens}).status == 400


def test_valid_request_ids_are_returned(site: Site) -> None:
    assert site.ask("GET", "/health", headers={"X-Request-Id": "mine-1"}).headers.get_all("X-Request-Id") == ["mine-1"]
    for bad in ("a" * 129, "a b", "\xe9", ""):
        name = site.ask("GET", "/nothing", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert name != bad and len(name) == 32
    response = site.ask("POST", "/v1/completions", {"prompt": "a", **GREEDY}, {"X-Request-Id": "mine-2"})
    assert response.json["id"] == "cmpl-mine-2"


def test_v1_requires_the_key(artifact: Artifact) -> None:
    site = Site(served.LocalService(artifact), ApiSettings(api_key="secret"))
    try:
        body = {"prompt": PROMPT, **GREEDY}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}, {"Authorization": "Bearer secre\xe9"}, {"Authorization": "Bearer"}):  # fmt: skip
            for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
                response = site.ask(method, path, body if method == "POST" else None, header)
                assert response.status == 401 and response.json["error"]["code"] == "invalid_api_key"
        assert site.metric("requests_rejected_total", reason="unauthorized") == 18
        for header in ("Bearer secret", "bearer secret"):
            assert site.ask("POST", "/v1/completions", body, {"Authorization": header}).status == 200
        assert site.ask("GET", "/health").status == site.ask("GET", "/metrics").status == 200
    finally:
        site.close()


@pytest.mark.parametrize(
    "change", [{"api_key": ""}, {"api_key": "é"}, {"max_body_bytes": 0}, {"max_choices": 0}, {"retry_after_s": 0.0}]
)
def test_invalid_settings_are_rejected(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        ApiSettings(**change)
    assert "secret" not in repr(ApiSettings(api_key="secret"))


def test_unexpected_errors_have_an_error_body(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.service, "ready", lambda: 1 / 0)
    response = site.ask("GET", "/ready", headers={"X-Request-Id": "mine"})
    site.local.connection = None
    assert response.status == 500 and response.json["error"]["message"] == "Internal server error"
    assert response.headers["X-Request-Id"] == "mine"
