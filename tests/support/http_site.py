"""The HTTP application on a free port of the loopback address, with a client, for tests."""

from __future__ import annotations

import json
import socket
import threading
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry

from raymoe.metrics import ApiMetrics
from raymoe.serving.http.server import ApiSettings, create_app
from tests.support import served

DEADLINE_S = 20.0
"""Maximum time of any request."""
PROMPT = "The cat sat on"
GREEDY = {"temperature": 0, "max_tokens": 12}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


class Response:
    """Status, headers and content of a response."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status, self.headers, self.content = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """Events of a stream without its end mark. The mark is required unless the last event is an error."""
        assert self.headers["Content-Type"].startswith("text/event-stream")
        parts = self.content.decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        datas = [part.removeprefix("data: ") for part in parts]
        if datas[-1] != "[DONE]":
            assert "error" in json.loads(datas[-1])
            return [json.loads(data) for data in datas]
        return [json.loads(data) for data in datas[:-1]]

    def text(self, i: int = 0) -> str:
        """Return the text of choice `i`, streamed or not."""
        if self.headers["Content-Type"].startswith("text/event-stream"):
            choices = [choice for event in self.events for choice in event["choices"] if choice["index"] == i]
            return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
        choice = self.json["choices"][i]
        assert choice["index"] == i
        return choice["text"] if "text" in choice else choice["message"]["content"]


class Site:
    """A server on a free port, and a client of it."""

    def __init__(self, service: served.LocalService, options: ApiSettings | None = None) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        app = create_app(service, options or ApiSettings(), ApiMetrics(self.registry, model=service.name))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_keep_alive=600))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        self.local = threading.local()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

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

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Response:
        """Send a request over the connection of this thread."""
        connection = getattr(self.local, "connection", None) or HTTPConnection(
            "127.0.0.1", self.port, timeout=DEADLINE_S
        )
        self.local.connection = None
        response = Response(self.send(method, path, body, headers, connection).getresponse())
        self.local.connection = connection
        return response

    def complete(self, prompt: Any = PROMPT, **options: Any) -> Response:
        return self.ask("POST", "/v1/completions", {"model": "test", "prompt": prompt, **GREEDY, **options})

    def chat(self, *messages: Any, **options: Any) -> Response:
        given = list(messages) or CHAT["messages"]
        return self.ask("POST", "/v1/chat/completions", {"model": "test", "messages": given, **GREEDY, **options})

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"raymoe_{name}", {"model_name": "test", **labels})
        assert value is not None
        return value

    def encode(self, text: str) -> list[int]:
        return self.service.tokenizer.encode(text).ids
