"""The paged cache: every block has one owner or none, and what is written is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import ModelSection
from raymoe.serving.engine.kv_cache import CacheFull, KVCache

MODEL = ModelSection(layers=2, d_model=16, heads=4, kv_heads=2)
TOKEN_BYTES = 2 * 2 * 2 * 4 * 4
"""Keys and values, 2 layers, 2 heads of 4, float32."""


def cache(blocks: int, block: int = 4) -> KVCache:
    return KVCache(MODEL, blocks * block * TOKEN_BYTES, torch.float32, block)


def test_the_budget_bounds_the_tokens() -> None:
    kv = KVCache(MODEL, 1000 * TOKEN_BYTES + 5, torch.float32)
    assert (kv.block, kv.capacity, kv.free) == (16, 992, 992)
    assert kv.bytes == 992 * TOKEN_BYTES <= 1000 * TOKEN_BYTES
    assert KVCache(MODEL, 1000 * TOKEN_BYTES, torch.bfloat16).capacity == 2000


def test_what_can_never_work_is_refused() -> None:
    with pytest.raises(ValueError, match="one block of 16 tokens takes 2,048"):
        KVCache(MODEL, 2047, torch.float32)
    with pytest.raises(ValueError, match="block=0"):
        KVCache(MODEL, 2047, torch.float32, block=0)
    kv = cache(2)
    kv.allocate("a", 4)
    with pytest.raises(ValueError, match="'a' already owns blocks"):
        kv.allocate("a", 4)
    with pytest.raises(CacheFull, match="5 tokens need 2 blocks of 4; 1 of 2 are free"):
        kv.allocate("b", 5)
    kv.allocate("b", 4)
    kv.release("a")
    with pytest.raises(KeyError):
        kv.release("a")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=40))
def test_no_block_is_shared_or_lost(actions: list[tuple[int, int]]) -> None:
    """(owner, tokens): allocate if it has none, else release."""
    kv, owned = cache(9), {}
    for owner, tokens in actions:
        if owner in owned:
            kv.release(owner)
            del owned[owner]
        elif kv.fits(tokens):
            kv.allocate(owner, tokens)
            owned[owner] = -(-tokens // 4)
        else:
            with pytest.raises(CacheFull):
                kv.allocate(owner, tokens)
        held = [block for o, n in owned.items() if n for block in kv.tables([o], n * 4)[0].tolist()]
        assert len(held) == sum(owned.values()) == len(set(held))
        assert kv.free == 4 * (9 - len(held))
    for owner in owned:
        kv.release(owner)
    assert kv.free == kv.capacity


def test_each_owner_reads_what_it_wrote() -> None:
    kv = cache(8)
    generator = torch.Generator().manual_seed(0)
    kv.allocate("gone", 8)
    lengths = {"a": 7, "b": 3}
    for owner, n in lengths.items():
        kv.allocate(owner, n)
    kv.release("gone")
    kv.allocate("c", 16)  # its blocks are not in order
    lengths["c"] = 16
    written = {}
    for owner, n in lengths.items():
        table, position = kv.tables([owner], n)[0], torch.arange(n)
        slots = table[position // 4] * 4 + position % 4
        for layer in range(2):
            written[owner, layer] = torch.randn(2, n, 2, 4, generator=generator)
            kv.write(layer, slots, *written[owner, layer])
    for layer in range(2):
        for found, which in zip(kv.read(layer, kv.tables(list(lengths), 16)), (0, 1), strict=True):
            for row, (owner, n) in zip(found, lengths.items(), strict=True):
                assert torch.equal(row[:, :n].transpose(0, 1), written[owner, layer][which])
