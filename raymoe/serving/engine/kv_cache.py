"""Keys and values of all requests in one preallocated pool of blocks.

A request owns whole blocks in any order: its token i is in its block i // block, at i % block. Blocks for the whole
length of a request are allocated on admission, so that no request waits in the middle of its completion.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from raymoe.config import ModelSection


class CacheFull(Exception):
    """Not enough free blocks: retry when a request has ended."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros: masked slots are multiplied by zero, so they must be finite. From numpy: the operating system then
    commits memory only to pages that are written."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class KVCache:
    """keys, values: [layers, slots, kv_heads, head_dim]; a slot holds one token of one request.

    budget: bytes for keys and values of all layers. block: tokens. Raises ValueError if the budget is less than one
    block.
    """

    def __init__(self, model: ModelSection, budget: int, dtype: torch.dtype, block: int = 16) -> None:
        if block < 1:
            raise ValueError(f"block={block} is invalid: at least 1 token")
        width = model.kv_heads * (model.d_model // model.heads)
        block_bytes = 2 * model.layers * block * width * dtype.itemsize
        self.blocks, self.block = budget // block_bytes, block
        if self.blocks < 1:
            raise ValueError(
                f"kv_bytes={budget:,} is too small: one block of {block} tokens takes {block_bytes:,} bytes"
            )
        shape = (model.layers, self.blocks * block, model.kv_heads, model.d_model // model.heads)
        self.keys, self.values = _zeros(shape, dtype), _zeros(shape, dtype)
        self._free = list(range(self.blocks))[::-1]
        self._owned: dict[Hashable, list[int]] = {}

    @property
    def capacity(self) -> int:
        """Tokens that fit into all blocks."""
        return self.blocks * self.block

    @property
    def free(self) -> int:
        """Tokens that fit into the free blocks."""
        return len(self._free) * self.block

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.itemsize

    def fits(self, tokens: int) -> bool:
        """Whether enough blocks are free for `tokens` tokens."""
        return -(-tokens // self.block) <= len(self._free)

    def allocate(self, owner: Hashable, tokens: int) -> None:
        """Allocate blocks for `tokens` tokens to `owner`. Raises CacheFull, without any change, if too few are free."""
        if owner in self._owned:
            raise ValueError(f"{owner!r} already owns blocks")
        needed = -(-tokens // self.block)
        if needed > len(self._free):
            raise CacheFull(
                f"{tokens} tokens need {needed} blocks of {self.block}; {len(self._free)} of {self.blocks} are free"
            )
        self._owned[owner] = [self._free.pop() for _ in range(needed)]

    def release(self, owner: Hashable) -> None:
        """Free the blocks of an owner. Raises KeyError if it owns none."""
        self._free += reversed(self._owned.pop(owner))

    def tables(self, owners: Sequence[Hashable], tokens: int) -> Tensor:
        """Return the blocks of the first `tokens` tokens of each owner, [B, n] int64, padded with block 0."""
        n = -(-tokens // self.block)
        rows = [self._owned[owner][:n] for owner in owners]
        return torch.tensor([row + [0] * (n - len(row)) for row in rows], dtype=torch.int64)

    def write(self, layer: int, slots_T: Tensor, key: Tensor, value: Tensor) -> None:
        """Store the keys and values [T, kv_heads, head_dim] of a layer."""
        self.keys[layer].index_copy_(0, slots_T, key)
        self.values[layer].index_copy_(0, slots_T, value)

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the blocks `tables` [B, n]: two tensors [B, kv_heads, n*block, head_dim]."""
        batch, n = tables.shape
        kv_heads, head_dim = self.keys.shape[2:]

        def gather(cache: Tensor) -> Tensor:
            found = cache.view(self.blocks, -1).index_select(0, tables.flatten())
            return found.view(batch, n * self.block, kv_heads, head_dim).transpose(1, 2)

        return gather(self.keys[layer]), gather(self.values[layer])
