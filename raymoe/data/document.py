"""Documents: the unit that sources yield, that is held out, and that is tokenized."""

from __future__ import annotations

from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Name of a chat template in the folder of a corpus, a run or an artifact."""


class Piece(NamedTuple):
    """A part of a document that is tokenized by itself."""

    text: str
    end: bool
    """Whether the end-of-text token follows."""
    counted: bool
    """Whether its tokens, with that end-of-text token, are targets of the loss."""


class Document(NamedTuple):
    """A text of one domain."""

    domain: str
    split: str | None
    """`train`, `validation` or `test` if the source names it."""
    text: str
    last: bool = True
    """Whether end-of-text follows. False between the pieces of one file."""
    pieces: tuple[Piece, ...] = ()
    """Of a conversation: the rendered text, in pieces that count as targets or do not. Empty for a plain text."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text that counts: all of a plain text, the answers of a conversation."""
        texts = [piece.text for piece in self.pieces if piece.counted] if self.pieces else [self.text]
        return sum(len(text.encode()) for text in texts)
