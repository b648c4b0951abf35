"""Conversations: a Jinja chat template turns messages into text, of which only the assistant's answers are targets.

Training and serving render with the same class, and each answer is tokenized by itself after its prompt, as the server
does it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raymoe.data.document import END_OF_TEXT, Piece

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Default template of training on conversations. An answer ends with end-of-text, so that a completion ends there."""

ASSISTANT = "assistant"


class ChatTemplate:
    """A Hugging Face chat template in a sandbox that runs no code of the template.

    Only the template produces the end-of-text token: in a message the same characters are ordinary text.
    """

    def __init__(self, text: str) -> None:
        """Raises ValueError for an invalid template."""
        self.text = text
        self._mark = f"\ue000{secrets.token_hex(16)}\ue000"  # replaces the token in the text; clients cannot guess it
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        try:
            self._template = environment.from_string(text.replace(END_OF_TEXT, self._mark))
        except Exception as error:  # the compiler also raises SyntaxError, RecursionError and others
            raise ValueError(f"chat_template is not a valid Jinja template: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> list[str]:
        """Return the text of messages (`role`, `content`), split at its end-of-text tokens.

        Raises ValueError if the template rejects them.
        """
        return self._render(messages, add_generation_prompt).split(self._mark)

    def pieces(self, messages: Sequence[Mapping[str, str]]) -> tuple[Piece, ...]:
        """Return the pieces of a conversation. The answers count, each up to and with its first end-of-text token.

        The conversation ends with end-of-text; one that the template does not write counts after an answer. Raises
        ValueError if the template rejects the messages, or renders the beginning of a conversation differently when
        it continues, so that the answers have no fixed place.
        """
        found: list[Piece] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt, whole = self._render(messages[:i], True), self._render(messages[: i + 1], False)
            _require_prefix(done, prompt, i)
            _require_prefix(prompt, whole, i)
            end = whole.find(self._mark, len(prompt))
            stop = end + len(self._mark) if end >= 0 else len(whole)
            found += self._split(prompt[len(done) :], counted=False) + self._split(
                whole[len(prompt) : stop], counted=True
            )
            done = whole[:stop]
        whole = self._render(messages, False)
        _require_prefix(done, whole, len(messages) - 1)
        found += self._split(whole[len(done) :], counted=False)
        if found and not found[-1].end:
            found[-1] = found[-1]._replace(end=True)
        return tuple(found)

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, eos_token=self._mark,
                bos_token=self._mark,
            )  # fmt: skip
        except Exception as error:  # a template may raise anything
            raise ValueError(str(error)) from None

    def _split(self, text: str, *, counted: bool) -> list[Piece]:
        *ended, rest = text.split(self._mark)
        return [Piece(part, True, counted) for part in ended] + ([Piece(rest, False, counted)] if rest else [])


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _require_prefix(prefix: str, text: str, index: int) -> None:
    if not text.startswith(prefix):
        raise ValueError(
            f"the template writes the messages before message {index} differently when the conversation continues, so "
            "that the answers have no fixed place: use a template that only appends"
        )


def read_messages(value: Any) -> list[dict[str, str]]:
    """Return the messages of a row in the OpenAI format, as role and content.

    A content may be a list of parts of type text. Raises ValueError, without the place, for anything else and for a
    conversation without an answer of the assistant.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of messages, at least one")
    messages = [_message(item, i) for i, item in enumerate(value)]
    if not any(message["role"] == ASSISTANT and message["content"] for message in messages):
        raise ValueError(
            f"no message of the role {ASSISTANT!r} has content, so there is no answer to learn: remove the line"
        )
    return messages


def _message(item: Any, index: int) -> dict[str, str]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or not item["role"]:
        raise ValueError(f"message {index} must be an object with role and content, both text")
    content = item.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "\n".join(part for part in parts if isinstance(part, str)) if None not in parts else None
    if item.get("tool_calls") or not isinstance(content, str):
        raise ValueError(f"message {index} has no text content: calls of tools, images and audio are not supported")
    return {"role": item["role"], "content": content}
