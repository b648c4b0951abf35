"""The API over HTTP on the loopback, as clients speak it: what it says, what it refuses, and what it gives up."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from raymoe.metrics import FINISHES, REJECTIONS, ApiMetrics
from raymoe.serving.engine.request import Echo, Increment, Request, Usage
from raymoe.serving.engine.sampling import LogProb
from raymoe.serving.http.bodies import CompletionBody, Message
from raymoe.serving.http.errors import ClientError, Unavailable
from raymoe.serving.http.prompts import DEFAULT_TEMPLATE, ChatTemplate, Codec
from raymoe.serving.http.replies import CompletionReply, to_json
from raymoe.serving.http.server import ApiSettings, create_app
from raymoe.storage.artifact import Artifact
from tests.support import malformed, served
from tests.support.waiting import until

EXAMPLES = int(os.environ.get("RAYMOE_FUZZ_EXAMPLES", "300"))
"""Malformed bodies to try."""
DEADLINE_S = 20.0
"""Nothing here may take longer."""
PROMPT = "The cat sat on"
GREEDY = {"temperature": 0, "max_tokens": 12}


class Answer:
    def __init__(self, response: HTTPResponse) -> None:
        self.status, self.headers, self.content = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """Of a stream, without its end mark, which must be there unless the last event is an error."""
        assert self.headers["Content-Type"].startswith("text/event-stream")
        parts = self.content.decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        datas = [part.removeprefix("data: ") for part in parts]
        if datas[-1] != "[DONE]":
            assert "error" in json.loads(datas[-1])
            return [json.loads(data) for data in datas]
        return [json.loads(data) for data in datas[:-1]]

    def text(self, i: int = 0) -> str:
        """Of a choice, however it came."""
        if self.headers["Content-Type"].startswith("text/event-stream"):
            choices = [choice for event in self.events for choice in event["choices"] if choice["index"] == i]
            return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
        choice = self.json["choices"][i]
        assert choice["index"] == i
        return choice["text"] if "text" in choice else choice["message"]["content"]


class Site:
    """The app on a free port, and a client for it."""

    def __init__(self, service: served.LocalService, options: ApiSettings | None = None) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        app = create_app(service, options or ApiSettings(), ApiMetrics(self.registry, model=service.name))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        self.local = threading.local()

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=DEADLINE_S)
        self.service.close()

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, connection: Any = None
    ) -> HTTPConnection:
        connection = connection or HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, content, kind | (headers or {}))
        return connection

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Over one connection of this thread."""
        connection = getattr(self.local, "connection", None) or HTTPConnection(
            "127.0.0.1", self.port, timeout=DEADLINE_S
        )
        self.local.connection = None
        answer = Answer(self.send(method, path, body, headers, connection).getresponse())
        self.local.connection = connection
        return answer

    def complete(self, prompt: Any = PROMPT, **options: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {"model": "test", "prompt": prompt, **GREEDY, **options})

    def chat(self, *messages: Any, **options: Any) -> Answer:
        given = list(messages) or [{"role": "user", "content": "Hello"}]
        return self.ask("POST", "/v1/chat/completions", {"model": "test", "messages": given, **GREEDY, **options})

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"raymoe_{name}", {"model_name": "test", **labels})
        assert value is not None
        return value

    def encode(self, text: str) -> list[int]:
        return self.service.tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return served.artifact(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def shared(artifact: Artifact) -> Iterator[Site]:
    site = Site(served.LocalService(artifact), ApiSettings(max_choices=6, max_body_bytes=1 << 16))
    yield site
    site.close()


@pytest.fixture
def site(shared: Site) -> Site:
    """Idle, as each test must leave it."""
    shared.service.pause(False)
    shared.service.up, shared.service.failing = True, False
    until(lambda: shared.service.engine.idle)
    return shared


# Routes


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


def test_tokens_there_and_back(site: Site) -> None:
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


def test_a_completion(site: Site) -> None:
    answer = site.complete()
    body = answer.json
    assert answer.status == 200 and body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"] == f"cmpl-{answer.headers['X-Request-Id']}" and body["object"] == "text_completion"
    assert body["model"] == "test" and abs(body["created"] - time.time()) < 60
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": choice["text"], "logprobs": None, "finish_reason": "length"}
    prompt = len(site.encode(PROMPT))
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_null_is_the_default_and_unknown_fields_are_ignored(site: Site) -> None:
    nothing = dict.fromkeys(
        ["n", "stop", "seed", "stream", "stream_options", "top_p", "top_k", "min_p", "repetition_penalty", "best_of",
         "frequency_penalty", "presence_penalty", "ignore_eos", "echo", "logprobs", "suffix", "logit_bias", "user"]
    )  # fmt: skip
    assert site.complete(**nothing, mystery={"a": [1]}, model_config=1).text() == site.complete().text()
    default = site.complete(max_tokens=None)
    assert default.json["usage"]["completion_tokens"] == 16
    clipped = site.complete([5] * 120, max_tokens=None, ignore_eos=True)
    assert clipped.json["usage"] == {"prompt_tokens": 120, "completion_tokens": 8, "total_tokens": 128}


def test_a_chat(site: Site) -> None:
    answer = site.chat({"role": "user", "content": [{"type": "text", "text": "Hello"}]})
    body = answer.json
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer.text(), "refusal": None}
    assert answer.text() == site.complete("user: Hello\nassistant:").text() == site.chat().text()
    prompt = len(site.encode("user: Hello\nassistant:"))
    rest = site.chat(max_tokens=None, ignore_eos=True).json["usage"]
    assert rest == {"prompt_tokens": prompt, "completion_tokens": 128 - prompt, "total_tokens": 128}
    assert site.chat(max_completion_tokens=3, ignore_eos=True).json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 3, "n": 3}, {"echo": True}, {"echo": True, "max_tokens": 0}, {"stop": "e"}])  # fmt: skip
