"""Tokenizers: byte-level BPE, trained here or loaded, and the encoding of documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raymoe.data.sources import Document

END_OF_TEXT = "<|endoftext|>"
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
    """Return the token ids of documents joined by end-of-text, encoded in parallel over documents.

    Pieces of one file are not separated. `progress` receives the characters encoded since its last call.
    Raises ValueError if a given tokenizer cannot encode the text.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=kind)
    parts: list[np.ndarray] = []
    for batch in _batches(texts):
        try:
            encodings = tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
        except BaseException as error:
            what = "the tokenizer cannot encode this text: give another data.tokenizer"
            raise _as_value_error(error, what) from None
        for document, encoding in zip(batch, encodings, strict=True):
            parts.append(np.array(encoding.ids, dtype=kind))
            if document.last:
                parts.append(end)
        if progress:
            progress(sum(len(d.text) for d in batch))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


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
