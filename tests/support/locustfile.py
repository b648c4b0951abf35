"""Users for locust: one streams completions, one requests whole chat completions.

The environment has the model (RAYMOE_MODEL) and the key (RAYMOE_API_KEY).
"""

from __future__ import annotations

import json
import os
from typing import Any

from locust import HttpUser, between, task

MODEL = os.environ["RAYMOE_MODEL"]
HEADERS = {"Authorization": f"Bearer {os.environ['RAYMOE_API_KEY']}"}
TOKENS = 8


class Reader(HttpUser):
    """Fails unless all tokens and the end mark arrive."""

    wait_time = between(0.01, 0.1)

    @task
    def read(self) -> None:
        body = {
            "model": MODEL, "prompt": "The cat sat on", "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        asked: dict[str, Any] = {"json": body, "headers": HEADERS, "stream": True, "catch_response": True}
        with self.client.post("/v1/completions", name="streamed completion", **asked) as response:
            events = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {events}")
            elif events[-1] != b"[DONE]" or json.loads(events[-2])["usage"]["completion_tokens"] != TOKENS:
                response.failure(f"the stream ended with {events[-2:]}")


class Asker(HttpUser):
    wait_time = between(0.01, 0.1)

    @task
    def ask(self) -> None:
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": "The dog"}], "max_tokens": TOKENS, "ignore_eos": True,
        }  # fmt: skip
        asked: dict[str, Any] = {"json": body, "headers": HEADERS, "catch_response": True}
        with self.client.post("/v1/chat/completions", name="chat", **asked) as response:
            if response.status_code != 200 or response.json()["usage"]["completion_tokens"] != TOKENS:
                response.failure(f"{response.status_code}: {response.text}")
