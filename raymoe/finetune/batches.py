"""Examples as token sequences, and batches of sequences of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from raymoe.data.document import END_OF_TEXT, Document
from raymoe.data.tokens import encode
from raymoe.finetune.tasks import Example

POOL = 50
"""Batches that are sorted by length together. A larger pool pads less and orders the examples less randomly."""

LENGTH_STEP = 8
"""Sequences are padded to a multiple of this many tokens: oneDNN compiles a bfloat16 product for each new shape."""


@dataclass(frozen=True)
class Encoded:
    """Token sequences of examples and their labels."""

    sequences: list[np.ndarray]
    """int64 ids of each example."""
    label_N: np.ndarray
    """float64."""
    truncated: int
    """Number of examples that were longer than the context."""
    context: int
    end_of_text: int


def encode_examples(tokenizer: Tokenizer, examples: Sequence[Example], context: int) -> Encoded:
    """Return `<|endoftext|> first` or `<|endoftext|> first <|endoftext|> second` of each example.

    End-of-text starts a document in training; with it, the sequence of an empty sentence has a token too. A sequence
    that exceeds the context loses the last tokens of its sentences, those of the longer one first. Raises ValueError
    for a context below 3.
    """
    if context < 3:
        raise ValueError(f"model.context={context} is not allowed for fine-tuning: two sentences need at least 3")
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, f"load_tokenizer adds {END_OF_TEXT}"
    texts = [text for example in examples for text in (example.first, example.second) if text is not None]
    stream = encode(tokenizer, (Document("", None, text) for text in texts))
    # `encode` ends each text with end-of-text, which no text contains: special tokens in a text are plain text.
    pieces = iter(np.split(stream.astype(np.int64), np.flatnonzero(stream == end) + 1))
    sequences: list[np.ndarray] = []
    truncated = 0
    for example in examples:
        parts = [next(pieces)[:-1] for text in (example.first, example.second) if text is not None]
        kept = _kept([len(part) for part in parts], context - len(parts))
        truncated += kept != [len(part) for part in parts]
        sequences.append(
            np.concatenate([x for part, n in zip(parts, kept, strict=True) for x in (np.array([end]), part[:n])])
        )
    assert not len(next(pieces)), "the tokenizer made another number of texts"
    return Encoded(sequences, np.array([e.label for e in examples], dtype=np.float64), truncated, context, end)


def _kept(lengths: list[int], budget: int) -> list[int]:
    """Return how many tokens of one or two sentences stay, at most `budget` together."""
    if len(lengths) == 1:
        return [min(lengths[0], budget)]
    first = min(lengths[0], max((budget + 1) // 2, budget - lengths[1]))
    return [first, min(lengths[1], budget - first)]


def epoch(lengths: np.ndarray, batch: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the batches of an epoch: each example once, in random order, with similar lengths in a batch."""
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch * POOL):
        pool = order[start : start + batch * POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return [batches[i] for i in generator.permutation(len(batches))]


def by_length(lengths: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Yield batches of all examples in order of length."""
    order = np.argsort(lengths, kind="stable")
    yield from (order[i : i + batch] for i in range(0, len(order), batch))


def pad(encoded: Encoded, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, S] of some examples, padded right with end-of-text, and the index of each last token [B]."""
    rows = [encoded.sequences[i] for i in indices]
    longest = max(len(row) for row in rows)
    tokens_BS = np.full(
        (len(rows), min(-(-longest // LENGTH_STEP) * LENGTH_STEP, encoded.context)), encoded.end_of_text
    )
    for tokens_S, row in zip(tokens_BS, rows, strict=True):
        tokens_S[: len(row)] = row
    return torch.from_numpy(tokens_BS), torch.tensor([len(row) - 1 for row in rows])
