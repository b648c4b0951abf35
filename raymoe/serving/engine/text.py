"""From tokens to text: incremental detokenization, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Incremental detokenization: the results of `push` and `flush` join to the text of all tokens.

    context: preceding tokens, whose text is not returned. A character is returned when all of its bytes are complete.
    """

    CONTEXT = 24
    """Tokens of the context that are decoded: the text of a token depends on its neighbors."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._pending: list[int] = []
        """Tokens since the last text."""
        self._skip = 0
        """Characters of the next text that belong to the context."""
        for token in context[-self.CONTEXT :]:
            self.push(token)
        self._skip = max(0, len(self._pending_text()) - 1)  # the last character may continue after the context

    def _pending_text(self) -> str:
        return self.tokenizer.decode(self._pending, skip_special_tokens=False) if self._pending else ""

    def push(self, token: int) -> str:
        """Append a token; return the text that is complete now."""
        self._pending.append(token)
        text = self._stream.step(self.tokenizer, token)
        if text is None:
            return ""
        self._pending.clear()
        text, self._skip = text[self._skip :], 0
        return text

    def flush(self) -> str:
        """Return the text of incomplete characters at the end."""
        text, self._skip = self._pending_text()[self._skip :], 0
        self._pending.clear()
        return text


class StopStrings:
    """Return text up to the first stop string, and never a part of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._withheld = ""

    def push(self, text: str) -> str:
        """Append text; return the text that cannot be part of a stop string."""
        text = self._withheld + text
        first = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.found, self._withheld = True, ""
            return text[:first]
        length = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._withheld = text[len(text) - length :]
        return text[: len(text) - length]

    def flush(self) -> str:
        """Return the withheld text at the end."""
        text, self._withheld = self._withheld, ""
        return text
