"""The section `model` of a config: the architecture. Field docstrings are the text of `raymoe train --help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymoe.config.checks import check_positive, require

Experts = Literal["clustered", "flat", "dense"]


@dataclass(frozen=True)
class ModelSection:
    """Architecture."""

    experts: Experts = "clustered"
    """Kind of feed-forward layer. `clustered`: experts in clusters (`model.expert_kind`); routing is in two stages, to a cluster and to its experts. `flat`: independent experts of the width `model.d_expert` with top-K routing. `dense`: one feed-forward network with the active width of the experts."""
    layers: int = 4
    """Transformer layers; each has a feed-forward layer of experts."""
    d_model: int = 256
    """Width of the residual stream (D). A multiple of 2 x `model.heads`."""
    d_expert: int = 512
    """Hidden width of an expert (F)."""
    n_experts: int = 32
    """Experts in a layer (E)."""
    n_clusters: int = 4
    """Clusters in a layer (C), at most `model.n_experts`."""
    experts_per_token: int = 2
    """Experts that process each token (K). Clustered: in each cluster of the token."""
    clusters_per_token: int = 1
    """Clusters that stage 1 of the routing selects for each token (P)."""
    expert_kind: Literal["residual", "private"] = "residual"
    """Experts of a cluster. `residual`: the base of the cluster plus a low-rank residual (the paper's form). `private`: a narrow feed-forward network of its own; its output is added to that of the base."""
    residual_width: int = 16
    """Rank of a residual (W). 0: no residuals, so that all experts of a cluster are its base."""
    expert_width: int = 0
    """Hidden width of a private expert. 0: a quarter of `model.d_expert`."""
    base_width: int | None = None
    """Hidden width of the base of a cluster. Residual experts need `model.d_expert`. `none`: `model.d_expert` for residual experts, 0 (no base) for private ones."""
    gate: Literal["softmax", "biased", "sigmoid"] = "softmax"
    """Weight of a chosen group, a cluster or a flat expert. `softmax`: over all clusters, or over the chosen flat experts. `biased`: softmax over all groups of logits plus selection biases, so that a group that its bias selects is not weighted down. `sigmoid`: of its logit, normalized over several chosen groups."""
    gate_scale: float = 1.0
    """Factor on the output of a clustered layer. Its outputs are weighted with the probability of their cluster, and are small at first."""
    router_std: float = 0.02
    """Standard deviation of the initial weights of routers. Small logits at the start leave the first choices to the selection biases."""
    heads: int = 4
    """Query heads of the attention."""
    kv_heads: int = 2
    """Key and value heads (grouped-query attention). Divides `model.heads`."""
    vocabulary: int = 8192
    """Size of the tokenizer's vocabulary (V), and so of the embedding."""
    context: int = 256
    """Length of a training sequence in tokens (S), at most 2^20."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    tied_head: bool = True
    """Share the weights of the embedding and the output head."""

    def __post_init__(self) -> None:
        check_positive(
            self, "model", "layers", "d_model", "d_expert", "n_experts", "n_clusters", "experts_per_token",
            "clusters_per_token", "gate_scale", "router_std", "heads", "kv_heads", "vocabulary", "context", "rope_theta",
        )  # fmt: skip
        require(self.context <= 1 << 20, "model.context", self.context, "at most 2^20")
        for name in ("residual_width", "expert_width"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 or more")
        require(
            self.base_width is None or self.base_width >= 0, "model.base_width", self.base_width, "0 or more, or none"
        )
        rotary = f"model.d_model={self.d_model} must be a multiple of 2 x heads (RoPE rotates pairs)"
        require(self.d_model % (2 * self.heads) == 0, "model.heads", self.heads, rotary)
        require(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, f"must divide heads={self.heads}")
        if self.experts == "clustered":
            self._check_clusters()
        else:
            require(
                self.experts_per_token <= self.n_experts,
                "model.experts_per_token",
                self.experts_per_token,
                f"at most n_experts={self.n_experts}",
            )

    def _check_clusters(self) -> None:
        experts, clusters = self.n_experts, self.n_clusters
        require(clusters <= experts, "model.n_clusters", clusters, f"at most n_experts={experts}")
        require(
            self.clusters_per_token <= clusters,
            "model.clusters_per_token",
            self.clusters_per_token,
            f"at most n_clusters={clusters}",
        )
        require(
            self.expert_kind == "private" or self.base_width in (None, self.d_expert),
            "model.base_width",
            self.base_width,
            f"residual experts need a base of model.d_expert={self.d_expert}",
        )
        require(
            not self.has_members or self.experts_per_token <= experts // clusters,
            "model.experts_per_token",
            self.experts_per_token,
            f"at most the {experts // clusters} experts of the smallest cluster",
        )

    @property
    def has_members(self) -> bool:
        """Whether stage 2 of the routing selects among the experts of a cluster."""
        return self.experts == "clustered" and (self.expert_kind == "private" or self.residual_width > 0)

    @property
    def private_width(self) -> int:
        """Hidden width of a private expert (see `expert_width`)."""
        return self.expert_width or max(1, self.d_expert // 4)

    @property
    def cluster_base_width(self) -> int:
        """Hidden width of a cluster's base (see `base_width`)."""
        if self.base_width is not None:
            return self.base_width
        return self.d_expert if self.expert_kind == "residual" else 0

    def default_assignment(self) -> tuple[tuple[int, ...], ...]:
        """Return version 0 of the assignment: contiguous experts in clusters of even size. Shape [layers][E]."""
        row = tuple(e * self.n_clusters // self.n_experts for e in range(self.n_experts))
        return (row,) * self.layers
