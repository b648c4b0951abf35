"""The decoder-only language model: RMSNorm, RoPE, grouped-query attention, and the feed-forward layer of the config.

Shape suffixes of this file besides the usual ones: `H` query heads, `G` key-value heads, `A` head dimension,
`J` = A/2, `L` layers, `U` cached and new tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.config import ModelSection
from raymoe.model.dispatch import Dispatch, LocalDispatch
from raymoe.model.experts import FFN, ClusteredExperts, DenseFFN, FlatExperts, Ghosts
from raymoe.model.leaves import RESIDUALS
from raymoe.model.observation import LayerObservation, Observation

Assignment = Sequence[Sequence[int]]
"""[layers][E]: the cluster of each expert."""

Kind = TypeVar("Kind", ClusteredExperts, FlatExperts, DenseFFN)


def rope(length: int, head_dim: int, theta: float, device: torch.device, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [S, A/2] of the rotary angles of positions start…start+length−1, float32."""
    frequency_J = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angle_SJ = torch.arange(start, start + length, device=device, dtype=torch.float64)[:, None] * frequency_J
    return angle_SJ.cos().float(), angle_SJ.sin().float()


def rotate(x_BHSA: Tensor, cos_SJ: Tensor, sin_SJ: Tensor) -> Tensor:
    """Rotate pairs (i, i + A/2) of x [B, H, S, A] by the angles of their position."""
    first_BHSJ, second_BHSJ = x_BHSA.chunk(2, dim=-1)
    cos_SJ, sin_SJ = cos_SJ.to(x_BHSA.dtype), sin_SJ.to(x_BHSA.dtype)
    return torch.cat((first_BHSJ * cos_SJ - second_BHSJ * sin_SJ, second_BHSJ * cos_SJ + first_BHSJ * sin_SJ), dim=-1)


