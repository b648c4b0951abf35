"""The trunk's pass over one step of many requests: a few tokens of each, whatever their number and place.

All rows of a step go through the dense products together, attention goes over the paged cache, and the
clusters are whatever `ClusterCompute` is given.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.model.fused import padded
from raymoe.model.router import route
from raymoe.model.transformer import norm, rope, rotate
from raymoe.serving.clusters import ClusterCompute, Product, by_cluster, few_sizes
from raymoe.serving.kv_cache import KVCache
from raymoe.storage.export import Artifact


class Segment(NamedTuple):
    """Consecutive tokens of one request, whose earlier ones are in the cache."""

    owner: Hashable
    start: int
    tokens: Sequence[int]


class Group(NamedTuple):
    """Segments of the same length n, that attend together."""

    rows: Tensor
    """[B·n] int64: their rows in the step."""
    n: int
    tables: Tensor
    """[B, blocks] int64"""
    mask: Tensor
    """[B, 1, queries or 1, blocks·block] additive: −inf where a key is later than the query, or nobody's."""


class Batch:
    """The rows of a step, and where their keys and values are. `shared`: heads that share a key."""

    def __init__(self, segments: Sequence[Segment], cache: KVCache, shared: int, dtype: torch.dtype) -> None:
        self.tokens_T = torch.tensor([token for s in segments for token in s.tokens], dtype=torch.int64)
        positions = [p for s in segments for p in range(s.start, s.start + len(s.tokens))]
        self.positions_T = torch.tensor(positions, dtype=torch.int64)
        owner = torch.tensor([i for i, s in enumerate(segments) for _ in s.tokens], dtype=torch.int64)
        tables = cache.tables([s.owner for s in segments], _round_up(max(positions) + 1, 16))
        self.slots_T = tables[owner, self.positions_T // cache.block] * cache.block + self.positions_T % cache.block
        ends = [0]
        for s in segments:
            ends.append(ends[-1] + len(s.tokens))
        spans = list(pairwise(ends))
        single = [i for i, s in enumerate(segments) if len(s.tokens) == 1]
        several = [[i] for i, s in enumerate(segments) if len(s.tokens) > 1]
        self.groups = []
        for members in [single, *several] if single else several:
            rows = torch.tensor([row for i in members for row in range(*spans[i])], dtype=torch.int64)
            at = self.positions_T[rows].view(len(members), 1, -1, 1)
            n = at.shape[2]
            blocks = -(-_round_up(int(at.max()) + 1, 16) // cache.block)
            later = torch.arange(blocks * cache.block) > at
            mask = torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf)
            if n > 1:
                mask = F.pad(mask.repeat(1, 1, shared, 1), (0, 0, 0, _round_up(shared * n, 4) - shared * n))
            self.groups.append(Group(rows, n, tables[members, :blocks], mask))


def _round_up(x: int, step: int) -> int:
    """The sizes in which attention gives a row the same answer whatever is beside it: 4 queries, 16 keys."""
    return -(-x // step) * step


class _Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Product
    output: Product
    ffn_norm: Tensor
    router: Tensor
    router_bias: Tensor


class Trunk:
    """The artifact's trunk in the compute type `dtype`: float32 or bfloat16; the residual stream stays in float32.

    `length`: the longest request in tokens. Raises ValueError for a model without clusters, or another type.
    """

    def __init__(self, artifact: Artifact, clusters: ClusterCompute, dtype: torch.dtype, length: int) -> None:
        model = artifact.model
        if model.experts != "clustered":
            raise ValueError(f"experts={model.experts!r} is not allowed: only clustered experts can be served")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype} is not allowed: torch.float32 or torch.bfloat16")
        self.model, self.clusters, self.dtype, self.length = model, clusters, dtype, length
        self.head_dim = model.d_model // model.heads
        tensors = artifact.trunk()
        self.embedding = tensors["embedding"].half()  # as it rests: it is only looked up
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
        self.cos, self.sin = rope(length, self.head_dim, model.rope_theta, torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, segments: Sequence[Segment], cache: KVCache, wanted: Tensor) -> Tensor:
        """Float32 logits [n, V] of the step's rows `wanted` [n]; the cache then holds the segments' tokens."""
        batch = Batch(segments, cache, self.model.heads // self.model.kv_heads, self.dtype)
        cos, sin = (table[batch.positions_T][:, None] for table in (self.cos, self.sin))
        x = F.embedding(batch.tokens_T, self.embedding).float()
        for i, layer in enumerate(self.layers):
            x = x + self._attention(i, norm(x, layer.attention_norm).to(self.dtype), cos, sin, batch, cache)
            x = x + self._experts(i, norm(x, layer.ffn_norm).to(self.dtype))
        return self.head(norm(x[wanted], self.final_norm).to(self.dtype)).float()

    def _attention(self, i: int, rows: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        heads, kv_heads, head_dim = self.model.heads, self.model.kv_heads, self.head_dim
        shared = heads // kv_heads
        qkv = self.layers[i].qkv(rows).view(rows.shape[0], heads + 2 * kv_heads, head_dim)
        turned = rotate(qkv[:, : heads + kv_heads], cos, sin)
        cache.write(i, batch.slots_T, turned[:, heads:], qkv[:, heads + kv_heads :])
        mixed = torch.empty_like(rows)
        for group in batch.groups:
            # The heads that share a key are queries of one attention, so that no key is repeated.
            b, n = group.mask.shape[0], group.n
            query = turned[group.rows, :heads].view(b, n, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
            query = query.reshape(b, kv_heads, shared * n, head_dim)
            out = F.scaled_dot_product_attention(
                F.pad(query, (0, 0, 0, _round_up(shared * n, 4) - shared * n)),
                *cache.read(i, group.tables),
                attn_mask=group.mask,
            )[:, :, : shared * n]
            out = out.reshape(b, kv_heads, shared, n, head_dim).permute(0, 3, 1, 2, 4)
            mixed[group.rows] = out.reshape(b * n, heads * head_dim)
        return self.layers[i].output(mixed)

    def _experts(self, i: int, rows: Tensor) -> Tensor:
        model, layer = self.model, self.layers[i]
        choice = route(
            padded(rows, few_sizes(rows.shape[0])),
            layer.router,
            layer.router_bias,
            model.clusters_per_token,
            over_selected=False,
        )
        index, weight = choice.index[: rows.shape[0]], choice.weight[: rows.shape[0]] * model.gate_scale
        answers = by_cluster(rows, index, model.n_clusters, partial(self.clusters, i))
        return (weight[..., None] * answers).sum(1)
