"""Forward pass of the trunk over one step: a few tokens of each of many requests.

Dense products take all rows of a step together, attention reads the paged cache, and a `ClusterCompute` computes the
clusters.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.model.expert_math import padded
from raymoe.model.router import layer_gate, route
from raymoe.model.transformer import norm, rope
from raymoe.serving.engine import native
from raymoe.serving.engine.cluster import ClusterCompute, Product, by_cluster, few_sizes
from raymoe.serving.engine.kv_cache import KVCache
from raymoe.storage.artifact import Artifact


class Segment(NamedTuple):
    """Consecutive tokens of one request; its earlier tokens are in the cache."""

    owner: Hashable
    start: int
    tokens: Sequence[int]


class Group(NamedTuple):
    """Segments of equal length n that attend together."""

    rows: slice
    """Rows of the segments in the batch: B*n, segment by segment."""
    n: int
    tables: Tensor
    """[B, blocks] int64"""
    mask: Tensor
    """[B, 1, queries or 1, blocks*block], additive: -inf where a key is later than the query or unused."""


class Batch:
    """Rows of a step and the places of their keys and values. shared: query heads per key head.

    Segments are sorted by length and end, so that the rows of a group are adjacent.
    """

    def __init__(self, segments: Sequence[Segment], cache: KVCache, shared: int, dtype: torch.dtype) -> None:
        lengths = [len(s.tokens) for s in segments]
        starts = list(accumulate(lengths, initial=0))
        order = sorted(range(len(segments)), key=lambda i: (lengths[i], segments[i].start))
        self.order_T = torch.tensor([row for i in order for row in range(starts[i], starts[i + 1])], dtype=torch.int64)
        """Position of each row in the segments as given."""
        segments = [segments[i] for i in order]
        self.tokens_T = torch.tensor([token for s in segments for token in s.tokens], dtype=torch.int64)
        positions = [p for s in segments for p in range(s.start, s.start + len(s.tokens))]
        self.positions_T = torch.tensor(positions, dtype=torch.int64)
        owner = torch.tensor([i for i, s in enumerate(segments) for _ in s.tokens], dtype=torch.int64)
        tables = cache.tables([s.owner for s in segments], _round_up(max(positions) + 1, 16))
        self.slots_T = tables[owner, self.positions_T // cache.block] * cache.block + self.positions_T % cache.block
        self.groups = []
        first = row = 0
        for n, ends in _together(segments):
            last, rows = first + len(ends), slice(row, row + len(ends) * n)
            blocks = -(-_round_up(max(ends), 16) // cache.block)
            later = torch.arange(blocks * cache.block) > self.positions_T[rows].view(len(ends), 1, n, 1)
            mask = torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf)
            if n > 1:
                mask = F.pad(mask.repeat(1, 1, shared, 1), (0, 0, 0, _round_up(shared * n, 4) - shared * n))
            self.groups.append(Group(rows, n, tables[first:last, :blocks], mask))
            first, row = last, rows.stop

    def row_of(self, rows: Tensor) -> Tensor:
        """Return the positions in the batch of rows of the segments as given."""
        return self.order_T.argsort()[rows]


def _together(segments: Sequence[Segment]) -> Iterator[tuple[int, list[int]]]:
    """Yield (n, ends) of segments that attend together: equal length n, split by the power of two of their ends where
    this at least halves the keys to read. Each group costs some calls; a short segment beside a long one reads many
    keys."""
    for n, members in groupby(segments, key=lambda s: len(s.tokens)):
        ends = [s.start + n for s in members]
        parts = [list(part) for _, part in groupby(ends, key=lambda end: (max(end, 64) - 1).bit_length())]
        if 2 * sum(len(part) * part[-1] for part in parts) <= len(ends) * ends[-1]:
            yield from ((n, part) for part in parts)
        else:
            yield n, ends


def _round_up(x: int, step: int) -> int:
    """Round up to a multiple. With multiples of 4 queries and 16 keys, a row's attention is independent of other rows."""
    return -(-x // step) * step


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim] (RoPE) in few calls; cos, sin [T, 1, head_dim], the first half of sin negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Product
    output: Product
    ffn_norm: Tensor
    router: Tensor
    router_bias: Tensor


