"""Chat templates and the bytes of tokens."""

from __future__ import annotations

import pytest

from raymoe.serving.http.bodies import Message
from raymoe.serving.http.errors import ClientError
from raymoe.serving.http.prompts import ChatTemplate, Codec, check_context
from tests.support import served
from tests.support.http_site import Site


def test_a_template_builds_the_prompt() -> None:
    tokenizer = served.tokenizer()
    text = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m.content }}<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"  # fmt: skip
    messages = [Message(role="user", content="Hi <|endoftext|>")]
    tokens = ChatTemplate(text, Codec(tokenizer)).tokens(messages, 128)
    end = tokenizer.token_to_id("<|endoftext|>")
    first, second = tokenizer.encode("<user> Hi <|endoftext|>").ids, tokenizer.encode("\n<a>").ids
    assert tokens == (end, *first, end, *second) and end not in first  # a message cannot contain the token


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no system') }}", "{{ messages.append(1) }}", "{{ messages[5].role.x }}", "{{ 1 / 0 }}", "",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}", "{% include 'a' %}", "{{ f() }}",
        "{{ messages[0].content + 1 }}", "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_that_fails_rejects_the_request(text: str) -> None:
    template = ChatTemplate(text, Codec(served.tokenizer()))
    with pytest.raises(ClientError):
        template.tokens([Message(role="user", content="Hi")], 128)


def test_an_invalid_template_is_rejected_at_construction() -> None:
    with pytest.raises(ValueError, match="chat_template"):
        ChatTemplate("{% for %}", Codec(served.tokenizer()))


def test_bytes_of_tokens_concatenate_to_the_text(site: Site) -> None:
    response = site.chat({"role": "user", "content": "🙂 日本語"}, logprobs=True, max_tokens=40, temperature=1, seed=2, ignore_eos=True)  # fmt: skip
    content = response.json["choices"][0]["logprobs"]["content"]
    joined = bytes(byte for entry in content for byte in entry["bytes"])
    assert joined.decode(errors="replace") == response.text() and any("\ufffd" in entry["token"] for entry in content)
    tokens = Codec(site.service.tokenizer)
    for text in (served.TEXT, "<|endoftext|>", "\x00\xff\u0100"):
        ids = site.encode(text)
        assert bytes(byte for token in ids for byte in tokens.bytes(token)) == text.encode()
    assert bytes(tokens.bytes(0)) == b"<|endoftext|>" and tokens.bytes(10**6) == []


def test_the_context_is_a_limit_of_prompt_and_completion() -> None:
    check_context(100, 28, 128)
    with pytest.raises(ClientError) as error:
        check_context(100, 29, 128, "messages")
    assert str(error.value) == (
        "This model's maximum context length is 128 tokens. However, you requested 129 tokens "
        "(100 in the messages, 29 for the completion). Reduce the length of the messages or of the completion."
    )
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")


def test_a_text_that_is_too_long_is_rejected_without_tokenization(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(served.tokenizer())
    monkeypatch.setattr(codec, "tokenizer", None)
    codec.check_length("a" * 128, 128, "prompt")
    with pytest.raises(ClientError, match="the prompt has at least [0-9]+ tokens"):
        codec.check_length("a" * 100_000, 128, "prompt")
