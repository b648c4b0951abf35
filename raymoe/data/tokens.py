"""Tokenizers: byte-level BPE, trained here or loaded, and the encoding of documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raymoe.data.document import END_OF_TEXT, Document, Piece

ENCODED_AT_ONCE = 4_000_000
"""Approximate characters that are encoded in parallel. Encodings take a hundred times their memory for a moment."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocabulary` entries, lossless for any text."""
    if vocabulary < 257:
        raise ValueError(f"model.vocabulary={vocabulary} is not allowed: 256 bytes and {END_OF_TEXT} need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(content: bytes, name: str, vocabulary: int) -> Tokenizer:
    """Load a tokenizer.json so that it encodes any text completely and as plain text.

    Truncation and padding are off, and a text that spells a special token is plain text.
    Raises ValueError if `content` is not a tokenizer.json or has ids of `vocabulary` or more.
    """
    try:
        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens([END_OF_TEXT])  # an existing one keeps its id
        tokenizer.encode_special_tokens = True
        size = vocabulary_size(tokenizer)
    except BaseException as error:
        raise _as_value_error(error, f"data.tokenizer={name}: not a tokenizer.json") from None
    if size > vocabulary:
        raise ValueError(
            f"data.tokenizer={name} has {size} entries and model.vocabulary={vocabulary}: "
            f"set model.vocabulary={size} or more"
        )
    return tokenizer


def _as_value_error(error: BaseException, what: str) -> BaseException:
    """Return a ValueError for an error of the tokenizer; its Rust panics are not Exceptions. Others are returned as is."""
    from_tokenizer = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return ValueError(f"{what} ({error})") if from_tokenizer else error


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(
    tokenizer: Tokenizer,
    texts: Iterable[Document],
    kind: type = np.uint32,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Return the token ids of documents joined by end-of-text [N]: see `encode_counted`."""
    return encode_counted(tokenizer, texts, kind, progress)[0]


def encode_counted(
    tokenizer: Tokenizer,
    texts: Iterable[Document],
    kind: type = np.uint32,
    progress: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of documents joined by end-of-text [N], and 1 for each that counts as a target [N] uint8.

    Documents are encoded in parallel. All tokens of a plain text count; pieces of one file are not separated.
    `progress` receives the characters encoded since its last call.
    Raises ValueError if a given tokenizer cannot encode the text.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=kind)
    parts: list[np.ndarray] = [np.zeros(0, dtype=kind)]
    runs: list[tuple[int, bool]] = []
    for batch in _batches(texts):
        pieces = [piece for document in batch for piece in document.pieces or _whole(document)]
        try:
            encodings = tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        except BaseException as error:
            what = "the tokenizer cannot encode this text: give another data.tokenizer"
            raise _as_value_error(error, what) from None
        for piece, encoding in zip(pieces, encodings, strict=True):
            parts.append(np.array(encoding.ids, dtype=kind))
            if piece.end:
                parts.append(end)
            runs.append((len(encoding.ids) + piece.end, piece.counted))
        if progress:
            progress(sum(len(d.text) for d in batch))
    lengths, counted = [length for length, _ in runs], [counts for _, counts in runs]
    return np.concatenate(parts), np.repeat(np.array(counted, dtype=np.uint8), np.array(lengths, dtype=np.int64))


def _whole(document: Document) -> tuple[Piece]:
    return (Piece(document.text, document.last, True),)


def _batches(texts: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in texts:
        batch.append(document)
        size += len(document.text)
        if size >= ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
