"""Validation of bodies: each invalid field is rejected with its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import served
from tests.support.http_site import CHAT, GREEDY, PROMPT, Site

REJECTED: list[tuple[dict[str, Any], str, str]] = [
    # Change of a valid completion body, the field in the error, and words of the message
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


REJECTED_CHAT: list[tuple[dict[str, Any], str, str]] = [
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
    [("/v1/completions", *row) for row in REJECTED] + [("/v1/chat/completions", *row) for row in REJECTED_CHAT],
    ids=lambda value: str(value)[:40],
)
def test_invalid_fields_are_rejected_by_name(
    site: Site, path: str, change: dict[str, Any], param: str, words: str
) -> None:
    valid = {"prompt": PROMPT, **GREEDY} if path == "/v1/completions" else {**CHAT, **GREEDY}
    response = site.ask("POST", path, valid | change)
    error = response.json["error"]
    assert response.status == 400 and error.keys() == {"message", "type", "param", "code"}
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
def test_ids_beyond_the_tokenizer_are_rejected(padded: Site, path: str, body: Any, field: str, token: int) -> None:
    assert padded.ask("POST", path, GREEDY | body(319)).status == 200
    response = padded.ask("POST", path, GREEDY | body(token))
    error = response.json["error"]
    assert response.status == 400 and error["param"] == field
    assert error["message"] == f"{field}: token id {token} is not in the vocabulary; use ids from 0 to 319"


def test_empty_values_of_unsupported_fields_are_accepted(site: Site) -> None:
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
def test_bodies_that_are_not_json_objects_are_rejected(site: Site, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = site.ask("POST", path, content)
        assert response.status == 400 and response.json["error"]["message"]
