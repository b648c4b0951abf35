"""Token sequences of examples, their truncation, and batches that contain each example once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.data.tokens import END_OF_TEXT
from raymoe.finetune.batches import LENGTH_STEP, by_length, encode_examples, epoch, pad
from raymoe.finetune.tasks import Example
from tests.support.served import tokenizer

TOKENIZER = tokenizer()
END = TOKENIZER.token_to_id(END_OF_TEXT)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def test_end_of_text_starts_each_sentence() -> None:
    found = encode_examples(TOKENIZER, [Example("the cat", None, 1), Example("", None, 0)], 64)
    assert [row.tolist() for row in found.sequences] == [[END, *ids("the cat")], [END]]
    assert found.label_N.tolist() == [1, 0] and found.truncated == 0
    pair = encode_examples(TOKENIZER, [Example("the cat", "a dog", 1), Example("the", "", 1)], 64)
    assert pair.sequences[0].tolist() == [END, *ids("the cat"), END, *ids("a dog")]
    assert pair.sequences[1].tolist() == [END, *ids("the"), END]


def test_a_text_that_spells_end_of_text_is_plain_text() -> None:
    found = encode_examples(TOKENIZER, [Example(f"a{END_OF_TEXT}b", None, 1), Example("dog", None, 0)], 64)
    assert (found.sequences[0] == END).sum() == 1
    assert found.sequences[1].tolist() == [END, *ids("dog")]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(3, 16))
def test_the_longer_sentence_loses_tokens_first(a: int, b: int, context: int) -> None:
    first, second = "xq" * 20, "zj" * 20
    one, two = TOKENIZER.decode(ids(first)[:a]), TOKENIZER.decode(ids(second)[:b])
    a, b = len(ids(one)), len(ids(two))
    found = encode_examples(TOKENIZER, [Example(one, two, 0)], context)
    row = found.sequences[0].tolist()
    split = row.index(END, 1)
    kept_a, kept_b = split - 1, len(row) - split - 1
    assert row[1:split] == ids(one)[:kept_a] and row[split + 1 :] == ids(two)[:kept_b]
    assert len(row) == min(a + b + 2, context) and found.truncated == (a + b + 2 > context)
    if kept_a < a and kept_b < b:
        assert abs(kept_a - kept_b) <= 1
    elif kept_a < a:
        assert kept_a >= kept_b - 1
    elif kept_b < b:
        assert kept_b >= kept_a - 1


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.context=2"):
        encode_examples(TOKENIZER, [Example("a", None, 0)], 2)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 40))
def test_an_epoch_has_each_example_once_and_each_seed_its_order(lengths: list[int], batch: int) -> None:
    array = np.array(lengths)
    batches = epoch(array, batch, np.random.default_rng((0, 1)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch) and max(map(len, batches)) <= batch
    again = epoch(array, batch, np.random.default_rng((0, 1)))
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]
    assert sorted(np.concatenate(list(by_length(array, batch))).tolist()) == list(range(len(lengths)))


def test_batches_of_an_epoch_have_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    batches = epoch(lengths, 32, np.random.default_rng(1))
    padding = sum(lengths[b].max() * len(b) for b in batches) / lengths.sum()
    assert padding < 1.05
    assert [b.tolist() for b in epoch(lengths, 32, np.random.default_rng(2))] != [b.tolist() for b in batches]


def test_padding_is_on_the_right_and_the_last_token_is_found() -> None:
    encoded = encode_examples(TOKENIZER, [Example("the cat sat", None, 1), Example("", None, 0)], 64)
    tokens_BS, last_B = pad(encoded, np.array([1, 0]))
    assert tokens_BS.shape[1] % LENGTH_STEP == 0 and last_B.tolist() == [0, len(encoded.sequences[0]) - 1]
    assert tokens_BS[1, : last_B[1] + 1].tolist() == encoded.sequences[0].tolist()
    assert torch.equal(tokens_BS[0], torch.full_like(tokens_BS[0], END))
    short = encode_examples(TOKENIZER, [Example("the cat sat on the mat", None, 1)], 5)
    assert pad(short, np.array([0]))[0].shape == (1, 5)
