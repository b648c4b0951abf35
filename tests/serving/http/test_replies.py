"""Responses to valid requests: whole and streamed completions and chats, usage, seeds and log-probabilities."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from raymoe.serving.engine.request import Echo, Increment, Request, Usage
from raymoe.serving.engine.sampling import LogProb
from raymoe.serving.http.bodies import CompletionBody
from raymoe.serving.http.prompts import Codec
from raymoe.serving.http.replies import CompletionReply, to_json
from raymoe.storage.artifact import Artifact
from tests.support import served
from tests.support.http_site import CHAT, GREEDY, PROMPT, Site


def test_a_completion(site: Site) -> None:
    response = site.complete()
    body = response.json
    assert response.status == 200 and body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"] == f"cmpl-{response.headers['X-Request-Id']}" and body["object"] == "text_completion"
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
    response = site.chat({"role": "user", "content": [{"type": "text", "text": "Hello"}]})
    body = response.json
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": response.text(), "refusal": None}
    assert response.text() == site.complete("user: Hello\nassistant:").text() == site.chat().text()
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
    assert whole["prompt_tokens"] == sum(prompts)  # a prompt counts once, regardless of its choices
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


def test_choices_of_a_batch_are_in_order(site: Site) -> None:
    prompts = ["The cat", "42 birds", "日本語"]
    alone = [site.complete(prompt, temperature=1, seed=5, n=2) for prompt in prompts]
    texts = [response.text(i) for response in alone for i in range(2)]
    together = site.complete(prompts, temperature=1, seed=5, n=2)
    assert [together.text(i) for i in range(6)] == texts and len(set(texts)) == 6
    as_tokens = site.complete([site.encode(prompt) for prompt in prompts], temperature=1, seed=5, n=2)
    assert [as_tokens.text(i) for i in range(6)] == texts
    assert site.complete(site.encode("The cat"), temperature=1, seed=6).text() == texts[1]  # choice 1 has the next seed


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
        response = site.complete(max_tokens=30, ignore_eos=True, stop=stops)
        assert response.text() == text[: text.index(stop)] and response.json["choices"][0]["finish_reason"] == "stop"


def test_logit_bias_stop_token_ids_and_min_tokens(site: Site) -> None:
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


def test_likelihoods_equal_those_of_evaluation(site: Site, artifact: Artifact) -> None:
    """The request of lm-eval: a prompt of tokens, echo, and one token more."""
    prompts, model = [site.encode(served.TEXT)[:n] for n in (40, 23)], served.whole(artifact)
    response = site.complete(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for tokens, choice in zip(prompts, response.json["choices"], strict=True):
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
        assert given["token_logprobs"][-1] == best[-1]  # the greedy token is exactly the best
        text = site.service.tokenizer.decode(tokens)
        assert choice["text"].startswith(text)
        for token, at in zip(given["tokens"][:-1], given["text_offset"], strict=False):
            assert "\ufffd" in token or text[at : at + len(token)] == token
        assert given["text_offset"][-1] == len(text)


def test_logprobs_have_the_requested_size(site: Site) -> None:
    for count in (0, 3):
        given = site.complete(logprobs=count, ignore_eos=True).json["choices"][0]["logprobs"]
        assert all(1 <= len(top) <= count + 1 for top in given["top_logprobs"])
        assert len(given["tokens"]) == 12 and given["text_offset"][0] == 0
    stream = site.complete(logprobs=3, ignore_eos=True, stream=True)
    pieces = [event["choices"][0]["logprobs"] for event in stream.events]
    assert {key: [v for piece in pieces for v in piece[key]] for key in given} == given
    chat = site.chat(logprobs=True, ignore_eos=True).json["choices"][0]["logprobs"]["content"]
    assert len(chat) == 12 and all(entry["top_logprobs"] == [] for entry in chat)


def test_infinite_logprobs_become_the_smallest_value() -> None:
    request = Request((1, 2), 1, logprobs=1, echo=True)
    reply = CompletionReply("x", "test", CompletionBody(), [request], Codec(served.tokenizer()))
    bad = LogProb(2, float("-inf"), ((1, float("nan")),))
    reply.add(0, Increment(1, 2, "b", Usage(2, 1), bad, Echo("ab", (None, bad)), "length"))
    (choice,) = json.loads(to_json(reply.whole()))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0, -9999.0]