class Trunk:
    """Trunk of an artifact in the compute type `dtype`, float32 or bfloat16; the residual stream is float32.

    length: longest request in tokens. Raises ValueError for a model without clusters, or for another type.
    """

    def __init__(self, artifact: Artifact, clusters: ClusterCompute, dtype: torch.dtype, length: int) -> None:
        model = artifact.model
        if model.experts != "clustered":
            raise ValueError(f"experts={model.experts!r} cannot be served: only clustered experts can")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype} is invalid: torch.float32 or torch.bfloat16")
        self.model, self.clusters, self.dtype, self.length = model, clusters, dtype, length
        self.head_dim = model.d_model // model.heads
        tensors = artifact.trunk()
        self.embedding = tensors["embedding"].half()  # the stored type: it is only looked up
        cos, sin = rope(length, self.head_dim, model.rope_theta, torch.device("cpu"))
        self.native = native.Dense(model, tensors, dtype, cos, sin) if native.library() else None
        if self.native:
            return
        self.head = Product(tensors["embedding" if model.tied_head else "head"].t().to(dtype))
        self.final_norm = tensors["final_norm"]
        self.layers = []
        for i in range(model.layers):
            at = f"layers.{i}."
            qkv = torch.cat([tensors[f"{at}attention.{name}"] for name in ("query", "key", "value")], 1)
            self.layers.append(
                _Layer(
                    tensors[at + "attention_norm"],
                    Product(qkv.to(dtype)),
                    Product(tensors[at + "attention.output"].to(dtype)),
                    tensors[at + "ffn_norm"],
                    tensors[at + "router.weight"],
                    tensors[at + "router.bias"],
                )
            )
        self.cos, self.sin = (torch.cat(halves, 1).unsqueeze(1).to(dtype) for halves in ((cos, cos), (-sin, sin)))

    @torch.inference_mode()
    def __call__(self, segments: Sequence[Segment], cache: KVCache, wanted: Tensor) -> Tensor:
        """Return float32 logits [n, V] of the rows `wanted` [n] of the step, and add its tokens to the cache."""
        if self.native:
            return self._forward_native(self.native, segments, cache, wanted)
        batch = Batch(segments, cache, self.model.heads // self.model.kv_heads, self.dtype)
        cos, sin = self.cos[batch.positions_T], self.sin[batch.positions_T]
        x = F.embedding(batch.tokens_T, self.embedding).float()
        for i, layer in enumerate(self.layers):
            x = x + self._attention(i, norm(x, layer.attention_norm).to(self.dtype), cos, sin, batch, cache)
            x = x + self._experts(i, norm(x, layer.ffn_norm).to(self.dtype))
        return self.head(norm(x[batch.row_of(wanted)], self.final_norm).to(self.dtype)).float()

    def _forward_native(
        self, dense: native.Dense, segments: Sequence[Segment], cache: KVCache, wanted: Tensor
    ) -> Tensor:
        lengths = torch.tensor([len(s.tokens) for s in segments])
        tokens = torch.tensor([token for s in segments for token in s.tokens])
        position = torch.tensor([p for s in segments for p in range(s.start, s.start + len(s.tokens))])
        owner = torch.arange(len(segments)).repeat_interleave(lengths)
        tables = cache.tables([s.owner for s in segments], max(s.start + len(s.tokens) for s in segments))
        x = F.embedding(tokens, self.embedding).float()
        step = native.Step(dense, x, position, owner, tables, cache.block, cache.keys, cache.values)
        for i in range(self.model.layers):
            step.add(self.clusters(i, step.attend(i)))
        return step.logits(wanted)

    def _attention(self, i: int, rows: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        heads, kv_heads, head_dim = self.model.heads, self.model.kv_heads, self.head_dim
        shared = heads // kv_heads
        qkv = self.layers[i].qkv(rows).view(rows.shape[0], heads + 2 * kv_heads, head_dim)
        rotated = _rotate(qkv[:, : heads + kv_heads], cos, sin)
        cache.write(i, batch.slots_T, rotated[:, heads:], qkv[:, heads + kv_heads :])
        mixed = []
        for group in batch.groups:
            # Heads that share a key are queries of one attention: no key is repeated.
            b, n = group.mask.shape[0], group.n
            query = rotated[group.rows, :heads].view(b, n, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
            query = query.reshape(b, kv_heads, shared * n, head_dim)
            out = F.scaled_dot_product_attention(
                F.pad(query, (0, 0, 0, _round_up(shared * n, 4) - shared * n)),
                *cache.read(i, group.tables),
                attn_mask=group.mask,
            )[:, :, : shared * n]
            out = out.reshape(b, kv_heads, shared, n, head_dim).permute(0, 3, 1, 2, 4)
            mixed.append(out.reshape(b * n, heads * head_dim))
        return self.layers[i].output(torch.cat(mixed) if len(mixed) > 1 else mixed[0])

    def _experts(self, i: int, rows: Tensor) -> Tensor:
        model, layer = self.model, self.layers[i]
        choice = route(
            padded(rows, few_sizes(rows.shape[0])),
            layer.router,
            layer.router_bias,
            model.clusters_per_token,
            gate=layer_gate(model),
        )
        index, weight = choice.index_TK[: rows.shape[0]], choice.weight_TK[: rows.shape[0]] * model.gate_scale
        answers = by_cluster(rows, index, model.n_clusters, partial(self.clusters, i))
        return (weight[..., None] * answers).sum(1)