class KVCache:
    """Preallocated keys and values of previous tokens: two [L, B, G, capacity, A]."""

    def __init__(self, model: ModelSection, batch: int, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        shape = (model.layers, batch, model.kv_heads, capacity, model.d_model // model.heads)
        self.keys_LBGUA, self.values_LBGUA = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, key_BGSA: Tensor, value_BGSA: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a layer; return all of its keys and values [B, G, U, A].

        Raises ValueError if the tokens exceed the capacity.
        """
        capacity, stop = self.keys_LBGUA.shape[3], self.length + key_BGSA.shape[2]
        if stop > capacity:
            raise ValueError(f"the KV cache holds {capacity} tokens, {stop} are needed: allocate a larger capacity")
        self.keys_LBGUA[layer, :, :, self.length : stop] = key_BGSA
        self.values_LBGUA[layer, :, :, self.length : stop] = value_BGSA
        key_BGUA, value_BGUA = self.keys_LBGUA[layer, :, :, :stop], self.values_LBGUA[layer, :, :, :stop]
        return key_BGUA.to(key_BGSA.dtype), value_BGUA.to(value_BGSA.dtype)


class Attention(nn.Module):
    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.heads, self.kv_heads = model.heads, model.kv_heads
        self.head_dim = model.d_model // model.heads
        self.query = nn.Parameter(torch.empty(model.d_model, self.heads * self.head_dim))
        self.key = nn.Parameter(torch.empty(model.d_model, self.kv_heads * self.head_dim))
        self.value = nn.Parameter(torch.empty(model.d_model, self.kv_heads * self.head_dim))
        self.output = nn.Parameter(torch.empty(self.heads * self.head_dim, model.d_model))

    def forward(self, x_BSD: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """x [B, S, D] -> [B, S, D]. The tokens attend to those in `cache` and to earlier ones of x."""
        batch, length, _ = x_BSD.shape
        query_BHSA = (x_BSD @ self.query).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        key_BGUA = (x_BSD @ self.key).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        value_BGUA = (x_BSD @ self.value).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        query_BHSA, key_BGUA = rotate(query_BHSA, cos_SJ, sin_SJ), rotate(key_BGUA, cos_SJ, sin_SJ)
        mask_SU = None
        if cache is not None:
            key_BGUA, value_BGUA = cache.extend(layer, key_BGUA, value_BGUA)
            if cache.length:
                ones_SU = torch.ones(length, key_BGUA.shape[2], dtype=torch.bool, device=x_BSD.device)
                mask_SU = ones_SU.tril(cache.length)
        mixed_BHSA = F.scaled_dot_product_attention(
            query_BHSA, key_BGUA, value_BGUA, attn_mask=mask_SU, is_causal=mask_SU is None,
            enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return mixed_BHSA.transpose(1, 2).flatten(2) @ self.output


class Block(nn.Module):
    def __init__(self, model: ModelSection, ffn: FFN) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.empty(model.d_model))
        self.attention = Attention(model)
        self.ffn_norm = nn.Parameter(torch.empty(model.d_model))
        self.ffn = ffn

    def forward(
        self,
        x_BSD: Tensor,
        cos_SJ: Tensor,
        sin_SJ: Tensor,
        cache: KVCache | None,
        layer: int,
        seen: LayerObservation | None,
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(norm(x_BSD, self.attention_norm), cos_SJ, sin_SJ, cache, layer)
        rows_TD = norm(x_BSD, self.ffn_norm).flatten(0, 1)
        return x_BSD + self.ffn(rows_TD, seen).view_as(x_BSD)


def norm(x: Tensor, weight_D: Tensor) -> Tensor:
    """Return the RMSNorm of x [..., D]."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps=1e-6)


class Transformer(nn.Module):
    """tokens [B, S] -> logits [B, S, V].

    dispatch: one per layer; its local groups and the transport of rows to the others (all local by
    default). assignment [layers][E]: the cluster of each expert (contiguous by default). ghosts: the
    ghosts of each layer. Weights are uninitialized until `initialize` or `load_logical`.
    """

    def __init__(
        self,
        model: ModelSection,
        assignment: Assignment | None = None,
        dispatch: Sequence[Dispatch] | None = None,
        ghosts: Sequence[Ghosts] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        assignment = assignment or model.default_assignment()
        ghosts = ghosts or [{}] * model.layers
        groups = model.n_clusters if model.experts == "clustered" else model.n_experts
        dispatch = dispatch or [LocalDispatch(groups) for _ in range(model.layers)]
        self.embedding = nn.Parameter(torch.empty(model.vocabulary, model.d_model))
        if not model.tied_head:
            self.head = nn.Parameter(torch.empty(model.vocabulary, model.d_model))
        self.final_norm = nn.Parameter(torch.empty(model.d_model))
        layers: list[Block] = []
        for row, moving, layer_dispatch in zip(assignment, ghosts, dispatch, strict=True):
            if model.experts == "clustered":
                ffn: FFN = ClusteredExperts(model, row, layer_dispatch, moving)
            elif model.experts == "flat":
                ffn = FlatExperts(model, layer_dispatch)
            else:
                ffn = DenseFFN(model)
            layers.append(Block(model, ffn))
        self.layers = nn.ModuleList(layers)

    @property
    def ffns(self) -> list[FFN]:
        return [block.ffn for block in self.layers]  # type: ignore[misc]

    def hidden(self, tokens_BS: Tensor, cache: KVCache | None = None, *, seen: Observation | None = None) -> Tensor:
        """Return the last normalized hidden states [B, S, D]. `cache` contains the tokens before these."""
        start = cache.length if cache else 0
        head_dim = self.model.d_model // self.model.heads
        cos_SJ, sin_SJ = rope(tokens_BS.shape[1], head_dim, self.model.rope_theta, tokens_BS.device, start)
        x_BSD = F.embedding(tokens_BS, self.embedding)
        for i, block in enumerate(self.layers):
            x_BSD = block(x_BSD, cos_SJ, sin_SJ, cache, i, seen.layers[i] if seen else None)
        if cache:
            cache.length += tokens_BS.shape[1]
        return norm(x_BSD, self.final_norm)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, [V, D]."""
        return self.embedding if self.model.tied_head else self.head

    def forward(self, tokens_BS: Tensor, cache: KVCache | None = None, *, seen: Observation | None = None) -> Tensor:
        return self.hidden(tokens_BS, cache, seen=seen) @ self.head_weight.t()

    def ffns_of(self, kind: type[Kind]) -> list[Kind]:
        """Return the feed-forward layers of a model in which all are of this kind."""
        found = [ffn for ffn in self.ffns if isinstance(ffn, kind)]
        assert len(found) == len(self.layers), f"not all layers are {kind.__name__}"
        return found

    # Logical names do not depend on the process that has a tensor.

    def slices(self) -> Iterator[tuple[str, str, int | None, int]]:
        """Yield (logical key, parameter or buffer name, index or None, fan-in) of every local tensor."""
        d = self.model.d_model
        yield "embedding", "embedding", None, d
        if not self.model.tied_head:
            yield "head", "head", None, d
        yield "final_norm", "final_norm", None, 0
        for i, block in enumerate(self.layers):
            prefix = f"layers.{i}."
            yield prefix + "attention_norm", prefix + "attention_norm", None, 0
            yield prefix + "ffn_norm", prefix + "ffn_norm", None, 0
            for name in ("query", "key", "value", "output"):
                yield prefix + f"attention.{name}", prefix + f"attention.{name}", None, d
            for item in block.ffn.logical():  # type: ignore[operator]
                yield prefix + item.key, prefix + "ffn." + item.name, item.index, item.fan_in

    def logical(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return logical key -> view into `tensors` (by parameter name; by default the weights and biases)."""
        tensors = tensors if tensors is not None else self.stacked()
        return {
            key: tensors[name] if index is None else tensors[name][index]
            for key, name, index, _ in self.slices()
            if name in tensors
        }

    def stacked(self) -> dict[str, Tensor]:
        """Return parameters and selection biases by name, stacked."""
        return {name: t.detach() for name, t in self.named_parameters()} | dict(self.named_buffers())

    def load_logical(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy logical tensors into place. Raises ValueError on a missing key or a wrong shape."""
        for key, view in self.logical().items():
            if key not in tensors:
                raise ValueError(f"the weights have no {key!r}: use the weights of a model with this config")
            if tensors[key].shape != view.shape:
                raise ValueError(
                    f"{key!r} has shape {list(tensors[key].shape)}, expected {list(view.shape)}: use the weights of a model with this config"
                )
            view.copy_(tensors[key])

    @torch.no_grad()
    def initialize(self, seed: int, *, common: bool = False) -> None:
        """Initialize each logical tensor from its own random stream: the result depends on seed and key alone.

        common: all experts of a layer start with the same matrices; their router rows differ.

        Matrices are normal with std 1/√fan-in, times 1/√(2·layers) if they write to the residual stream, times
        `RESIDUAL_START` for the outer factors. Norms are one, biases zero, embeddings have std 0.02 and routers `router_std`.
        """
        output_scale = (2 * self.model.layers) ** -0.5
        views = self.logical()
        for key, _, _, fan_in in self.slices():
            leaf = key.rsplit(".", 1)[-1]
            if fan_in == 0:
                views[key].fill_(1.0 if leaf.endswith("norm") else 0.0)
                continue
            std = fan_in**-0.5
            if "router" in key:
                std = self.model.router_std
            elif key in ("embedding", "head"):
                std = 0.02
            if leaf in ("output", "base_down", "down", "down_out", "private_down"):
                std *= output_scale
            if leaf in RESIDUALS and leaf.endswith("out"):
                std *= RESIDUAL_START
            stream = re.sub(r"\.experts\.\d+\.", ".experts.", key) if common else key
            digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values = torch.empty(views[key].shape).normal_(0.0, std, generator=generator)
            views[key].copy_(values)


RESIDUAL_START = 0.3
"""Initial size of a residual relative to its base; experts differ from the first step."""