def test_a_stream_gives_the_same_text(site: Site, options: dict[str, Any]) -> None:
    whole, stream = site.complete(**options), site.complete(**options, stream=True)
    for i, choice in enumerate(whole.json["choices"]):
        assert stream.text(i) == whole.text(i)
        finishes = [c["finish_reason"] for e in stream.events for c in e["choices"] if c["index"] == i]
        assert finishes[-1] == choice["finish_reason"] and not any(finishes[:-1])
    assert {event["object"] for event in stream.events} == {"text_completion"}
    assert len({event["id"] for event in stream.events}) == 1 and "usage" not in stream.events[-1]


def test_a_chat_stream(site: Site) -> None:
    options = {"temperature": 1, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole, stream = site.chat(**options), site.chat(**options, stream=True)
    for i in range(2):
        first, *deltas = [c for e in stream.events for c in e["choices"] if c["index"] == i]
        assert first["delta"] == {"role": "assistant", "content": ""} and first["logprobs"] is None
        assert all(c["delta"].keys() == {"content"} for c in deltas)
        assert stream.text(i) == whole.text(i)
        content = [entry for c in deltas for entry in c["logprobs"]["content"]]
        assert content == whole.json["choices"][i]["logprobs"]["content"]
    assert {event["object"] for event in stream.events} == {"chat.completion.chunk"}


def test_usage_in_a_stream(site: Site) -> None:
    whole = site.complete(["The cat", PROMPT], n=2).json["usage"]
    prompts = [len(site.encode("The cat")), len(site.encode(PROMPT))]
    assert whole["prompt_tokens"] == sum(prompts)  # a prompt is read once, however many answers it has
    *chunks, last = site.complete(["The cat", PROMPT], n=2, stream=True, stream_options={"include_usage": True}).events
    assert last["choices"] == [] and last["usage"] == whole and not any("usage" in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = site.complete(["The cat", PROMPT], n=2, stream=True, stream_options=options).events
    assert last["usage"] == whole
    seen: dict[int, Any] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        usage = seen[choice["index"]] = chunk["usage"]
        assert usage["prompt_tokens"] == prompts[choice["index"] // 2]
    assert sum(usage["completion_tokens"] for usage in seen.values()) == whole["completion_tokens"]


def test_a_batch_is_answered_in_order(site: Site) -> None:
    prompts = ["The cat", "42 birds", "日本語"]
    alone = [site.complete(prompt, temperature=1, seed=5, n=2) for prompt in prompts]
    texts = [answer.text(i) for answer in alone for i in range(2)]
    together = site.complete(prompts, temperature=1, seed=5, n=2)
    assert [together.text(i) for i in range(6)] == texts and len(set(texts)) == 6
    as_tokens = site.complete([site.encode(prompt) for prompt in prompts], temperature=1, seed=5, n=2)
    assert [as_tokens.text(i) for i in range(6)] == texts
    assert site.complete(site.encode("The cat"), temperature=1, seed=6).text() == texts[1]  # the seed that follows


def test_seeds(site: Site) -> None:
    def ask(**options: Any) -> str:
        return site.complete(temperature=2, max_tokens=20, **options).text()

    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert ask() != ask() and ask(seed=-1) == ask(seed=2**64 - 1)


def test_top_p_0_gives_the_most_likely_tokens(site: Site) -> None:
    assert site.complete(temperature=2, top_p=0).text() == site.complete().text()
    assert site.chat(temperature=2, top_p=0, seed=5).text() == site.chat().text()


def test_the_model_may_be_left_out(site: Site) -> None:
    body = {"prompt": PROMPT, **GREEDY}
    assert site.ask("POST", "/v1/completions", body).text() == site.complete().text()
    assert site.ask("POST", "/v1/chat/completions", CHAT | GREEDY).json["model"] == "test"


def test_stop_strings_end_an_answer(site: Site) -> None:
    text = site.complete(max_tokens=30, ignore_eos=True).text()
    stop = text[10:12]
    for stops in (stop, [stop, "never there"]):
        answer = site.complete(max_tokens=30, ignore_eos=True, stop=stops)
        assert answer.text() == text[: text.index(stop)] and answer.json["choices"][0]["finish_reason"] == "stop"


# Log-probabilities


def test_a_likelihood_is_that_of_evaluation(site: Site, artifact: Artifact) -> None:
    """As lm-eval asks for it: tokens, one more, and what it reads of the answer."""
    prompts, model = [site.encode(served.TEXT)[:n] for n in (40, 23)], served.whole(artifact)
    answer = site.complete(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for tokens, choice in zip(prompts, answer.json["choices"], strict=True):
        with torch.no_grad():
            table = model(torch.tensor([tokens]))[0].log_softmax(-1)
        given = choice["logprobs"]
        lengths = {key: len(values) for key, values in given.items()}
        assert lengths == dict.fromkeys(["tokens", "token_logprobs", "top_logprobs", "text_offset"], len(tokens) + 1)
        assert given["token_logprobs"][0] is None and given["top_logprobs"][0] is None
        expected = table[range(len(tokens) - 1), tokens[1:]]
        torch.testing.assert_close(torch.tensor(given["token_logprobs"][1:-1]), expected, atol=1e-4, rtol=0)
        best = torch.tensor([max(top.values()) for top in given["top_logprobs"][1:]])
        torch.testing.assert_close(best, table.amax(-1), atol=1e-4, rtol=0)
        assert given["token_logprobs"][-1] == best[-1]  # the greedy token is the best: exactly
        text = site.service.tokenizer.decode(tokens)
        assert choice["text"].startswith(text)
        for token, at in zip(given["tokens"][:-1], given["text_offset"], strict=False):
            assert "\ufffd" in token or text[at : at + len(token)] == token
        assert given["text_offset"][-1] == len(text)


def test_logprobs_are_there_as_asked(site: Site) -> None:
    for count in (0, 3):
        given = site.complete(logprobs=count, ignore_eos=True).json["choices"][0]["logprobs"]
        assert all(1 <= len(top) <= count + 1 for top in given["top_logprobs"])
        assert len(given["tokens"]) == 12 and given["text_offset"][0] == 0
    stream = site.complete(logprobs=3, ignore_eos=True, stream=True)
    pieces = [event["choices"][0]["logprobs"] for event in stream.events]
    assert {key: [v for piece in pieces for v in piece[key]] for key in given} == given
    chat = site.chat(logprobs=True, ignore_eos=True).json["choices"][0]["logprobs"]["content"]
    assert len(chat) == 12 and all(entry["top_logprobs"] == [] for entry in chat)


def test_bytes_of_tokens_join_to_the_text(site: Site) -> None:
    answer = site.chat({"role": "user", "content": "🙂 日本語"}, logprobs=True, max_tokens=40, temperature=1, seed=2, ignore_eos=True)  # fmt: skip
    content = answer.json["choices"][0]["logprobs"]["content"]
    joined = bytes(byte for entry in content for byte in entry["bytes"])
    assert joined.decode(errors="replace") == answer.text() and any("\ufffd" in entry["token"] for entry in content)
    tokens = Codec(site.service.tokenizer)
    for text in (served.TEXT, "<|endoftext|>", "\x00\xff\u0100"):
        ids = site.encode(text)
        assert bytes(byte for token in ids for byte in tokens.bytes(token)) == text.encode()
    assert bytes(tokens.bytes(0)) == b"<|endoftext|>" and tokens.bytes(10**6) == []


def test_no_number_is_beyond_json() -> None:
    request = Request((1, 2), 1, logprobs=1, echo=True)
    reply = CompletionReply("x", "test", CompletionBody(), [request], Codec(served.tokenizer()))
    bad = LogProb(2, float("-inf"), ((1, float("nan")),))
    reply.add(0, Increment(1, 2, "b", Usage(2, 1), bad, Echo("ab", (None, bad)), "length"))
    (choice,) = json.loads(to_json(reply.whole()))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0, -9999.0]


# Errors

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # What is wrong with a completion, the field that is named, and words of the message
    ({"prompt": None}, "prompt", "empty"), ({"prompt": ""}, "prompt", "empty"), ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"), ({"prompt": [[1], []]}, "prompt", "empty"),
    ({"prompt": [1, "a"]}, "prompt", "list of token ids"), ({"prompt": [True]}, "prompt", "list of token ids"),
    ({"prompt": {"a": 1}}, "prompt", "a string"), ({"prompt": [1.0]}, "prompt", "list of token ids"),
    ({"prompt": [-1]}, "prompt", "list of token ids"), ({"prompt": [10**400]}, "prompt", "list of token ids"),
    ({"prompt": ["a"] * 7}, "n", "7 completions: at most 6"), ({"prompt": ["a"] * 3, "n": 3}, "n", "9 completions"),
    ({"n": 0}, "n", "greater than or equal to 1"), ({"n": 10**30}, "n", "less than"), ({"n": "1"}, "n", "integer"),
    ({"n": True}, "n", "integer"), ({"best_of": 2}, "best_of", "must be n=1"),
    ({"max_tokens": -1}, "max_tokens", "greater"), ({"max_tokens": 10**100}, "max_tokens", "less than"),
    ({"max_tokens": "5"}, "max_tokens", "integer"), ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": 200}, "prompt", "maximum context length is 128 tokens"),
    ({"prompt": [5] * 129}, "prompt", "(129 in the prompt, 12 for the completion)"),
    ({"prompt": [5] * 128, "max_tokens": None}, "prompt", "maximum context length"),
    ({"prompt": "a " * 20_000}, "prompt", "prompt has at least"),
    ({"temperature": -0.5}, "temperature", "0 to 100"), ({"temperature": True}, "temperature", "number"),
    ({"temperature": float("nan")}, "temperature", "0 to 100"), ({"top_p": float("inf")}, "top_p", "0 to 1"),
    ({"top_p": -0.1}, "top_p", "0 to 1"), ({"top_k": -2}, "top_k", "greater"), ({"min_p": 1.5}, "min_p", "0 to 1"),
    ({"repetition_penalty": 1e-39}, "repetition_penalty", "0.01 to 100"),
    ({"frequency_penalty": 3}, "frequency_penalty", "-2 to 2"), ({"presence_penalty": -3}, "presence_penalty", "-2"),
    ({"seed": 2**64}, "seed", "less than"), ({"seed": 1.5}, "seed", "integer"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"), ({"stop": ""}, "stop", "1 to 256"), ({"stop": 5}, "stop", "a string"),
    ({"stop": "a" * 257}, "stop", "1 to 256"), ({"stop": [None]}, "stop", "list of strings"),
    ({"logprobs": 21}, "logprobs", "20"), ({"logprobs": True}, "logprobs", "integer"), ({"logprobs": -1}, "logprobs", "0"),
    ({"stream": 1}, "stream", "boolean"), ({"stream_options": {}}, "stream_options", "requires stream=true"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options", "boolean"),
    ({"echo": "yes"}, "echo", "boolean"), ({"suffix": "end"}, "suffix", "not supported"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"), ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias", "each once"), ({"logit_bias": [5]}, "logit_bias", "object"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "greater"), ({"min_tokens": 99}, "min_tokens", "at most max_tokens=12"),
]  # fmt: skip
REFUSED_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty"), ({"messages": "Hello"}, "messages", "array"),
    ({"messages": None}, "messages", "array"), ({"messages": [{"content": "a"}]}, "messages", "required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "parts of content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "parts of content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "tool_calls"),
    ({"messages": [{"role": "user", "content": "a " * 200}]}, "messages", "maximum context length"),
    ({"messages": [{"role": "user", "content": "é" * 5000}]}, "messages", "has at least"),
    ({"logprobs": 1}, "logprobs", "boolean"), ({"top_logprobs": 2}, "top_logprobs", "requires logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"), ({"n": 7}, "n", "at most 6"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"), ({"functions": [{}]}, "functions", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [("/v1/completions", *row) for row in REFUSED] + [("/v1/chat/completions", *row) for row in REFUSED_CHAT],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_served_is_refused(
    site: Site, path: str, change: dict[str, Any], param: str, words: str
) -> None:
    valid = {"prompt": PROMPT, **GREEDY} if path == "/v1/completions" else {**CHAT, **GREEDY}
    answer = site.ask("POST", path, valid | change)
    error = answer.json["error"]
    assert answer.status == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A model whose vocabulary of 384 entries is padded beyond the 320 of its tokenizer."""
    model = dataclasses.replace(served.MODEL, vocabulary=384)
    site = Site(served.LocalService(served.artifact(tmp_path_factory.mktemp("padded"), model)))
    yield site
    site.close()


@pytest.mark.parametrize("token", [320, 383, 384, 2**31 - 1])
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", lambda token: {"prompt": [5, token]}, "prompt"),
        ("/v1/completions", lambda token: {"prompt": [[5], [6, token]]}, "prompt"),
        ("/v1/completions", lambda token: {"prompt": "a", "logit_bias": {str(token): 1}}, "logit_bias"),
        ("/v1/completions", lambda token: {"prompt": "a", "stop_token_ids": [5, token]}, "stop_token_ids"),
        ("/v1/chat/completions", lambda token: CHAT | {"logit_bias": {str(token): 1}}, "logit_bias"),
        ("/v1/chat/completions", lambda token: CHAT | {"stop_token_ids": [token]}, "stop_token_ids"),
        ("/detokenize", lambda token: {"tokens": [5, token]}, "tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ids_that_the_tokenizer_lacks_are_refused(padded: Site, path: str, body: Any, field: str, token: int) -> None:
    assert padded.ask("POST", path, GREEDY | body(319)).status == 200
    answer = padded.ask("POST", path, GREEDY | body(token))
    error = answer.json["error"]
    assert answer.status == 400 and error["param"] == field
    assert error["message"] == f"{field}: token id {token} is not in the vocabulary; use ids from 0 to 319"


def test_biased_tokens_stop_tokens_and_least_lengths(site: Site) -> None:
    token = site.ask("POST", "/tokenize", {"prompt": "cat"}).json["tokens"][0]
    text = site.ask("POST", "/detokenize", {"tokens": [token]}).json["prompt"]
    biased = {"logit_bias": {str(token): 100}, "max_tokens": 12}
    assert site.complete(**biased).text() == 12 * text
    stopped = site.complete(**biased, stop_token_ids=[token]).json
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["choices"][0]["text"] == ""
    later = site.complete(**biased, stop_token_ids=[token], min_tokens=3)
    assert 3 < later.json["usage"]["completion_tokens"] <= 12
    chat = site.chat(**biased, stop_token_ids=[token])
    assert chat.json["choices"][0]["finish_reason"] == "stop"


def test_what_is_off_is_not_refused(site: Site) -> None:
    assert site.complete(suffix="", logit_bias={}, best_of=1, top_k=-1).status == 200
    off = {"tools": [], "tool_choice": "none", "functions": None, "response_format": {"type": "text"}}
    assert site.chat(**off, logit_bias={}).status == 200
    assert site.chat({"role": "assistant", "content": None, "tool_calls": []}).status == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"5", b'"a"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
     b"[" * 60_000, b'{"a":' * 10_000, b'{"prompt": "a", "x": ' + b"[" * 60_000, b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
     b'{"prompt": "a"} {}', b"\xef\xbb\xbf{}"],
    ids=lambda content: content[:30].decode("latin-1"),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(site: Site, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = site.ask("POST", path, content)
        assert answer.status == 400 and answer.json["error"]["message"]


def test_other_refusals(site: Site) -> None:
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
        answer = site.ask(method, path)
        assert answer.status == status and answer.json["error"]["type"] == "invalid_request_error"
    assert {word.strip() for word in answer.headers["Allow"].split(",")} == {"GET", "HEAD"}
    assert site.ask("GET", "/nothing", headers={"Host": "["}).status == 404
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert site.ask("POST", "/tokenize", body).status == 400
    for tokens in ([-1], [2**31], ["a"], [True], None):
        assert site.ask("POST", "/detokenize", {"tokens": tokens}).status == 400


def test_request_ids_come_back_if_they_are_sane(site: Site) -> None:
    assert site.ask("GET", "/health", headers={"X-Request-Id": "mine-1"}).headers.get_all("X-Request-Id") == ["mine-1"]
    for bad in ("a" * 129, "a b", "\xe9", ""):
        name = site.ask("GET", "/nothing", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert name != bad and len(name) == 32
    answer = site.ask("POST", "/v1/completions", {"prompt": "a", **GREEDY}, {"X-Request-Id": "mine-2"})
    assert answer.json["id"] == "cmpl-mine-2"


def test_a_key_guards_v1(artifact: Artifact) -> None:
    site = Site(served.LocalService(artifact), ApiSettings(api_key="secret"))
    try:
        body = {"prompt": PROMPT, **GREEDY}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}, {"Authorization": "Bearer secre\xe9"}, {"Authorization": "Bearer"}):  # fmt: skip
            for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
                answer = site.ask(method, path, body if method == "POST" else None, header)
                assert answer.status == 401 and answer.json["error"]["code"] == "invalid_api_key"
        assert site.metric("requests_rejected_total", reason="unauthorized") == 18
        for header in ("Bearer secret", "bearer secret"):
            assert site.ask("POST", "/v1/completions", body, {"Authorization": header}).status == 200
        assert site.ask("GET", "/health").status == site.ask("GET", "/metrics").status == 200
    finally:
        site.close()


@pytest.mark.parametrize(
    "change", [{"api_key": ""}, {"api_key": "é"}, {"max_body_bytes": 0}, {"max_choices": 0}, {"retry_after_s": 0.0}]
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        ApiSettings(**change)
    assert "secret" not in repr(ApiSettings(api_key="secret"))


# Chat templates


def test_a_template_makes_the_prompt() -> None:
    tokenizer = served.tokenizer()
    text = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m.content }}<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"  # fmt: skip
    messages = [Message(role="user", content="Hi <|endoftext|>")]
    tokens = ChatTemplate(text, Codec(tokenizer)).tokens(messages, 128)
    end = tokenizer.token_to_id("<|endoftext|>")
    first, second = tokenizer.encode("<user> Hi <|endoftext|>").ids, tokenizer.encode("\n<a>").ids
    assert tokens == (end, *first, end, *second) and end not in first  # what a message spells is only text


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no system') }}", "{{ messages.append(1) }}", "{{ messages[5].role.x }}", "{{ 1 / 0 }}", "",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}", "{% include 'a' %}", "{{ f() }}",
        "{{ messages[0].content + 1 }}", "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_that_fails_refuses_the_request(text: str) -> None:
    template = ChatTemplate(text, Codec(served.tokenizer()))
    with pytest.raises(ClientError):
        template.tokens([Message(role="user", content="Hi")], 128)


def test_what_is_no_template_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="chat_template"):
        ChatTemplate("{% for %}", Codec(served.tokenizer()))


# Trouble


def ask_aside(site: Site, path: str, body: Any) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(
        target=lambda: answers.append(Answer(site.send("POST", path, body).getresponse())), daemon=True
    )
    thread.start()
    return thread, answers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_frees_the_engine(site: Site, stream: bool, begun: bool) -> None:
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
    until(lambda: site.service.engine.idle)  # although nothing is computed
    until(lambda: site.metric("request_success_total", finished_reason="abort") == aborted + 2)
    assert site.metric("num_requests_running") == 0


def test_a_full_server_says_so_at_once_and_forgets_nobody(artifact: Artifact) -> None:
    site = Site(served.LocalService(artifact, max_running=1, max_queued=2), ApiSettings(retry_after_s=2.5))
    try:
        expected = site.complete("The cat").text()
        site.service.pause()
        body = {"prompt": "The cat", **GREEDY}
        accepted = [ask_aside(site, "/v1/completions", body | {"stream": stream}) for stream in (True, False)]
        until(lambda: site.service.engine.running + site.service.engine.waiting == 2)
        times = []
        for stream in (False, True) * 3:
            begin = time.monotonic()
            answer = site.ask(
                "POST", "/v1/completions", body | {"prompt": ["a", "b"], "stream": stream}
            )  # one would fit
            times.append(time.monotonic() - begin)
            assert answer.status == 503 and answer.headers["Retry-After"] == "3"
            assert answer.json["error"]["code"] == "queue_full"
            until(lambda: site.service.engine.running + site.service.engine.waiting == 2)
        assert min(times) < 0.1 and site.metric("requests_rejected_total", reason="full") == 6
        site.service.pause(False)
        for thread, answers in accepted:
            thread.join(DEADLINE_S)
            assert answers[0].text() == expected
        assert site.metric("request_success_total", finished_reason="abort") == 0
    finally:
        site.close()


def test_one_answer_that_cannot_be_given_ends_the_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = site.service.engine.submit

    def reject_second(key: int, request: Request) -> None:
        if request.prompt == (7,):
            raise ValueError("7 cannot be served")
        return submit(key, request)

    monkeypatch.setattr(site.service.engine, "submit", reject_second)
    site.service.pause()
    for stream in (False, True):
        answer = site.complete([[5, 6], [7]], stream=stream)
        assert answer.status == 400 and answer.json["error"]["message"] == "7 cannot be served"
        until(lambda: site.service.engine.idle)


class Broken(served.LocalService):
    """Raises `error` after `good` increments."""

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
def test_what_a_service_raises(artifact: Artifact, error: Exception, good: int, status: int) -> None:
    service = Broken(artifact)
    service.error, service.good = error, good
    site = Site(service)
    try:
        answer = site.complete()
        assert answer.status == status and b"secret" not in answer.content and answer.headers["X-Request-Id"]
        assert answer.headers["Retry-After"] == ("5" if status == 503 else None)
        stream = site.complete(stream=True)
        if good:
            assert stream.status == 200 and "error" in stream.events[-1] and len(stream.events) == 2
        else:
            assert stream.status == status and stream.json == answer.json
        assert site.metric("request_success_total", finished_reason="error") == 2 * good
        assert site.metric("num_requests_running") == 0
    finally:
        site.close()


def test_what_nobody_foresaw_is_an_error_body_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.service, "ready", lambda: 1 / 0)
    answer = site.ask("GET", "/ready", headers={"X-Request-Id": "mine"})
    site.local.connection = None
    assert answer.status == 500 and answer.json["error"]["message"] == "Internal server error"
    assert answer.headers["X-Request-Id"] == "mine"


def test_an_engine_that_fails_is_told_of_in_the_stream(site: Site) -> None:
    stream = site.send("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True})  # fmt: skip
    response = stream.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    site.service.failing = True
    rest = response.read().decode().strip().split("\n\n")
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "server_error"


# Metrics


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


# Whatever clients send


def survives(site: Site, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> None:
    """An answer within the deadline, and a sound one."""
    answer = site.ask(method, path, content, headers)
    malformed.sound(method, answer.status, answer.content)


@pytest.fixture(scope="module")
def small(artifact: Artifact) -> Iterator[Site]:
    """A context so short that what happens to be valid is soon done."""
    service = served.LocalService(artifact)
    service.length = 24
    site = Site(service, ApiSettings(max_choices=4))
    yield site
    site.close()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=malformed.bodies("test"))
def test_no_body_breaks_the_server(small: Site, request: tuple[str, bytes]) -> None:
    path, content = request
    survives(small, "POST", path, content, {})


@settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=malformed.ROUTES)
def test_no_path_or_header_breaks_the_server(small: Site, request: malformed.Route) -> None:
    survives(small, *request)


def test_the_server_answers_as_before(small: Site) -> None:
    fresh = small.complete([5, 6, 7], max_tokens=16).text()
    until(lambda: small.service.engine.idle)
    assert small.metric("num_requests_running") == 0 and small.metric("requests_rejected_total", reason="malformed") > 0
    assert fresh == small.complete([5, 6, 7], max_tokens=16).text() != ""
