"""Random malformed requests to the API, and the check of a response to them."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

Route = tuple[str, str, bytes | None, dict[str, str]]
"""Method, path, body, headers."""

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**31, -(2**63), 2**64, 10**40, -1, 0])
    | st.floats() | st.text(max_size=20) | st.sampled_from(["\ud800", "\x00", "<|endoftext|>", "é" * 300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "The cat sat on", "max_tokens": 2, "n": 1, "stop": ["x"], "seed": 1, "stream": False, "top_p": 0.9,
        "temperature": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "logprobs": 2,
        "presence_penalty": 0.1, "ignore_eos": True, "echo": True, "best_of": None, "stream_options": None,
        "suffix": None, "logit_bias": None,
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "n": 1, "logprobs": True, "top_logprobs": 1,
        "stream": True, "stream_options": {"include_usage": True}, "tools": None, "response_format": None,
        "max_completion_tokens": 2, "stop": None, "seed": 0,
    },
    "/tokenize": {"prompt": "The cat sat on", "add_special_tokens": True, "messages": None},
    "/detokenize": {"tokens": [1, 2, 3]},
}  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn, model: str) -> tuple[str, bytes]:
    """Draw a valid body with some fields changed, added or removed, and sometimes with changed bytes."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = VALID[path] | {"model": model}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(body) or ["a"]) | st.text(max_size=10))
        if draw(st.integers(0, 4)):
            body[name] = draw(VALUES)
        else:
            body.pop(name, None)
    content = json.dumps(body).encode()
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 3)) :]
    return path, content


def bodies(model: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """Paths and bodies of POST requests, most of them for this model."""
    anything = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode())
    return mutations(model) | st.tuples(st.sampled_from(sorted(VALID)), anything)


ROUTES: st.SearchStrategy[Route] = st.tuples(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    (st.sampled_from(["/v1/completions", "/v1/models/", "/health", "/tokenize", "/"]) | st.text(max_size=12)).map(
        lambda path: "/" + quote(path.lstrip("/").encode("utf-8", "replace"))
    ),
    st.none() | st.binary(max_size=20),
    st.dictionaries(
        st.sampled_from(["X-Request-Id", "Authorization", "Content-Type", "Accept", "Content-Encoding"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20),
    ),
)


def check(method: str, status: int, content: bytes) -> None:
    """Assert that a response is a success, or an error of the client with a message."""
    assert status in (200, 400, 401, 404, 405, 413, 415), content
    if status != 200 and method != "HEAD":
        error = json.loads(content)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
