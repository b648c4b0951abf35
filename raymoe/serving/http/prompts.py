"""Prompts as token ids: tokenization, chat templates, and the limits of the context and the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders

from raymoe.data import chat
from raymoe.data.tokens import END_OF_TEXT, vocabulary_size
from raymoe.serving.http.bodies import Message
from raymoe.serving.http.errors import ClientError

DEFAULT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
"""Chat template of an artifact that has none."""


def check_context(prompt_tokens: int, max_tokens: int, length: int, field: str = "prompt") -> None:
    """Raise ClientError (a ValueError) unless a prompt and its completion fit in a context of `length` tokens."""
    total = prompt_tokens + max_tokens
    if total > length:
        tokens = f"you requested {total} tokens ({prompt_tokens} in the {field}, {max_tokens} for the completion)"
        raise _context_error(length, tokens, field)


def _context_error(length: int, fact: str, field: str) -> ClientError:
    message = (
        f"This model's maximum context length is {length} tokens. However, {fact}. "
        f"Reduce the length of the {field} or of the completion."
    )
    return ClientError(message, field, code="context_length_exceeded", reason="too_long")


class Codec:
    """A tokenizer with the operations of the API."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        end = tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
        self.end: int = end
        self.size = vocabulary_size(tokenizer)
        """Number of token ids. The model's vocabulary may be padded beyond it."""
        self._longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._alphabet = _byte_alphabet() if isinstance(tokenizer.decoder, decoders.ByteLevel) else {}
        self._texts: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokenize `text`, by default as training does: without the special tokens of the tokenizer."""
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def check_ids(self, ids: Iterable[int], field: str) -> None:
        """Raise ClientError for a token id that the tokenizer does not have."""
        bad = next((token for token in ids if not 0 <= token < self.size), None)
        if bad is not None:
            raise ClientError(
                f"{field}: token id {bad} is not in the vocabulary; use ids from 0 to {self.size - 1}", field
            )

    def check_length(self, text: str, length: int, field: str) -> None:
        """Raise ClientError for a text that has more than `length` tokens for certain, without tokenizing it."""
        at_least = len(text.encode()) // self._longest
        if at_least > length:
            raise _context_error(length, f"the {field} has at least {at_least} tokens", field)

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]

    def bytes(self, token: int) -> list[int]:
        """Return the bytes of a token. A character may have bytes in several tokens."""
        try:
            return [self._alphabet[character] for character in self.tokenizer.id_to_token(token) or ""]
        except KeyError:
            return list(self.text(token).encode())


def _byte_alphabet() -> dict[str, int]:
    """Characters with which byte-level BPE represents bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(other)}


class ChatTemplate:
    """Converts messages to a prompt, with the template and the rendering of training (`raymoe.data.chat`).

    `text` is a Hugging Face chat template; None selects DEFAULT_TEMPLATE. Raises ValueError for an invalid template.
    """

    def __init__(self, text: str | None, codec: Codec) -> None:
        self.text = DEFAULT_TEMPLATE if text is None else text
        self._codec = codec
        self._template = chat.ChatTemplate(self.text)

    def tokens(self, messages: Sequence[Message], length: int) -> tuple[int, ...]:
        """Return the prompt of `messages`. Raises ClientError, also for a prompt that cannot fit in `length` tokens."""
        if not messages:
            raise ClientError("messages is empty: send at least one message", "messages")
        plain = [{"role": message.role, "content": _content(message)} for message in messages]
        try:
            parts = self._template.render(plain, add_generation_prompt=True)
        except ValueError as error:
            raise ClientError(f"The chat template rejects these messages: {error}", "messages") from None
        self._codec.check_length("".join(parts), length, "messages")
        tokens = self._codec.encode(parts[0])
        for part in parts[1:]:
            tokens += [self._codec.end, *self._codec.encode(part)]
        if not tokens:
            raise ClientError("The chat template produces an empty prompt for these messages", "messages")
        return tuple(tokens)


def _content(message: Message) -> str:
    if message.tool_calls:
        raise ClientError("messages: tool_calls is not supported", "messages")
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise ClientError('messages: parts of content must be {"type": "text", "text": …}', "messages")
    return "\n".join(part.text or "" for part in message.content)
